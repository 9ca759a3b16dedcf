"""Preparing with the tokenizer of a checkpoint, as `diffusionlm.prepare` and the command line do."""

import base64
import inspect
from pathlib import Path

import pytest
from support import stub_hub
from support.dialogues import write_dialogues

import diffusionlm
from diffusionlm import hub
from diffusionlm.checkpoint import store
from diffusionlm.cli import main as cli
from diffusionlm.data import prepare as data_prepare
from diffusionlm.data import tokenizers
from diffusionlm.errors import UserError
from diffusionlm.training import prepare as training_prepare

MODEL = Path(__file__).parents[2] / "docs/results/models/tinystories"
SETTINGS = {"sequence_length": 80, "validation_fraction": 0, "progress": False}


@pytest.fixture
def source(tmp_path):
    return str(write_dialogues(tmp_path / "d.jsonl", [{"text": "word " * 200}] * 3))


def test_the_public_function_has_the_parameters_of_preparing():
    assert diffusionlm.prepare is training_prepare.prepare
    assert inspect.signature(diffusionlm.prepare) == inspect.signature(data_prepare.prepare)


@pytest.mark.parametrize("format", ["text", "sft"])
def test_a_checkpoint_gives_its_tokenizer_by_name_or_path(format, source, tmp_path):
    if format == "sft":
        source = str(write_dialogues(tmp_path / "dialogues.jsonl", [{"prompt": "2+2?", "response": "4"}] * 3))
    by_name = training_prepare.prepare(source, tmp_path / "name", tokenizer=str(MODEL), format=format, **SETTINGS)
    by_path = training_prepare.prepare(source, tmp_path / "path", tokenizer=MODEL, format=format, **SETTINGS)
    sidecar = store.load_sidecar(MODEL)
    assert by_path.sha256 == by_name.sha256 and by_name.tokenizer == sidecar.tokenizer
    assert training_prepare.named_tokenizer(str(MODEL)).sha256 == sidecar.tokenizer["sha256"]


def test_other_names_are_those_of_tokenizers(source, tmp_path):
    assert training_prepare.named_tokenizer("byte").sha256 == tokenizers.load("byte").sha256
    with pytest.raises(UserError, match="unknown tokenizer"):
        training_prepare.prepare(source, tmp_path / "out", tokenizer=tmp_path / "absent", **SETTINGS)
    with pytest.raises(UserError, match="no diffusionlm checkpoint") as error:
        training_prepare.prepare(source, tmp_path / "out", tokenizer=str(tmp_path), **SETTINGS)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_released_tokenizer_is_read_once(source, tmp_path, monkeypatch):
    released = tmp_path / "released"
    released.mkdir()
    (released / "tokenizer.model").write_bytes(base64.b64decode(store.load_sidecar(MODEL).tokenizer["model"]))
    read, load_directory = [], tokenizers.load_directory
    monkeypatch.setattr(tokenizers, "load_directory", lambda *args: read.append(args) or load_directory(*args))
    metadata = training_prepare.prepare(source, tmp_path / "out", tokenizer=released, **SETTINGS)
    assert metadata.tokenizer["kind"] == "sentencepiece" and len(read) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("sequence_length", 0), ("workers", 0), ("on_error", "shrug"), ("template", "plain"), ("format", "csv")],
)
def test_cheap_mistakes_are_reported_before_a_tokenizer_is_read(name, value, source, tmp_path):
    with pytest.raises(UserError, match=f"^{name}={value!r} "):  # an empty directory: no tokenizer could be read
        training_prepare.prepare(source, tmp_path / "out", tokenizer=tmp_path, **SETTINGS | {name: value})


@pytest.fixture
def stub(monkeypatch, tmp_path):
    return stub_hub.install(monkeypatch, tmp_path / "hub")


def test_a_checkpoint_on_the_hub_gives_its_tokenizer_without_its_parameters(source, tmp_path, stub):
    diffusionlm.push_to_hub(MODEL, "me/model")
    made = training_prepare.prepare(source, tmp_path / "named", tokenizer="hf://me/model", **SETTINGS)
    assert made.sha256 == training_prepare.prepare(source, tmp_path / "path", tokenizer=MODEL, **SETTINGS).sha256
    fetched = {path.name for path in (stub.root / "cache").glob("*/snapshots/*/*")}
    assert fetched == {"sidecar", "integrity"}
    assert training_prepare.named_tokenizer("hf://me/model").sha256 == made.tokenizer["sha256"]
    stub.offline = True  # what is there is no model
    with pytest.raises(UserError, match="is not on this disk whole"):
        diffusionlm.load("hf://me/model")
    stub.offline = False
    assert diffusionlm.load("hf://me/model").sidecar == store.load_sidecar(MODEL)


def test_a_damaged_checkpoint_on_the_hub_is_refused(source, tmp_path, stub):
    diffusionlm.push_to_hub(MODEL, "me/model")
    (sidecar,) = (stub.root / "server").rglob("sidecar/data.json")
    sidecar.write_text(sidecar.read_text().replace('"eos_id"', '"eos_di"'))
    with pytest.raises(UserError, match="sidecar/data.json.* is damaged"):
        training_prepare.prepare(source, tmp_path / "out", tokenizer="hf://me/model", **SETTINGS)


def test_a_repository_without_a_tokenizer_is_one_line(source, tmp_path, stub, capsys):
    (tmp_path / "none").mkdir()
    hub.push(tmp_path / "none", "me/none", private=False, message="x")
    words = ["data", "prepare", source, "--output", str(tmp_path / "out"), "--sequence_length", "80", "--tokenizer"]
    for address, part in (
        ("hf://me/absent", "there is no model hf://me/absent"),
        ("hf://me/none", "no tokenizer.json"),
    ):
        assert cli.main([*words, address]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("using hf://")]
        assert len(lines) == 1 and lines[0].startswith("diffusionlm: error: ") and part in lines[0]
    assert not (tmp_path / "out").exists()


def test_preparing_itself_knows_no_checkpoints(source, tmp_path):
    with pytest.raises(UserError, match="unknown tokenizer"):
        data_prepare.prepare(source, tmp_path / "out", tokenizer=MODEL, **SETTINGS)
