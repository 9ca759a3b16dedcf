"""A checkpoint that goes to the Hub and comes back is the same model; what comes is checked like any other."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from support import stub_hub
from support.tiny_checkpoint import save

import diffusionlm as dlm
from diffusionlm import hub
from diffusionlm.checkpoint import store
from diffusionlm.cli import main as cli
from diffusionlm.errors import UserError


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


@pytest.mark.slow
def test_the_commands_push_and_sample(model, stub, capsys):
    assert cli.main(["push", str(model), "me/model", "--license", "apache-2.0"]) == 0
    assert f"pushed: hf://me/model@{stub.commits['me/model'][0]}" in capsys.readouterr().out
    assert cli.main(["sample", "hf://me/model", "--length", "4", "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"].startswith("hf://me/model@")
    assert cli.main(["push", str(model), "model"]) == 2
    assert "write hf://OWNER/NAME" in capsys.readouterr().err
