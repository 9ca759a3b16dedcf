"""Files of documents: kinds and patterns, packed files with bounds, and what is no file of documents."""

import gzip
import io
import itertools
import json
import os
import resource
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.datasets import prepare, rows, write_jsonl
from support.dialogues import prepare_dialogues
from support.slow_cases import thinned

from diffusionlm.data import text_files
from diffusionlm.data.formats import reading
from diffusionlm.data.text_files import Files, expand
from diffusionlm.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# --- lines of JSON in files named .json


@pytest.mark.parametrize(
    ("start", "name"),
    thinned(itertools.product(["", "\n \n", "\ufeff"], ["c4.json", "c4.json.gz", "c4.jsonl.gz"]), every=2),
)
def test_lines_of_json_are_read_under_every_name(name, start, jsonl, texts, tmp_path):
    """C4 and RedPajama name them .json.gz and .json."""
    lines = start + write_jsonl(tmp_path / "lines.jsonl", texts).read_text()
    metadata = prepare(str(write(tmp_path / "folder" / name, lines)), tmp_path / "out")
    assert metadata.sha256 == prepare(jsonl, tmp_path / "plain").sha256
    assert prepare(str(tmp_path / "folder"), tmp_path / "again").sha256 == metadata.sha256
    items = list(Files([tmp_path / "folder" / name]))
    assert items[-1].location.endswith(f"{name}:{lines.count(chr(10))}")
    assert sum(item.progress for item in items) <= os.path.getsize(tmp_path / "folder" / name)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('[{"text": "a b"}, {"text": "c d"}]', ["a b", "c d"]),
        ('\n[\n{"text": "a b"}\n,{"text": "c d"}]\n', ["a b", "c d"]),
        ('{"text": "a b"}\n{"text": "c d"}', ["a b", "c d"]),
        ('{"text": "a b"}\r\n\r\n{"text": "c d"}\r\n', ["a b", "c d"]),
        ('{"text": "a b"}', ["a b"]),
    ],
)
def test_lists_and_lines_are_told_apart_by_their_first_character(content, texts, tmp_path):
    prepare(str(write(tmp_path / "a.json", content)), tmp_path / "out", sequence_length=3)
    stored = rows(tmp_path / "out")["tokens"].ravel()
    expected = [token for text in texts for token in [*text.encode(), 256]]
    np.testing.assert_array_equal(stored, expected[: len(stored)])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            '{"data":\n [{"text": "a"}]}',
            "holds one JSON object over several lines; it must hold a list of objects, or one object a line",
        ),
        ('"text"', "holds a JSON value; it must hold a list of objects, or one object a line"),
        ('{"text": "a"}\n[1]', "a.json:2: a JSON list, not an object"),
        ('{"text": "a"}\n{"text": ', "a.json:2: invalid JSON"),
        ('[{"text": "a"}', "a.json: invalid JSON"),
    ],
)
def test_other_json_is_refused_in_one_line(content, reason, tmp_path):
    with pytest.raises(UserError, match=reason) as error:
        prepare(str(write(tmp_path / "a.json", content)), tmp_path / "out")
    assert "\n" not in str(error.value)


@settings(max_examples=30, deadline=None)
@given(
    records=st.lists(st.dictionaries(st.sampled_from("ab"), st.text(), max_size=2), min_size=1, max_size=4),
    indent=st.sampled_from([None, 1]),
)
def test_a_list_and_lines_give_the_same_objects(records, indent, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    listed = write(folder / "list.json", json.dumps(records, indent=indent))
    lines = write(folder / "lines.json", "".join(json.dumps(record) + "\n" for record in records))
    for file in (listed, lines):
        assert [json.loads(item.payload) for item in Files([file])] == records


# --- patterns and links


def test_patterns_reach_into_directories(tmp_path):
    for name in ("a/x.txt", "b/y.txt", "b/c/z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")

    def names(pattern):
        return [str(file.relative_to(tmp_path)) for file in expand(str(tmp_path / pattern), dialogues=False)]

    assert names("*/*.txt") == ["a/x.txt", "b/y.txt"]
    assert names("**/*.txt") == ["a/x.txt", "b/c/z.txt", "b/y.txt"]
    assert names("[b]/**/?.txt") == ["b/c/z.txt", "b/y.txt"]
    (tmp_path / "[b].txt").write_text("a name with the characters of a pattern")
    assert names("[b].txt") == ["[b].txt"]


@pytest.mark.parametrize("spec", ["*.txt", "", "b.txt"], ids=["pattern", "directory", "file"])
def test_a_link_that_leads_nowhere_is_named(spec, tmp_path):
    (tmp_path / "a.txt").write_text("text\n" * 99)
    (tmp_path / "b.txt").symlink_to("moved.txt")
    with pytest.raises(UserError, match=r"b\.txt' is a link to 'moved\.txt', which is not there"):
        prepare(str(tmp_path / spec), tmp_path / "out")
    (tmp_path / "moved.txt").write_text("more text\n")
    assert prepare(str(tmp_path / "?.txt"), tmp_path / "out").splits["train"].documents == 2


# --- what is no file of documents


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.gz", "a.json.gz"])
def test_pointers_of_git_lfs_are_named_as_such(name, tmp_path):
    (tmp_path / name).write_text(POINTER)
    read = prepare_dialogues if ".json" in name else prepare
    with pytest.raises(UserError, match=r"is a Git LFS pointer, not the file; fetch it with `git lfs pull`"):
        read(str(tmp_path / name), tmp_path / "out")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("spec", ["", "*"], ids=["directory", "pattern"])
def test_pipes_and_devices_are_not_opened(name, spec, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match="is a pipe; only files are read here"):
        prepare(str(folder / spec), tmp_path / "out")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is a device; only files are read here"):
        prepare(str(folder / spec), tmp_path / "out")


# --- bounds


def bomb(path, megabytes, block):
    """Write a packed file that repeats `block` up to that size, without holding it."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    with path.open("wb") as file:
        for _ in range(megabytes):
            file.write(packer.compress(block * ((1 << 20) // len(block))))
        file.write(packer.flush())
    return path


@pytest.mark.parametrize(
    "name", ["bomb.txt.gz", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bomb.jsonl.gz", "bomb.json.gz"))]
)
@pytest.mark.parametrize("block", [b"\0", b" " * 63 + b"\n", b"[" * 64], ids=["no line", "lines", "brackets"])
def test_what_unpacks_to_far_more_than_text_is_refused_before_it_is_held(name, block, tmp_path, monkeypatch):
    """Repetition packs 300 to 1000 times, and where the bound is reached does not depend on what would follow."""
    monkeypatch.setattr(reading, "UNPACKED_BYTES", 1 << 24)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1 << 20)
    path = bomb(tmp_path / name, 40, block)
    assert path.stat().st_size < (40 << 20) / 300
    read = 0
    with pytest.raises(UserError, match="unpacks to more than 200 times its size, which no text does") as error:
        for item in Files([path]):
            read += len(item.payload)
    assert "\n" not in str(error.value)
    # The packed bytes are counted as they are read, and Python 3.12 reads more of them ahead.
    ahead = reading.UNPACKED_RATIO * getattr(gzip, "READ_BUFFER_SIZE", io.DEFAULT_BUFFER_SIZE)
    assert read <= max(reading.UNPACKED_BYTES, ahead) + reading.BLOCK_BYTES


def test_small_repetitive_files_and_large_texts_are_read(tmp_path, monkeypatch):
    repeated = write(tmp_path / "a.txt.gz", b"again " * 10**6)  # 6 MB, 1000 times its size
    (item,) = Files([repeated])
    assert len(item.payload) == 6 * 10**6
    monkeypatch.setattr(reading, "UNPACKED_BYTES", 1 << 16)
    letters = np.random.default_rng(0).choice(np.frombuffer(b"etaoin shrdlu\n", np.uint8), 1 << 18).tobytes()
    assert b"".join(item.payload for item in Files([write(tmp_path / "b.jsonl.gz", letters)])) == letters


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_document_has_a_limit(name, tmp_path, monkeypatch):
    """A sparse file of 1 TB takes no room on the disk, and is not read beyond the limit."""
    monkeypatch.setattr(reading, "DOCUMENT_BYTES", 1 << 22)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 1 << 20)
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="has a document or list of more than .* GiB; split it") as error:
        list(Files([tmp_path / name]))
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KB


def test_lines_longer_than_a_block_stay_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 10)
    lines = [b"x" * n + b"\n" for n in (0, 8, 9, 10, 11, 19, 20, 35)] + [b"end"]
    path = write(tmp_path / "a.jsonl", b"".join(lines))
    assert [item.payload for item in Files([path])] == lines


def test_a_bucket_is_asked_about_several_files_at_a_time():
    """Each call waits for the other."""
    barrier = threading.Barrier(2)
    assert text_files._map_files(lambda path: barrier.wait(30) >= 0, ["gs://b/1", "gs://b/2"]) == [True, True]
    assert text_files._map_files(lambda path, size: (path, size), ["a", "b"], [1, 2]) == [("a", 1), ("b", 2)]
