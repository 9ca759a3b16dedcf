"""The sidecar: plain JSON that comes back as it was, and is refused where it is not understood."""

import json
import os
from pathlib import Path

import hypothesis
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st
from support import mutated_json
from support.checkpoints import (
    make_sidecar,
    refusal,
    save_run,
)
from support.slow_cases import thinned

from diffusionlm import config, config_io
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.errors import UserError


def test_sidecar_is_plain_json_and_round_trips(tmp_path):
    sidecar = make_sidecar(
        objective="mdm",
        pad_id=0,
        eos_id=2,
        suppressed_ids=(3, 5),
        tokenizer={"kind": "byte", "sha256": "ab"},
        canvas={"max_length": 128, "start_id": 2},
        source={"experiment": "demo", "fingerprint": "0123", "step": 4, "tokens": 512},
    )
    checkpoint.save_params(tmp_path / "model", {"embed": jnp.ones((4, 2))}, sidecar)
    assert checkpoint.load_sidecar(tmp_path / "model") == sidecar
    values = json.loads((tmp_path / "model" / "sidecar" / "data.json").read_text())
    assert (values["format"], values["version"], values["alignment"]) == ("diffusionlm", 3, "same")
    assert values["suppressed_ids"] == [3, 5] and values["model"]["d_model"] == 256 and values["bos_id"] is None


def test_a_chat_template_is_kept_as_data(tmp_path):
    """Whoever samples checks it: a reader of the sidecar needs to know nothing of templates."""
    template = {"version": 9, "anything": ["else"]}
    checkpoint.save_params(tmp_path / "model", {"embed": jnp.ones((4, 2))}, make_sidecar(template=template))
    assert checkpoint.load_sidecar(tmp_path / "model").template == template


@pytest.mark.parametrize("version, later", [(1, {"template", "end_ids"}), (2, {"end_ids"})])
def test_fields_that_came_later_are_unset_in_older_versions(version, later):
    sidecar = make_sidecar(eos_id=2)
    values = {name: value for name, value in sidecar.to_dict().items() if name not in later}
    assert Sidecar.from_dict(values | {"version": version}) == sidecar


def test_further_ends_of_a_text_are_kept():
    sidecar = make_sidecar(eos_id=2, end_ids=(5, 3))
    values = json.loads(json.dumps(sidecar.to_dict()))
    assert values["end_ids"] == [5, 3] and Sidecar.from_dict(values) == sidecar
    with pytest.raises(UserError, match=r"end_ids\[1\]=99999, which must lie in"):
        Sidecar.from_dict(values | {"end_ids": [5, 99999]})


@pytest.mark.parametrize(
    "change, reason",
    thinned(
        [
            ({"version": 4}, "it was written by a newer diffusionlm (version 4), and this one reads up to 3; upgrade"),
            ({"version": None}, "not of format 'diffusionlm'"),
            ({"format": "other"}, "not of format 'diffusionlm'"),
            ({"alignmnt": "same"}, "unknown field `alignmnt`; did you mean 'alignment'?"),
            ({"alignment": "mirrored"}, "alignment='mirrored'"),
            ({"objective": "gan"}, "objective='gan'"),
            ({"model": {"d_modell": 8}}, "unknown field 'd_modell' in ModelConfig; did you mean 'd_model'?"),
            ({"diffusion": {"sigma": 8}}, "unknown field 'sigma' in DiffusionConfig"),
            ({"model": None}, "model=None: Expected `object`, got `null`"),
        ],
        every=2,
    ),
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
    said = f"{path}, which says what the parameters of the checkpoint mean, is damaged ("
    assert refusal(checkpoint.load_sidecar, tmp_path).startswith(said)
    path.unlink()
    os.mkfifo(path)
    message = refusal(checkpoint.load_sidecar, tmp_path)
    assert message.startswith(f"{said}it is a pipe; ") and message.endswith("use another checkpoint, or a copy")


MODELS = Path(__file__).parents[2] / "docs" / "results" / "models"


def valid(kind):
    if kind in ("tinystories", "tinystories_arm"):  # of version 1
        values = json.loads((MODELS / kind / "sidecar" / "data.json").read_text())
        return values | {"tokenizer": {"kind": "byte", "sha256": "ab"}}
    cfg = config.ModelConfig(vocab_size=300, mask_row=kind == "mdm")
    inside = None if kind == "mdm" else 299
    return Sidecar(
        objective="mdm",
        model=config_io.to_dict(cfg),
        diffusion=config_io.to_dict(config.DiffusionConfig(mask_id=inside)),
        mask_id=300 if inside is None else inside,
        pad_id=256,
        eos_id=256,
        bos_id=None,
        suppressed_ids=() if inside is None else (inside,),
        tokenizer={"kind": "byte", "sha256": "ab"},
        canvas={"max_length": 2048, "start_id": 256},
        source={"experiment": "demo", "step": 4},
        template={"version": 1, "name": "plain", "turn": "{content}", "start_id": 256},
    ).to_dict()


KINDS = ["tinystories", "tinystories_arm", "mdm", "mask inside"]
# Settings that say how a model was trained, or that name a time; other values of the right type are other models.
LATER = {
    "lora_rank",
    "alignment",
    "anneal_steps",
    "arm_steps",
    "weighting",
    "cart_p",
    "remat",
    "head_chunk",
    "random_length_scope",
    "prompt_dropout",
}
LATER |= {"qk_norm", "sliding_window", "rope_scaling"}


def same_kind(old, new):
    """True if a value has the JSON type that the other has; an integer is a number too, and null is a missing id."""
    if type(old) is bool or type(new) is bool:
        return type(old) is type(new)
    return type(new) is type(old) or old is None or new is None or (type(old) is float and type(new) is int)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("mask inside", "tinystories_arm") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in KINDS
    ],
)
@hypothesis.settings(max_examples=500, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_a_sidecar_with_one_change_is_refused_in_a_line_or_makes_sense(kind, data):
    mutation = data.draw(mutated_json.mutations(valid(kind), exclude=("source",)))
    path, name = mutation.path, str(mutation.path[-1])
    try:
        sidecar = Sidecar.from_dict(mutation.values)
    except UserError as error:
        message = str(error)
        assert "\n" not in message and "\x1b" not in message and len(message) < 700
        return
    if path[0] in ("tokenizer", "template"):  # kept as data, but for what is read of them here
        return
    assert mutation.kind != "extra"
    later = name in LATER or isinstance(path[-1], int) or path[0] == "canvas" or "rope_scaling" in path
    assert mutation.kind != "missing" or later
    if mutation.kind == "value":
        assert same_kind(mutation.old, mutation.new) or mutation.old == mutation.new, (path, mutation.new)
    model, diffusion = (mutation.values[part] for part in ("model", "diffusion"))
    rows = model["vocab_size"] + model["mask_row"]
    ids = [sidecar.mask_id, sidecar.pad_id, sidecar.eos_id, sidecar.bos_id, sidecar.start_id, *sidecar.suppressed_ids]
    assert all(i is None or (type(i) is int and 0 <= i < rows) for i in ids)
    assert (sidecar.objective == "arm") == model["causal"]
    if sidecar.objective == "mdm":
        appended = model["vocab_size"] if model["mask_row"] else None
        assert sidecar.mask_id == (appended if diffusion["mask_id"] is None else diffusion["mask_id"]) is not None
        inside = sidecar.mask_id < model["vocab_size"]
        assert (sidecar.mask_id in sidecar.suppressed_ids) == (inside and diffusion["suppress_mask"])
        assert diffusion.get("alignment", sidecar.alignment) == sidecar.alignment
    assert 1 <= sidecar.canvas.get("max_length", 1) <= model["max_length"]


@pytest.mark.parametrize("kind", KINDS)
def test_valid_sidecars_come_back_as_they_were(kind):
    values = valid(kind)
    sidecar = Sidecar.from_dict(values)
    assert Sidecar.from_dict(json.loads(json.dumps(sidecar.to_dict()))) == sidecar
    assert {name: sidecar.to_dict()[name] for name in values if name != "version"} == {
        name: value for name, value in values.items() if name != "version"
    }


WRONG = {
    "a mask far beyond the rows": ({"mask_id": 10**6}, "mask_id=1000000"),
    "a negative mask": ({"mask_id": -1}, "mask_id=-1: Expected `int` >= 0"),
    "no mask": ({"mask_id": None}, "mask_id=None, and its model and diffusion settings 300"),
    "another row as the mask": ({"mask_id": 5}, "mask_id=5, and its model and diffusion settings 300"),
    "a row that only padding has": ({"eos_id": 301}, r"eos_id=301, which must lie in [0, 301)"),
    "an end far beyond the rows": ({"eos_id": 10**9}, "eos_id=1000000000"),
    "an end beyond 32 bits": ({"eos_id": 2**40}, "eos_id=1099511627776: Expected `int`"),
    "truth as an id": ({"pad_id": True}, "pad_id=True: Expected `int | null`, got `bool`"),
    "a fraction as an id": ({"bos_id": 1.0}, "bos_id=1.0: Expected `int | null`, got `float`"),
    "a suppressed padding row": ({"suppressed_ids": [300]}, "suppressed_ids[0]=300, which must lie in [0, 300)"),
    "an id twice": ({"suppressed_ids": [3, 3]}, "suppressed_ids=[3, 3], in which an id comes twice"),
    "the other objective": ({"objective": "arm"}, "objective='arm' and model.causal=False, which contradict"),
    "the other alignment": ({"alignment": "shifted"}, "diffusion.alignment='same', which contradict"),
    "a canvas beyond the positions": ({"canvas": {"max_length": 4096, "start_id": 2}}, "canvas.max_length=4096"),
    "a start without a row": ({"canvas": {"max_length": 64, "start_id": 301}}, "canvas.start_id=301"),
    "a template's start": ({"template": {"version": 1, "start_id": 999}}, "template.start_id=999"),
    "a tokenizer without a hash": ({"tokenizer": {"kind": "byte"}}, "tokenizer.sha256=None"),
    "a source of lists": ({"source": {"step": [1]}}, "source"),
    "a version of text": ({"version": "2"}, "not of format"),
    "version 0": ({"version": 0}, "not of format"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_sidecar_that_contradicts_itself_or_its_model_is_refused(name):
    change, reason = WRONG[name]
    assert reason in refusal(Sidecar.from_dict, valid("mdm") | change)


def test_settings_inside_are_checked_with_their_ranges():
    values = valid("mdm")
    for part, name, value in (
        ("model", "head_dim", 7),
        ("model", "n_kv_heads", 3),
        ("model", "norm_eps", -1.0),
        ("diffusion", "t_min", 1.5),
        ("diffusion", "mask_id", 7),
    ):
        assert name in refusal(Sidecar.from_dict, values | {part: values[part] | {name: value}})
    del values["model"]["norm_eps"]
    assert "lacks the field 'model.norm_eps'" in refusal(Sidecar.from_dict, values)


def test_a_template_that_was_removed_is_missed():
    values = valid("mdm")
    del values["template"]
    assert "lacks the field 'template'" in refusal(Sidecar.from_dict, values)


def test_a_field_that_comes_twice_is_refused(tmp_path):
    save_run(tmp_path, 1)
    path = tmp_path / "checkpoints" / "1" / "sidecar" / "data.json"
    path.write_text(path.read_text().replace('"mask_id"', '"mask_id": 3, "mask_id"', 1))
    assert "'mask_id' comes twice" in refusal(checkpoint.load_sidecar, tmp_path)
