"""The files of an export: all that the format's own readers need, and nothing that they would fill in differently."""

import dataclasses
import json

import pytest
import safetensors.numpy
from support.foreign_weights import CONFIGS, V, bit_equal, flat_params, random_tensors, write_source
from support.random_params import draw_params

import diffusionlm as dlm
from diffusionlm import config_io
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import ModelConfig
from diffusionlm.errors import UserError
from diffusionlm.interop.families import FAMILIES

WITH_CONFIG = [name for name in FAMILIES if CONFIGS[name] is not None]


def exported_fields(path, output, format):
    notes = dlm.export_weights(path, output, format)
    return json.loads((output / "config.json").read_text()), notes


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_CONFIG)
def test_an_export_has_every_field_whose_absence_means_another_value(family, imported, tmp_path):
    fields, _ = exported_fields(imported(family), tmp_path / "out", family)
    assert not set(FAMILIES[family].absent) - set(fields)
    for key, allowed in FAMILIES[family].supported.items():
        assert fields.get(key, allowed[0]) in allowed


def test_a_llada_is_trained_without_dropout_by_readers_of_its_export(imported, tmp_path):
    fields, notes = exported_fields(imported("llada"), tmp_path / "out", "llada")
    assert [fields[f"{part}_dropout"] for part in ("attention", "residual", "embedding")] == [0.0, 0.0, 0.0]
    expected = {
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rope": True,
        "weight_tying": False,
        "embedding_size": V,
        "vocab_size": V,
        "include_bias": False,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
    }
    assert {key: fields[key] for key in expected} == expected
    assert any("configuration_llada.py and modeling_llada.py of a released llada repository" in note for note in notes)


@pytest.mark.slow
def test_a_dream_has_what_its_own_code_loads(imported, native, tmp_path):
    fields, notes = exported_fields(imported("dream"), tmp_path / "out", "dream")
    assert fields["architectures"] == ["DreamModel"] and fields["model_type"] == "Dream"
    classes = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
    assert fields["auto_map"] == classes and "head_dim" not in fields
    ids = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "mask_token_id": 37}
    assert any("configuration_dream.py, modeling_dream.py and generation_utils.py" in note for note in notes)
    # Its code would make a row of padding at 151643 of a model that has no such row.
    without_pad = native("shifted", qkv_bias=True)
    fields, _ = exported_fields(without_pad, tmp_path / "native", "dream")
    assert fields["pad_token_id"] is None and fields["mask_token_id"] == V
    with pytest.raises(UserError, match="no field for head_dim=8, and means 4"):
        dlm.export_weights(native("shifted", qkv_bias=True, head_dim=8), tmp_path / "wide", "dream")


def test_an_autoregressive_model_of_smdm_survives_the_round_trip(tmp_path):
    tensors = random_tensors("smdm")
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:V].copy()
    source = write_source(tmp_path / "source", None, tensors)
    dlm.import_weights(source / "model.safetensors", tmp_path / "model", "smdm")
    dlm.export_weights(tmp_path / "model", tmp_path / "out", "smdm")
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(tensors) and all(written[n].tobytes() == tensors[n].tobytes() for n in tensors)
    dlm.import_weights(tmp_path / "out" / "model.safetensors", tmp_path / "again", "smdm")
    first, second = (checkpoint.load_sidecar(tmp_path / name) for name in ("model", "again"))
    assert dataclasses.replace(first, source={}) == dataclasses.replace(second, source={})
    assert bit_equal(flat_params(tmp_path / "model"), flat_params(tmp_path / "again"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_row": False}, "mean causal=True in it, and the model has False"),
        ({"n_heads": 2, "n_kv_heads": 2, "head_dim": 8}, "mean n_heads=4 in it, and the model has 2"),
        ({"norm_eps": 1e-3}, "mean norm_eps=1e-05 in it, and the model has 0.001"),
        ({"rope_theta": 5e5}, "mean rope_theta=10000.0 in it, and the model has 500000.0"),
    ],
)
def test_a_model_that_shapes_do_not_describe_is_not_written_as_smdm(changes, message, imported, tmp_path):
    sidecar = checkpoint.load_sidecar(imported("smdm"))
    cfg = dataclasses.replace(config_io.from_dict(ModelConfig, sidecar.model), **changes)
    if not cfg.mask_row:
        diffusion = {**sidecar.diffusion, "mask_id": 7}
        sidecar = dataclasses.replace(sidecar, mask_id=7, suppressed_ids=(7,), diffusion=diffusion)
    sidecar = dataclasses.replace(sidecar, model=config_io.to_dict(cfg))
    checkpoint.save_params(tmp_path / "model", draw_params(cfg), sidecar)
    with pytest.raises(UserError, match=message):
        dlm.export_weights(tmp_path / "model", tmp_path / "out", "smdm")
    assert not (tmp_path / "out").exists()
