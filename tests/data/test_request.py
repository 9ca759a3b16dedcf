"""Requests: the same one reuses a dataset, another is refused, and so are unusable settings."""

from pathlib import Path

import pytest
from support.datasets import LENGTH, WideTokenizer, prepare, write_jsonl
from support.dialogues import prepare_dialogues, write_dialogues

from diffusionlm.data import prepare as prepare_lib
from diffusionlm.data.pipeline import open_dataset
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
    with pytest.raises(UserError, match="another dataset .sources="):
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
        ({"validation": "absent.jsonl"}, "no such text.*absent.jsonl"),
        ({"sequence_length": 10**6}, "split 'train' has .* too few for one record of 1000001"),
        ({"validation_fraction": 1e-9}, "split 'validation' has 0 tokens"),
        ({"text_field": "txt"}, "no field 'txt'; did you mean 'text'"),
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
    prepare_dialogues(source, tmp_path / "sft")
    with pytest.raises(UserError, match="another dataset .format=None, not 'sft'"):
        prepare_dialogues(source, tmp_path / "text")
    with pytest.raises(UserError, match="another dataset .*format='sft', not None"):
        prepare_dialogues(source, tmp_path / "sft", format="text")
