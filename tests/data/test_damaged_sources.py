"""Sources that cannot be read: one line names the file, the row, what is wrong and the way out."""

import contextlib
import gzip
import random
import re

import pyarrow as pa
import pytest
from etils import epath
from support.corpus_copies import COPIES, arrow, lines, parquet, table, tar, tar_of_texts, zst
from support.datasets import prepare

from diffusionlm.data.fields import Columns
from diffusionlm.data.formats import reading
from diffusionlm.data.items import read_text
from diffusionlm.data.text_files import Files
from diffusionlm.errors import UserError

WORDS = [{"text": f"some words {i} " * 20, "title": f"t{i}"} for i in range(50)]
NESTED = [{"text": ["a", "b"], "meta": {"title": "t", "lang": {"code": "en"}}}] * 3


def cut(content, end):
    return content[: len(content) + end]


def invalid():
    """Return a table whose second text is not UTF-8, which Arrow does not check."""
    import io

    texts = pa.array([b"fine", b"a\xffb", b"fine"] * 20).view(pa.string())
    file = io.BytesIO()
    with pa.ipc.new_stream(file, pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": texts}))
    return file.getvalue()


def wrong_offset():
    """Return a table of which an offset points behind its texts, so that reading it would crash."""
    import struct

    content = arrow([{"text": "0123456789"}] * 5, rows=5)
    offsets = struct.pack("<6i", *range(0, 60, 10))
    assert content.count(offsets) == 1
    return content.replace(offsets, struct.pack("<6i", 0, 10, 1 << 30, 30, 40, 50))


def flipped_header():
    """Return an archive in which the header of the third member is damaged: tarfile would end there in silence."""
    content = bytearray(tar_of_texts(WORDS))
    content[2 * 1024 + 100] ^= 1  # each member has a header and a text of a block
    return bytes(content)


DAMAGED = {
    # name: content, setting, message
    "cut.parquet": (cut(parquet(WORDS), -20), {}, r"cut\.parquet: damaged parquet data after this point \(.*\); fetch"),
    "text.parquet": (b"no parquet file", {}, "damaged parquet data"),
    "none.parquet": (b"", {}, "damaged parquet data"),
    "half.parquet": (parquet(WORDS)[:300] + b"\0" * 200 + parquet(WORDS)[500:], {}, "damaged parquet data"),
    "column.parquet": (
        parquet([{"txet": "a", "id": 1}]),
        {},
        r"column\.parquet has no column 'text' among 'txet', 'id'; did you mean 'txet'\? choose .* --text_field NAME",
    ),
    "list.parquet": (parquet(NESTED), {}, r"column 'text' is list<.*string>, not text; .* --text_field"),
    "struct.parquet": (parquet(NESTED), {"text_field": "meta"}, "column 'meta' is struct<.*, not text"),
    "field.parquet": (
        parquet(NESTED),
        {"text_field": "meta.body"},
        "column 'meta' has the fields '(title', 'lang|lang', 'title)', not 'body'; choose another field than 'meta",
    ),
    "deep.parquet": (parquet(NESTED), {"text_field": "text.x"}, "column 'text' has no fields: it is list<.*, not 'x'"),
    "null.parquet": (
        parquet([{"text": "a"}, {"text": None}]),
        {},
        r"null\.parquet\[1\]: field 'text' is NoneType, not a string; correct the line, or leave .* --on_error skip",
    ),
    "where.parquet": (parquet(WORDS), {"where": ["lang=en"]}, "has no column 'lang' among 'text', 'title'"),
    "utf8.arrow": (invalid(), {}, r"utf8\.arrow\[1\]: invalid UTF-8 in 'text'; correct the line"),
    "cut.arrow": (cut(arrow(WORDS), -8), {}, r"cut\.arrow: damaged arrow data after this point \(no mark of the end\)"),
    "half.arrow": (cut(arrow(WORDS), -300), {}, "damaged arrow data"),
    "offset.arrow": (wrong_offset(), {}, "damaged arrow data"),
    "none.arrow": (b"", {}, "damaged arrow data"),
    "cut.jsonl.zst": (cut(zst(lines(WORDS)), -5), {}, r"cut\.jsonl\.zst:\d+: damaged zstd data after this point"),
    "none.jsonl.zst": (b"", {}, "split 'train' has 0 tokens"),
    "text.jsonl.zst": (b"no zstd file", {}, "damaged zstd data"),
    "cut.txt.zst": (cut(zst(b"some words " * 99), -1), {}, r"cut\.txt\.zst: damaged zstd data"),
    "cut.csv.gz": (cut(gzip.compress(table(WORDS, ",")), -9), {}, r"cut\.csv\.gz(:\d+)?: damaged gzip data"),
    "none.csv": (b"", {}, "none.csv is empty; its first row must name the columns"),
    "twice.csv": (b"text,text\na,b\n", {}, "twice.csv names the column 'text' twice; rename one"),
    "names.csv": (b"id,body\n1,a\n", {}, "names.csv has no column 'text' among 'id', 'body'; choose"),
    "cells.csv": (b"text,id\na,1\nb\n", {}, r"cells\.csv:3: 1 cells, and the header has 2; correct the line"),
    "quote.csv": (b'text,id\na,1\n"b,2\nc,3\n', {}, r"quote\.csv:3: a quote that opens here is never closed"),
    "return.csv": (b"text,id\ra,1\rb,2\r", {}, r"return\.csv:1: a carriage return that ends no line"),
    "utf8.csv": (b"text,id\n\xff,1\na,2\n", {}, r"utf8\.csv:2: invalid UTF-8; correct the line"),
    "cut.tar": (cut(tar_of_texts(WORDS), -(20 * 512)), {}, r"cut\.tar:part/\d+\.txt: damaged tar data .*end"),
    "half.tar": (tar_of_texts(WORDS)[:2700], {}, r"half\.tar:part/0002\.txt: damaged tar data"),
    "flip.tar": (flipped_header(), {}, r"flip\.tar:part/0001\.txt: damaged tar data"),
    "text.tar": (b"no tar file" * 100, {}, "damaged tar data"),
    "none.tar": (b"", {}, "damaged tar data"),
    "images.tar": (tar([("a.jpg", b"x")]), {}, "has no member that ends in .txt, .md or .json"),
    "two.tar": (tar_of_texts(WORDS) * 2, {}, "goes on after its end; of archives written one after another"),
    "pair.tar": (
        tar([("a.txt", b"x"), ("a.md", b"y")]),
        {},
        r"pair\.tar:a: one name of a\.txt and a\.md; correct the line",
    ),
    "json.tar": (tar([("a.json", b"{")]), {}, r"json\.tar:a\.json: invalid JSON"),
    "where.txt": (
        b"text",
        {"where": ["a=b"]},
        "where compares the field 'a', and '.*where.txt' is text without fields",
    ),
    "where.tar": (
        tar([("a.txt", b"x")]),
        {"where": ["a=b"]},
        r"where\.tar:a\.txt: a text, which has no field, and where='a=b' compares one",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_read_is_refused_in_one_line(name, tmp_path):
    content, settings, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        prepare(str(tmp_path / name), tmp_path / "out", **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("ending", COPIES)
def test_damage_anywhere_is_one_line_or_does_not_matter(ending, tmp_path):
    """Cut, flipped, zeroed and missing bytes: no other exception, and no end of the process."""
    draw = random.Random(0)
    whole = COPIES[ending]([{"text": f"text {i} " * (i % 9), "id": i, "source": "s" * (i % 3)} for i in range(60)])
    path, refused = tmp_path / f"a{ending}", 0
    for _ in range(150):
        content, place = bytearray(whole), draw.randrange(len(whole))
        damage = draw.choice(["cut", "flip", "flip", "zero", "miss"])
        if damage == "cut":
            del content[place:]
        elif damage == "flip":
            content[place] ^= 1 << draw.randrange(8)
        else:
            content[place : place + draw.randrange(1, 30)] = bytes(8) if damage == "zero" else b""
        path.write_bytes(content)
        try:
            files = Files([epath.Path(path)], draw.choice([None, Columns(("text",))]))
            for item in draw.choice([list(files), [item for piece in files.pieces(2000) for item in piece]]):
                with contextlib.suppress(ValueError):
                    read_text(item, "text")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 30 or ending in (".jsonl", ".lines.json", ".csv", ".tsv")


@pytest.mark.parametrize("name", ["utf8.arrow", "null.parquet", "cells.csv", "utf8.csv", "quote.csv"])
def test_rows_that_cannot_be_read_are_skipped_on_request(name, tmp_path):
    content, _, _ = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    metadata = prepare(str(tmp_path / name), tmp_path / "out", on_error="skip", sequence_length=1)
    assert metadata.malformed == (20 if name == "utf8.arrow" else 1)
    assert metadata.splits["train"].documents == (40 if name == "utf8.arrow" else 1)


def test_files_without_rows_are_no_mistake_beside_others(tmp_path):
    schema = pa.schema([("text", pa.string())])
    (tmp_path / "a.parquet").write_bytes(parquet([], schema))
    (tmp_path / "b.parquet").write_bytes(parquet(WORDS))
    (tmp_path / "c.arrow").write_bytes(arrow([], schema))
    assert prepare(str(tmp_path), tmp_path / "out").splits["train"].documents == 50


def test_what_unpacks_to_far_more_than_text_is_refused(tmp_path, monkeypatch):
    """One block of zstd may hold 32,768 times its size."""
    import zstandard

    monkeypatch.setattr(reading, "UNPACKED_BYTES", 1 << 22)
    bomb = zstandard.ZstdCompressor().compress(bytes(40 << 20))
    assert len(bomb) < 5_000
    for name in ("a.txt.zst", "a.jsonl.zst", "a.csv.zst", "a.tar.zst"):
        (tmp_path / name).write_bytes(
            bomb if "tar" not in name else zstandard.compress(tar([("a.txt", bytes(32 << 20))]))
        )
        with pytest.raises(UserError, match="unpacks to more than 200 times its size, which no text does"):
            list(Files([tmp_path / name]))


def test_windows_of_zstd_that_only_its_option_long_allows(tmp_path):
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(packed.compress(b"some words " * 1000) + packed.flush())
    (item,) = Files([tmp_path / "a.txt.zst"])
    assert item.payload == b"some words " * 1000


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.arrow", "a.tar", "a.txt.zst"])
def test_pointers_of_git_lfs(name, tmp_path):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match="is a Git LFS pointer, not the file; fetch it with `git lfs pull`"):
        prepare(str(tmp_path / name), tmp_path / "out")


def test_a_member_of_an_archive_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "DOCUMENT_BYTES", 1000)
    (tmp_path / "a.tar").write_bytes(tar([("a.txt", bytes(1001))]))
    with pytest.raises(UserError, match=r"a\.tar:a\.txt is sparse, or has more than .* GiB; split it"):
        list(Files([tmp_path / "a.tar"]))


def test_a_damaged_file_is_refused_when_it_is_cut(tmp_path):
    for name, content in (("a.parquet", parquet(WORDS)[:-20]), ("a.arrow", arrow(WORDS)[:-8])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"damaged {re.escape(name[2:])} data"):
            Files([tmp_path / name], Columns(("text",))).pieces(100)
