"""Files of a run: seen whole or not at all, lines that survive a kill; in buckets, no renaming and no appending."""

import json
import math
import os
import sys

import pytest
from etils import epath

from diffusionlm import storage
from diffusionlm.errors import UserError


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / "lines.jsonl"


@pytest.fixture
def bucket(monkeypatch):
    """Let the disk stand in for a bucket: operations that a bucket lacks raise."""

    def refuse(*args, **kwargs):
        raise AssertionError("a bucket cannot do this")

    monkeypatch.setattr(storage, "in_bucket", lambda path: True)
    monkeypatch.setattr(type(epath.Path()), "replace", refuse)
    monkeypatch.setattr(type(epath.Path()), "rename", refuse)
    written = type(epath.Path()).open

    def opened(self, mode="r", *args, **kwargs):
        return refuse() if "a" in mode else written(self, mode, *args, **kwargs)

    monkeypatch.setattr(type(epath.Path()), "open", opened)


def test_paths_with_a_scheme_are_buckets():
    assert storage.in_bucket("gs://bucket/run") and storage.in_bucket(epath.Path("gs://bucket/run"))
    assert not storage.in_bucket("/disk/run") and not storage.in_bucket("run")


def test_a_bucket_without_its_client_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match="^cannot reach gs://bucket/run: .*install gcsfs"):
        storage.run_path("gs://bucket/run")


def test_a_file_where_a_directory_is_wanted_is_one_line(tmp_path):
    (tmp_path / "file").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    for path in ("", "new", "new/below"):
        storage.require_directory(tmp_path / path, "output")
    storage.require_directory("gs://bucket/file", "output")  # an object and what is below it can be in one bucket
    below = f"{tmp_path}/file is a file"
    for path, found in [("file", "it is a file"), ("pipe", "it is a pipe"), ("file/a/b", below)]:
        with pytest.raises(UserError) as error:
            storage.require_directory(epath.Path(tmp_path / path), "output")
        assert str(error.value) == f"output={tmp_path / path} must be a directory, and {found}; name another"


def test_a_write_is_seen_whole_or_not_at_all(path):
    storage.write_atomically(path, "first")
    with path.open() as reader:  # a reader keeps reading the old content while it is replaced
        storage.write_atomically(path, "second")
        assert reader.read() == "first"
    with pytest.raises(UnicodeEncodeError):  # fails in the middle of the write
        storage.write_atomically(path, "third" * 10000 + "\ud800")
    assert path.read_text() == "second"


def test_lines_continue_where_a_kill_cut_one_short(path):
    first = storage.JsonLines(path)
    first.write({"n": 1})
    first.write({"n": 2})
    assert storage.read_json_lines(path) == [{"n": 1}, {"n": 2}]  # each is there at once
    path.write_text(path.read_text()[:-4])
    again = storage.JsonLines(path)
    assert again.kept == [{"n": 1}]
    again.write({"n": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"n": 1}, {"n": 3}]


def test_in_a_bucket_objects_are_written_whole(path, bucket, monkeypatch):
    storage.write_atomically(path, '{"n": 1}\n')
    lines = storage.JsonLines(path, keep=lambda line: line["n"] < 5)
    lines.write({"n": 2})
    assert storage.read_json_lines(path) == [{"n": 1}]  # not yet: each write costs the whole object
    lines.flush()
    assert storage.read_json_lines(path) == [{"n": 1}, {"n": 2}]
    monkeypatch.setattr(storage.JsonLines, "REWRITE_SECONDS", 0.0)
    lines.write({"n": 3})
    assert storage.read_json_lines(path) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_numbers_that_are_not_finite_are_null_in_json_and_nan_again_when_read():
    text = storage.dump_numbers({"a": [1.0, float("-inf"), (float("inf"),)], "b": {"c": float("nan")}, "d": "nan"})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.0, None, [None]], "b": {"c": None}, "d": "nan"}
    values = storage.load_numbers(text)
    assert math.isnan(values["a"][1]) and math.isnan(values["a"][2][0]) and math.isnan(values["b"]["c"])
    assert values["a"][0] == 1.0 and values["d"] == "nan"
