"""The sidecar: plain JSON that comes back as it was, and is refused where it is not understood."""

import json

import jax.numpy as jnp
import pytest
from support.checkpoints import (
    make_sidecar,
    refusal,
    save_run,
)

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.checkpoint.sidecar import Sidecar


def test_sidecar_is_plain_json_and_round_trips(tmp_path):
    sidecar = make_sidecar(
        objective="mdm",
        pad_id=0,
        eos_id=2,
        suppressed_ids=(3, 5),
        tokenizer={"kind": "byte", "sha256": "ab"},
        canvas={"max_length": 128},
        source={"experiment": "demo", "fingerprint": "0123", "step": 4, "tokens": 512},
    )
    checkpoint.save_params(tmp_path / "model", {"embed": jnp.ones((4, 2))}, sidecar)
    assert checkpoint.load_sidecar(tmp_path / "model") == sidecar
    values = json.loads((tmp_path / "model" / "sidecar" / "data.json").read_text())
    assert (values["format"], values["version"], values["alignment"]) == ("diffusionlm", 2, "same")
    assert values["suppressed_ids"] == [3, 5] and values["model"]["d_model"] == 256 and values["bos_id"] is None


def test_a_chat_template_is_kept_as_data(tmp_path):
    """Whoever samples checks it: a reader of the sidecar needs to know nothing of templates."""
    template = {"version": 9, "anything": ["else"]}
    checkpoint.save_params(tmp_path / "model", {"embed": jnp.ones((4, 2))}, make_sidecar(template=template))
    assert checkpoint.load_sidecar(tmp_path / "model").template == template


def test_version_1_is_read_as_a_sidecar_without_a_template():
    sidecar = make_sidecar(eos_id=2)
    values = {name: value for name, value in sidecar.to_dict().items() if name != "template"}
    assert Sidecar.from_dict(values | {"version": 1}) == sidecar


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"version": 3}, "written by a newer diffusionlm (version 3); this one reads 2: upgrade"),
        ({"version": None}, "not of format 'diffusionlm'"),
        ({"format": "other"}, "not of format 'diffusionlm'"),
        ({"alignmnt": "same"}, "unknown field `alignmnt`; did you mean 'alignment'?"),
        ({"alignment": "mirrored"}, "alignment='mirrored'"),
        ({"objective": "gan"}, "objective='gan'"),
        ({"model": {"d_modell": 8}}, "unknown field 'd_modell' in ModelConfig; did you mean 'd_model'?"),
        ({"diffusion": {"sigma": 8}}, "unknown field 'sigma' in DiffusionConfig"),
        ({"model": None}, "model=None: Expected `object`, got `null`"),
    ],
)
def test_a_sidecar_that_is_not_understood_is_refused(tmp_path, change, reason):
    save_run(tmp_path, 1)
    path = tmp_path / "checkpoints" / "1" / "sidecar" / "data.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **change}))
    message = refusal(checkpoint.load_sidecar, tmp_path)
    assert reason in message and str(path.parent.parent) in message


def test_an_incomplete_sidecar_is_refused(tmp_path):
    save_run(tmp_path, 1)
    path = tmp_path / "checkpoints" / "1" / "sidecar" / "data.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in values.items() if name != "mask_id"}))
    assert "missing required field `mask_id`" in refusal(checkpoint.load_sidecar, tmp_path)
    path.write_text(json.dumps(values)[:50])
    assert str(path) in refusal(checkpoint.load_sidecar, tmp_path)
