"""The dataset of a run: prepared with the tokenizer of its start, and checked to fit."""

import base64
import json
import shutil
from pathlib import Path

import pytest
from etils import epath
from support import stub_hub, tiny_checkpoint, tiny_run
from support.fine_tuning import tuned
from support.tiny_run import refusal

import diffusionlm as dlm
from diffusionlm import fingerprint
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.data import pipeline, tokenizers
from diffusionlm.training import loop as trainer
from diffusionlm.training.dataset import open_or_prepare


@pytest.fixture(scope="module")
def dataset(fine_tuned):
    return fine_tuned.dataset


@pytest.fixture(scope="module")
def start(fine_tuned):
    return fine_tuned.start


def words_model(folder):
    """A SentencePiece model of its own."""
    trained = tokenizers.train_sentencepiece(["some words and others " * 9] * 20, 275)
    path = folder / "words.model"
    path.write_bytes(base64.b64decode(trained.to_dict()["model"]))
    return path


def sums(folder, *, tokenizer="sentencepiece", **run):
    """A run of one step that prepares its own data."""
    found = [{"question": f"{i}+{i}?", "answer": f"{2 * i}."} for i in range(400)]
    (folder / "sums.json").write_text(json.dumps(found))
    changes = {"path": "", "source": str(folder / "sums.json"), "tokenizer": tokenizer}
    return changes, {"steps": 1, "eval_every": 0} | run


@pytest.mark.slow
def test_the_tokenizer_of_the_start_prepares_the_data(dataset, start, tmp_path):
    """It is the default, another is refused before anything is prepared, and a begun run needs neither again."""
    gone = tmp_path / "gone"
    shutil.copytree(start[0], gone)
    data, run = sums(tmp_path, init_from=str(gone))
    cfg = tuned(dataset, data=data, run=run, optim={"warmup_steps": 0})
    other = tiny_run.with_changes(cfg, {"data": {"tokenizer": str(words_model(tmp_path))}})
    message = refusal(other, tmp_path / "wrong")
    assert "has another tokenizer" in message and message.endswith("leave --data.tokenizer out")
    bigger = tiny_run.with_changes(cfg, {"model": {"d_ff": 64}})
    assert "model.d_ff (32 there, 64 here)" in refusal(bigger, tmp_path / "wrong")
    assert not (tmp_path / "wrong" / "data").exists()
    for name, tokenizer in (("default", "sentencepiece"), ("named", str(gone))):
        ours = tiny_run.with_changes(cfg, {"data": {"tokenizer": tokenizer}})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer.Loop, "finish", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                trainer.train(ours, tmp_path / name)
        made = pipeline.open_dataset(tmp_path / name / "data").metadata
        assert made.tokenizer == pipeline.open_dataset(dataset).metadata.tokenizer
    asked = (tmp_path / "sums.json").read_text()
    (tmp_path / "sums.json").write_text(asked.replace("1+1?", "1+2?"))
    assert "sums.json changed after this run began: its data were made of" in refusal(cfg, tmp_path / "default")
    moved = tmp_path / "moved"
    gone.rename(moved)
    (tmp_path / "sums.json").unlink()
    assert trainer.train(cfg, tmp_path / "default").done
    assert trainer.train(tiny_run.with_changes(cfg, {"data": {"tokenizer": str(gone)}}), tmp_path / "named").done


@pytest.mark.slow
def test_the_start_is_read_once(dataset, start, tmp_path, monkeypatch):
    """It is looked up and read once, though the data are prepared with its tokenizer, and hashed again when loaded."""
    reads = {"find": 0, "load_sidecar": 0, "params_sha256": 0, "load_params": 0}

    def counting(name):
        original = getattr(checkpoint, name)

        def call(path, *args, **named):
            reads[name] += Path(path) == Path(start[0])
            return original(path, *args, **named)

        return call

    for name in reads:
        monkeypatch.setattr(checkpoint, name, counting(name))
    data, run = sums(tmp_path, init_from=str(start[0]))
    assert trainer.train(tuned(dataset, data=data, run=run, optim={"warmup_steps": 0}), tmp_path / "run").done
    # Every reader looks whether the checkpoint is whole.
    assert reads == {"find": 4, "load_sidecar": 1, "params_sha256": 2, "load_params": 1}


def test_a_tokenizer_of_the_hub_prepares_the_data_of_a_run(dataset, tmp_path, monkeypatch):
    stub = stub_hub.install(monkeypatch, tmp_path / "hub")
    dlm.push_to_hub(tiny_checkpoint.save(tmp_path / "model"), "me/model")
    data, run = sums(tmp_path, tokenizer="hf://me/model")
    opened = open_or_prepare(tuned(dataset, data=data, run=run), epath.Path(tmp_path / "run"))
    assert opened.metadata.tokenizer == tokenizers.load("byte").to_dict()
    assert not list((stub.root / "cache").rglob("params"))


def test_where_a_tokenizer_s_checkpoint_lies_is_not_science(dataset):
    def named(tokenizer):
        return fingerprint.fingerprint(tuned(dataset, data={"tokenizer": tokenizer}))

    assert named("runs/a") == named("/elsewhere/b") == named("hf://me/model") != named("byte")
    assert named("a/tokenizer.model") != named("b/tokenizer.model")


def test_what_cannot_be_prepared_is_told_in_options_of_train(dataset, start, tmp_path):
    data, run = sums(tmp_path, init_from=str(start[0]))
    short = tuned(dataset, data=data | {"sequence_length": 4}, run=run, optim={"warmup_steps": 0})
    message = refusal(short, tmp_path / "run")
    assert "answers end beyond 4 tokens" in message and "--data.path" in message


@pytest.mark.slow
def test_texts_and_dialogues_are_not_taken_for_each_other(dataset, tmp_path):
    texts = tiny_run.make_dataset(tmp_path)
    there = {"model": {"max_length": 16}, "data": {"path": str(texts), "sequence_length": 16}}
    assert "holds texts, which does not suit data.packing=examples" in refusal(
        tuned(dataset, **{**there, "data": there["data"] | {"packing": "examples"}}), tmp_path / "run"
    )
    message = refusal(tuned(dataset, data={"packing": "chunk"}), tmp_path / "run")
    assert "holds prompts with answers" in message and "--data.packing examples" in message
