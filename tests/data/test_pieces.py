"""Pieces of sources: together they give every item once, in order, wherever they are cut, and can be pickled."""

import json
import os
import pickle

import pytest
from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.corpus_copies import arrow, lines, parquet, save_to_disk, tar_of_texts, zst
from support.datasets import write_jsonl

from diffusionlm.data import corpora, sources
from diffusionlm.data.fields import Columns
from diffusionlm.data.formats import reading
from diffusionlm.data.items import record_of
from diffusionlm.data.text_files import Files
from diffusionlm.errors import UserError

TEXT = Columns(("text",))


def items_of(pieces):
    """Return the items of pieces as another process would read them, in any order."""
    pieces = pickle.loads(pickle.dumps(list(pieces)))
    read = [list(piece) for piece in reversed(pieces)]
    return [item for items in reversed(read) for item in items]


# --- lines


line = st.binary(max_size=12).map(lambda content: content.replace(b"\n", b" ").replace(b"\r", b" "))
ended = st.tuples(line, st.sampled_from([b"\n", b"\r\n", b"\n\n"])).map(b"".join)


@settings(max_examples=60, deadline=None)
@given(content=st.tuples(st.lists(ended, max_size=8).map(b"".join), line).map(b"".join), piece=st.integers(1, 30))
@example(content=b"ab\ncd\nef", piece=3)  # cut exactly at the ends of lines
@example(content=b"a\n" + b"x" * 40 + b"\nb\n", piece=5)  # a line of several pieces
@example(content=b"\n\n\n", piece=1)
@example(content=b"", piece=1)
def test_every_line_is_in_the_piece_in_which_it_begins(content, piece, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(content)
    pieces = Files([path]).pieces(piece, group_bytes=1)
    expected = content.split(b"\n")
    expected = [text + b"\n" for text in expected[:-1]] + [expected[-1]] * bool(expected[-1])
    items = items_of(pieces)
    assert [item.payload for item in items] == expected
    assert [item.location for item in items] == [f"{path}:{i}" for i in range(1, len(expected) + 1)]
    assert sum(item.progress for item in items) == sum(each.progress for each in pieces) == len(content)
    assert len(pieces) == max(1, -(-len(content) // piece))
    starts = [sum(map(len, expected[:i])) for i in range(len(expected))]
    assert [len(list(each)) for each in pieces] == [
        sum(number * piece <= start < (number + 1) * piece for start in starts) for number in range(len(pieces))
    ]


@settings(max_examples=30, deadline=None)
@given(
    blank=st.sampled_from(["", "\n", " \n\n", "\ufeff"]),
    records=st.lists(st.dictionaries(st.sampled_from("ab"), st.text(max_size=5), max_size=2), max_size=5),
    listed=st.booleans(),
    piece=st.integers(1, 40),
)
def test_lists_and_lines_in_json_files(blank, records, listed, piece, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = json.dumps(records) if listed else "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(blank + text)
    items, whole = items_of(Files([path]).pieces(piece)), list(Files([path]))
    assert [record_of(item) for item in items if item.payload.strip(b"\xef\xbb\xbf \n")] == records
    assert [(item.payload, item.location) for item in items] == [(i.payload, i.location) for i in whole]


def test_a_long_line_is_not_read_by_pieces_in_which_it_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"a" * 3000 + b"\nb\n")
    pieces = Files([path]).pieces(1000)
    assert [[len(item.payload) for item in piece] for piece in pieces] == [[3001], [], [], [2]]


def test_the_place_of_a_line_is_named_as_in_the_whole_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["word"] * 50)
    *_, last = Files([path]).pieces(100)
    *_, item = last
    assert f"{item.location}: broken" == f"{path}:50: broken"
    path.unlink()
    assert item.location.startswith(f"{path}, line ")


# --- tables


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(max_size=20), max_size=25),
    rows=st.integers(1, 9),
    write=st.sampled_from([(parquet, ".parquet"), (arrow, ".arrow")]),
    piece=st.sampled_from([1, 100, 300, 10**9]),
)
def test_groups_of_rows_are_read_once(texts, rows, write, piece, tmp_path_factory):
    import pyarrow as pa

    path = tmp_path_factory.mktemp("tables") / f"a{write[1]}"
    path.write_bytes(write[0]([{"text": text} for text in texts], pa.schema([("text", pa.string())]), rows=rows))
    pieces = Files([path], TEXT).pieces(piece)
    items = items_of(pieces)
    assert [record_of(item) for item in items] == [{"text": text} for text in texts]
    assert [item.location for item in items] == [f"{path}[{i}]" for i in range(len(texts))]
    assert sum(each.progress for each in pieces) == path.stat().st_size
    if piece == 1:
        assert [len(list(each)) for each in pieces] == [
            len(texts[i : i + rows]) for i in range(0, len(texts), rows)
        ] or [0]
    assert pieces == Files([path], TEXT).pieces(piece)


# --- many files


def test_small_files_share_a_piece_and_large_ones_do_not(tmp_path):
    contents = {
        "a.txt": b"a" * 400,
        "b.txt": b"",
        "c.jsonl": lines([{"text": "c" * 100}] * 20),
        "d.jsonl.zst": zst(lines([{"text": "d"}] * 200)),
        "e.tar": tar_of_texts([{"text": "e"}]),
        "f.txt": b"f" * 3000,
        "g.txt": b"g",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = Files([epath.Path(tmp_path / name) for name in contents])
    pieces = files.pieces(1000, group_bytes=1000)
    names = [[os.path.basename(part.path) for part in piece.parts] for piece in pieces]
    assert names[0] == ["a.txt", "b.txt"] and names[1:4] == [["c.jsonl"]] * 3 and names[-1] == ["g.txt"]
    assert sum(piece.progress for piece in pieces) == files.total
    assert [(i.payload, i.location) for i in items_of(pieces)] == [(i.payload, i.location) for i in files]
    assert len(files.pieces()) == 1


def test_a_saved_dataset_is_cut_by_its_batches(tmp_path):
    folder = save_to_disk(tmp_path / "saved", [{"text": f"text {i}"} for i in range(40)])
    files = Files(sorted(epath.Path(folder).glob("*.arrow")), TEXT)
    pieces = files.pieces(50)
    assert [len(list(piece)) for piece in pieces] == [7, 7, 6, 7, 7, 6]
    assert [record_of(item)["text"] for item in items_of(pieces)] == [f"text {i}" for i in range(40)]


def test_a_file_that_changes_before_its_piece_is_read_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["word"] * 20)
    pieces = Files([path]).pieces(100)
    os.utime(path, ns=(0, 0))
    for piece in pieces:
        with pytest.raises(UserError, match="changed while it was read"):
            list(piece)


# --- other sources


def test_a_corpus_and_the_end_of_a_text_are_pieces_of_their_own(tmp_path, monkeypatch):
    documents = [corpora.Document(str(i), f"text {i}") for i in range(5)]
    monkeypatch.setitem(corpora.CORPORA._builders, "tiny", lambda: {"train": documents, "validation": []})
    splits = sources.resolve("tiny", "text")
    assert [item.payload for item in items_of(splits["train"].pieces())] == [b"text %d" % i for i in range(5)]
    assert splits["validation"].pieces() == []
    (tmp_path / "book.txt").write_text("a line\n" * 100)
    parts, _ = sources.resolve_splits(str(tmp_path / "book.txt"), None, 0.1, "text")
    content = b"".join(item.payload for part in ("train", "validation") for item in items_of(parts[part].pieces()))
    assert content == (tmp_path / "book.txt").read_bytes()
    assert [sum(piece.progress for piece in part.pieces()) for part in parts.values()] == [630, 70]
