"""Requests: the same one reuses a dataset, another is refused, and so are unusable settings."""

import gzip
import json
import os
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.datasets import LENGTH, WideTokenizer, prepare, write_jsonl
from support.dialogues import prepare_dialogues, write_dialogues

from diffusionlm.data import encode, identity
from diffusionlm.data import prepare as prepare_lib
from diffusionlm.data.pipeline import open_dataset
from diffusionlm.data.request import changed_source
from diffusionlm.errors import UserError


def test_the_same_request_reuses_and_another_refuses(jsonl, texts, tmp_path, capfd):
    metadata = prepare(jsonl, tmp_path / "out")
    written = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    request = {"tokenizer": "byte", "sequence_length": LENGTH, "validation_fraction": 0}
    assert prepare_lib.prepare(jsonl, tmp_path / "out", **request) == metadata
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == written
    assert "already holds this dataset" in capfd.readouterr().err
    with pytest.raises(UserError, match="another dataset .sequence_length=15, not 20"):
        prepare(jsonl, tmp_path / "out", sequence_length=20)
    with pytest.raises(UserError, match="another dataset .held_out=0.0, not 0.5"):
        prepare(jsonl, tmp_path / "out", validation_fraction=0.5)
    write_jsonl(Path(jsonl), texts[:-1])
    with pytest.raises(UserError, match="another dataset .sources: made of corpus.jsonl"):
        prepare(jsonl, tmp_path / "out")
    with pytest.raises(UserError, match="cannot be reused"):
        prepare(jsonl, tmp_path)


def test_an_empty_directory_may_be_the_output(jsonl, tmp_path):
    (tmp_path / "out").mkdir()
    assert prepare(jsonl, tmp_path / "out").splits["train"].records == open_dataset(tmp_path / "out").size("train")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"workers": 0}, "workers=0"),
        ({"on_error": "ignore"}, "on_error='ignore' must be 'stop' or 'skip'"),
        ({"tokenizer": "bytes"}, "unknown tokenizer 'bytes'"),
        ({"tokenizer": "sentencepiece"}, "needs vocab_size"),
        ({"vocab_size": 300}, "vocab_size=300 is for tokenizer=sentencepiece only"),
        ({"tokenizer": "sentencepiece", "vocab_size": 10**6}, "use at most"),
        ({"validation_fraction": 1.5}, r"validation_fraction=1.5 must lie in \[0, 1\)"),
        ({"validation": "x.jsonl", "validation_fraction": 0.1}, "exclude each other"),
        ({"validation": "absent.jsonl"}, "no such file, .*absent.jsonl"),
        ({"sequence_length": 10**6}, "split 'train' has .* too few for one record of 1000001"),
        ({"validation_fraction": 1e-9}, "split 'validation' has 0 tokens"),
        ({"text_field": "txt"}, "no field 'txt' among 'text', 'id' .*--text_field text"),
    ],
)
def test_refuses_settings(settings, message, jsonl, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        prepare(jsonl, tmp_path / "out", **settings)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_tokenizer_without_eos_is_refused(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(WideTokenizer, "eos_id", None)
    with pytest.raises(UserError, match="no EOS"):
        prepare(jsonl, tmp_path / "out", tokenizer=WideTokenizer())


def test_a_dataset_of_texts_is_not_taken_for_one_of_dialogues(tmp_path):
    source = write_dialogues(tmp_path / "d.jsonl", [{"text": "word " * 40, "prompt": "2+2?", "response": "4"}] * 5)
    prepare_dialogues(source, tmp_path / "text", format="text")
    prepare_dialogues(source, tmp_path / "sft", ignore_fields=["text"])
    with pytest.raises(UserError, match="another dataset .format=None, not 'sft'"):
        prepare_dialogues(source, tmp_path / "text", ignore_fields=["text"])
    with pytest.raises(UserError, match="another dataset .*format='sft', not None"):
        prepare_dialogues(source, tmp_path / "sft", format="text")


# --- identity of sources


def _edit(path: Path) -> None:
    """Change a letter of a file in place, and keep its name, its size and the time of its content."""
    status, content = path.stat(), path.read_bytes()
    packed = path.suffix == ".gz"
    text = gzip.decompress(content) if packed else content
    edited = text.replace(b"word", b"Word", 1)
    assert edited != text
    # Without compression, packed sizes are equal too.
    path.write_bytes(gzip.compress(edited, compresslevel=0, mtime=0) if packed else edited)
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("edited", ["train", "validation"])
@pytest.mark.parametrize("settled", [False, True], ids=["just written", "settled"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "json", "sft"])
def test_an_edit_of_equal_length_is_another_dataset(kind, settled, edited, tmp_path, monkeypatch):
    """Neither the name, the size nor the time of a file says what it holds; nor does its stamp, after an edit."""
    if settled:
        monkeypatch.setattr(identity, "SETTLED_SECONDS", -1.0)
    name = "data.jsonl" if kind == "sft" else f"data.{kind}"
    sources = [tmp_path / split / name for split in ("train", "validation")]
    for source in sources:
        source.parent.mkdir()
        record = {"prompt": "word", "response": "word"} if kind == "sft" else {"text": "word " * 20}
        lines = (json.dumps(record) + "\n") * 9
        content = "word " * 90 if kind == "txt" else json.dumps([record] * 9) if kind == "json" else lines
        source.write_bytes(
            gzip.compress(content.encode(), compresslevel=0, mtime=0) if kind.endswith("gz") else content.encode()
        )
    train, validation = map(str, sources)
    settings = {"validation": validation, "validation_fraction": None, "format": "sft" if kind == "sft" else "text"}
    settings |= {"sequence_length": 60}
    metadata = prepare(train, tmp_path / "out", **settings)
    assert prepare(train, tmp_path / "out", **settings) == metadata
    _edit(tmp_path / edited / name)
    with pytest.raises(UserError, match=rf"holds another dataset \(sources: made of {re.escape(name)} of ") as error:
        prepare(train, tmp_path / "out", **settings)
    assert "\n" not in str(error.value)


def test_the_end_of_a_single_text_is_identified_by_content(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("a word of a line\n" * 100)
    metadata = prepare(str(book), tmp_path / "out", validation_fraction=0.1)
    assert prepare(str(book), tmp_path / "out", validation_fraction=0.1) == metadata
    _edit(book)
    with pytest.raises(UserError, match="another dataset .sources: made of book.txt"):
        prepare(str(book), tmp_path / "out", validation_fraction=0.1)


def test_a_copy_under_another_name_is_the_same_dataset(jsonl, tmp_path):
    metadata = prepare(jsonl, tmp_path / "out")
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(jsonl).read_bytes())
    assert prepare(str(copy), tmp_path / "out") == metadata
    copy.rename(tmp_path / "copy.txt")  # is one document
    with pytest.raises(UserError, match="another dataset"):
        prepare(str(tmp_path / "copy.txt"), tmp_path / "out")


def test_a_file_that_was_not_touched_is_not_read_again(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "SETTLED_SECONDS", -1.0)
    metadata = prepare(jsonl, tmp_path / "out")
    monkeypatch.setattr(identity, "digest", lambda path: pytest.fail(f"{path} is read"))
    assert prepare(jsonl, tmp_path / "out") == metadata


def test_datasets_of_before_stay_readable_and_say_that_their_text_is_unknown(jsonl, tmp_path):
    """Formerly a source was described by [name, size] of its files."""
    metadata = prepare(jsonl, tmp_path / "out")
    file = tmp_path / "out" / "meta.json"
    values = json.loads(file.read_text())
    for name in ("checksum", "files"):
        values.pop(name, None)
    values["request"]["sources"] = {"train": [["corpus.jsonl", os.path.getsize(jsonl)]]}
    file.write_text(json.dumps(values))
    assert open_dataset(tmp_path / "out").metadata.sha256 == metadata.sha256
    with pytest.raises(UserError, match="did not compare their content.*--data.path"):
        prepare(jsonl, tmp_path / "out")
    values["request"]["sources"] = {"train": [["corpus.jsonl", 1]]}
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="holds another dataset .sources: made of"):
        prepare(jsonl, tmp_path / "out")


def test_a_file_that_changes_while_it_is_read_is_refused(jsonl, tmp_path, monkeypatch):
    encode_item = encode._encode_item

    def touched(*args):
        os.utime(jsonl, ns=(0, 0))
        return encode_item(*args)

    monkeypatch.setattr(encode, "_encode_item", touched)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(jsonl, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_change_of_the_source_of_a_dataset_is_named(jsonl, tmp_path):
    metadata = prepare(jsonl, tmp_path / "out")
    assert changed_source(metadata, jsonl) is None
    before: Any = types.SimpleNamespace(request={"sources": {"train": [["corpus.jsonl", 3]]}}, template=None)
    assert changed_source(before, jsonl) is None
    write_jsonl(Path(jsonl), ["word"])
    assert re.fullmatch(r"corpus.jsonl of .*, not of corpus.jsonl of 26 bytes, .*", changed_source(metadata, jsonl))
    Path(jsonl).unlink()
    assert changed_source(metadata, jsonl) is None


def test_numbers_of_numpy_are_taken_and_truth_values_are_not(jsonl, tmp_path):
    plain = {"tokenizer": "sentencepiece", "vocab_size": 330, "sequence_length": 15, "validation_fraction": 0.5}
    numpy = {"vocab_size": np.int32(330), "sequence_length": np.int64(15), "validation_fraction": np.float32(0.5)}
    metadata = prepare(jsonl, tmp_path / "out", **plain)
    assert prepare(jsonl, tmp_path / "out", **{**plain, **numpy, "workers": np.uint8(1)}) == metadata
    assert prepare(jsonl, tmp_path / "numpy", **{**plain, **numpy}) == metadata
    for name in ("vocab_size", "sequence_length", "validation_fraction", "workers"):
        for value in (True, np.True_, "3", np.nan):
            with pytest.raises(UserError, match=f"{name}=.* must be (an integer|a finite number)"):
                prepare(jsonl, tmp_path / "other", **{**plain, name: value})
