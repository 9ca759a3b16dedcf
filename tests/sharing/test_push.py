"""A checkpoint that goes to the Hub and comes back is the same model; what comes is checked like any other."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from support import stub_hub
from support.tiny_checkpoint import save

import diffusionlm as dlm
from diffusionlm import hub
from diffusionlm.checkpoint import layout, store
from diffusionlm.cli import main as cli
from diffusionlm.errors import UserError

SHIPPED = Path(__file__).parents[2] / "docs/results/models/tinystories"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A params-only checkpoint."""
    return save(tmp_path_factory.mktemp("push") / "model")


@pytest.fixture
def stub(monkeypatch, tmp_path):
    return stub_hub.install(monkeypatch, tmp_path)


def test_a_model_comes_back_as_it_was(model, stub):
    address = dlm.push_to_hub(model, "me/model", private=True, license="apache-2.0")
    assert address == f"hf://me/model@{stub.commits['me/model'][0]}" and stub.private["me/model"]
    loaded, original = dlm.load("hf://me/model"), dlm.load(model)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, original.params)
    assert loaded.sidecar == original.sidecar
    assert loaded.location.to_json() == {"checkpoint": address, "passed_over": []}
    assert "README.md" in stub.files("me/model") and stub.downloads == 1


def test_of_a_step_only_the_parameters_are_pushed(model, stub, tmp_path):
    whole = tmp_path / "whole"
    store.save_params(whole, store.load_params(model), store.load_sidecar(model))
    (whole / "train").mkdir()
    (whole / "train" / "secret").write_text("the optimizer's")
    dlm.push_to_hub(whole, "me/step")
    assert not any(name.startswith("train") for name in stub.files("me/step"))
    jax.tree.map(np.testing.assert_array_equal, dlm.load("hf://me/step").params, dlm.load(model).params)


def test_other_files_beside_a_model_are_not_copied(model, stub, tmp_path, monkeypatch):
    """They stay where they are: not even the folder that is uploaded has them."""
    beside, uploaded = tmp_path / "beside", set()
    shutil.copytree(model, beside)
    (beside / "secret.env").write_text("TOKEN=1")
    (beside / "notes").mkdir()
    (beside / "notes" / "a").write_text("x")
    push = hub.push

    def seen(directory, *args, **settings):
        uploaded.update(path.name for path in directory.iterdir())
        return push(directory, *args, **settings)

    monkeypatch.setattr(hub, "push", seen)
    dlm.push_to_hub(beside, "me/beside")
    assert "params" in uploaded and not {"secret.env", "notes"} & uploaded
    assert not any(name.startswith(("secret", "notes")) for name in stub.files("me/beside"))
    jax.tree.map(np.testing.assert_array_equal, dlm.load("hf://me/beside").params, dlm.load(model).params)


STRAYS = ("params/secret.txt", "params/d/notes.txt", "params/notes/a", "sidecar/secret.json", "params/.hidden")


def test_files_inside_a_model_that_are_none_of_it_are_not_pushed(model, stub, tmp_path, capsys):
    inside = tmp_path / "inside"
    shutil.copytree(model, inside)
    for name in STRAYS:
        (inside / name).parent.mkdir(exist_ok=True)
        (inside / name).write_text("TOKEN=1")
    dlm.push_to_hub(model, "me/clean")
    assert "not pushed" not in capsys.readouterr().err
    dlm.push_to_hub(inside, "me/inside")
    assert stub.files("me/inside") == stub.files("me/clean") and not stub.files("me/inside") & set(STRAYS)
    assert store.params_sha256("hf://me/inside") == store.params_sha256(model)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("not pushed")]
    assert line.startswith("not pushed: params/d/notes.txt, params/notes/, params/secret.txt and 1 more, no part of")


def test_every_file_of_a_checkpoint_is_one_of_its_layout(model):
    for path in (model, SHIPPED):
        written = {file.relative_to(path).as_posix() for file in Path(path).rglob("*") if file.is_file()}
        assert layout.files(path) == (sorted(written), [])


def test_a_step_that_is_no_number_is_pushed_as_0(model, stub, tmp_path, monkeypatch):
    sidecar = dataclasses.replace(store.load_sidecar(model), source={"step": "abc"})
    store.save_params(tmp_path / "odd", store.load_params(model), sidecar)
    messages, push = [], hub.push

    def seen(*args, message, **settings):
        messages.append(message)
        return push(*args, message=message, **settings)

    monkeypatch.setattr(hub, "push", seen)
    dlm.push_to_hub(tmp_path / "odd", "me/odd")
    assert messages == ["diffusionlm: step 0"]


def test_a_damaged_model_of_the_hub_is_refused(model, stub):
    dlm.push_to_hub(model, "me/model")
    commit = stub.commits["me/model"][0]
    sidecar = stub.root / "server" / "me/model" / commit / "sidecar" / "data.json"
    values = json.loads(sidecar.read_text())
    values["model"]["d_modle"] = 3
    sidecar.write_text(json.dumps(values))
    with pytest.raises(UserError, match="d_modle"):
        dlm.load("hf://me/model")


def test_a_repository_without_a_model_is_one_line(stub, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    hub.push(tmp_path / "other", "me/other", private=False, message="x")
    stub.add("me/other", "model.safetensors", "x")
    assert cli.main(["sample", "hf://me/other"]) == 2
    message = capsys.readouterr().err
    assert "is not on this disk whole" in message and "or holds no diffusionlm checkpoint" in message


@pytest.mark.parametrize("part", ["params/manifest.ocdbt", "_CHECKPOINT_METADATA", "sidecar/data.json"])
def test_a_snapshot_that_lacks_a_part_is_one_line_without_a_network_and_is_completed_with_one(part, model, stub):
    dlm.push_to_hub(model, "me/model")
    snapshot = hub.fetch("hf://me/model")
    (snapshot.path / part).unlink()
    stub.offline = True
    with pytest.raises(UserError, match=r"is not on this disk whole \(connect, so that the rest is fetched\)") as error:
        dlm.load("hf://me/model")
    assert str(error.value).startswith(str(snapshot.address)) and "\n" not in str(error.value)
    stub.offline = False
    assert dlm.load("hf://me/model").location.address == snapshot.address


@pytest.mark.slow
def test_the_commands_push_and_sample(model, stub, capsys):
    assert cli.main(["push", str(model), "me/model", "--license", "apache-2.0"]) == 0
    assert f"pushed: hf://me/model@{stub.commits['me/model'][0]}" in capsys.readouterr().out
    assert cli.main(["sample", "hf://me/model", "--length", "4", "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"].startswith("hf://me/model@")
    assert cli.main(["push", str(model), "model"]) == 2
    assert "write hf://OWNER/NAME" in capsys.readouterr().err
