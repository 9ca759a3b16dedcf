"""Exporting: what readers of the files get, and what a format cannot express."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from support.foreign_weights import D, L, V, flat_params

import diffusionlm as dlm
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.errors import UserError


def test_an_appended_mask_row_grows_the_vocabulary_of_the_export(native, tmp_path):
    (first, second) = dlm.export_weights(native(), tmp_path / "out", "llama", dtype="bfloat16")
    assert "row 40 of 41" in first and "both directions" in second and "predicts token i, not i + 1" in second
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["vocab_size"], fields["mask_token_id"], fields["torch_dtype"]) == (V + 1, V, "bfloat16")
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    params = flat_params(native())
    assert (written["model.embed_tokens.weight"] == params["embed"][: V + 1].astype(ml_dtypes.bfloat16)).all()
    assert written["lm_head.weight"].shape == (V + 1, D)


@pytest.mark.slow
def test_an_export_has_adapters_merged_into_its_weights(native, tmp_path):
    path, rng = native(lora_rank=2), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape, np.float32), checkpoint.load_params(path)
    )
    sidecar = checkpoint.load_sidecar(path)
    checkpoint.save_params(tmp_path / "tuned", params, sidecar)
    dlm.export_weights(tmp_path / "tuned", tmp_path / "out", "llada")
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    blocks = {name: np.asarray(leaf, np.float64) for name, leaf in params["blocks"].items() if name[-4:] != "norm"}
    for i in range(L):
        up = blocks["up"][i] + 2 * blocks["up_lora_down"][i] @ blocks["up_lora_up"][i]
        weight = written[f"model.transformer.blocks.{i}.up_proj.weight"]
        np.testing.assert_allclose(weight, up.T, rtol=0, atol=1e-6)


def test_values_beyond_float16_are_refused(native, tmp_path):
    params = dict(checkpoint.load_params(native()))
    params["embed"] = np.array(params["embed"])
    params["embed"][3, 4] = 1e5
    checkpoint.save_params(tmp_path / "large", params, checkpoint.load_sidecar(native()))
    with pytest.raises(UserError, match="model.embed_tokens.weight has a value of 100000; use bfloat16"):
        dlm.export_weights(tmp_path / "large", tmp_path / "out", "llama", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        ("llama", {"positions": "learned"}, "format=llama: this format has positions='rope', and the model"),
        ("gpt2", {}, "format=gpt2: this format has norm='layernorm'"),
        ("llada", {"head_dim": 8}, "no field for head_dim=8, and means 4"),
        ("llada", {"causal": True}, "the model is autoregressive"),
        ("smdm", {"d_ff": 32}, "2 layers of width 16 and MLP width 32 are not a size of SMDM's ladder"),
        (
            "llada",
            {"alignment": "shifted"},
            "predicts token i in it, and token i . 1 in .* fit are dream, .*diffullama",
        ),
        ("diffullama", {}, "predicts token i . 1 in it, and token i in this model; formats that fit are llada, smdm"),
        ("qwen", {}, "format='qwen' must be one of gpt2, .*qwen2, qwen3"),
    ],
)
def test_a_format_that_cannot_express_a_model_is_refused(format, changes, message, native, tmp_path):
    path = native(**changes)
    with pytest.raises(UserError, match=message):
        dlm.export_weights(path, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_a_flipped_bit_is_not_exported(imported, tmp_path):
    """The import is not compressed, so the bytes of an array can be looked up."""
    shutil.copytree(imported("llada"), tmp_path / "model")
    data = max(flat_params(tmp_path / "model").values(), key=lambda array: array.nbytes).tobytes()
    file = next(file for file in tmp_path.glob("model/params/ocdbt.process_0/d/*") if data in file.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.index(data) + len(data) // 2] ^= 8
    file.write_bytes(content)
    with pytest.raises(UserError, match="model, a file of params/ is damaged or missing .the array .* differs"):
        dlm.export_weights(tmp_path / "model", tmp_path / "out", "llada")
    assert not (tmp_path / "out").exists()
