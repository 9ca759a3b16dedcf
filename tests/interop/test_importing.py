"""Importing: logits against transformers and against descriptions of the sources; files and their variants."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from support import source_forward
from support.foreign_weights import (
    CONFIGS,
    LLAMA,
    D,
    F,
    H,
    V,
    bit_equal,
    flat_params,
    logits,
    make_source,
    random_tensors,
    write_source,
)
from support.slow_cases import slow_but

import diffusionlm as dlm
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import MeshConfig
from diffusionlm.errors import UserError
from diffusionlm.parallel.mesh import make_mesh

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"


@pytest.mark.parametrize("name", slow_but(["gpt2", "llama", "qwen2", "qwen3"], ("gpt2", "qwen3")))
def test_logits_are_those_of_transformers(name, tmp_path):
    golden = np.load(PARITY / name / "golden.npz")
    dlm.import_weights(PARITY / name, tmp_path / "model")
    actual = logits(tmp_path / "model", golden["ids"])
    assert golden["logits"].std() > 0.5
    assert np.abs(actual - golden["logits"]).max() < 1e-4


FORWARD = {
    "llada": lambda t, ids: source_forward.llada(t, ids, H, 5e5, 1e-5),
    "smdm": lambda t, ids: source_forward.smdm(t, ids, H, causal=False),
    "dream": lambda t, ids: source_forward.dream(t, ids, H, 500.0, 1e-6),
    "diffugpt": lambda t, ids: source_forward.diffugpt(t, ids, H),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FORWARD)
def test_logits_are_those_of_the_description(family, imported):
    ids = np.random.default_rng(1).integers(0, V, 11)
    wide = {name: tensor.astype(np.float64) for name, tensor in random_tensors(family).items()}
    actual = logits(imported(family), ids[None])[0]
    assert np.abs(actual - FORWARD[family](wide, ids)).max() < 1e-4


def test_autoregressive_models_of_smdm_are_recognised_by_their_rows(tmp_path):
    tensors = random_tensors("smdm")
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:V].copy()
    source = write_source(tmp_path / "source", None, tensors)
    dlm.import_weights(source / "model.safetensors", tmp_path / "model", "smdm")
    sidecar = checkpoint.load_sidecar(tmp_path / "model")
    assert (sidecar.objective, sidecar.alignment, sidecar.mask_id) == ("arm", "shifted", None)
    ids = np.random.default_rng(1).integers(0, V, 11)
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    actual = logits(tmp_path / "model", ids[None])[0]
    assert np.abs(actual - source_forward.smdm(wide, ids, H, causal=True)).max() < 1e-4


def test_tensors_may_be_sharded_and_lack_their_prefix(imported, tmp_path):
    tensors = random_tensors("gpt2")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32), "h.1.attn.masked_bias": np.ones((), np.float32)}
    source = tmp_path / "parts"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIGS["gpt2"]))
    names = sorted(bare)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        safetensors.numpy.save_file({name: bare[name] for name in part}, source / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    dlm.import_weights(source, tmp_path / "two")
    assert bit_equal(flat_params(imported("gpt2")), flat_params(tmp_path / "two"))


@pytest.mark.parametrize("stored", [["embedding"], ["head"], ["embedding", "head"]])
def test_a_tied_head_is_recognised_by_either_name(stored, tmp_path):
    tensors = random_tensors("llama")
    table = tensors.pop("lm_head.weight")
    names = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}
    del tensors["model.embed_tokens.weight"]
    tensors |= {names[end]: table for end in stored}
    source = write_source(tmp_path / "source", LLAMA | {"tie_word_embeddings": True}, tensors)
    dlm.import_weights(source, tmp_path / "model")
    params = flat_params(tmp_path / "model")
    assert "head" not in params and params["embed"][:V].tobytes() == table.tobytes()
    assert not params["embed"][V:].any()
    if len(stored) == 2:
        tensors["lm_head.weight"] = table + 1
        write_source(source, None, tensors)
        with pytest.raises(UserError, match="is tied, and its lm_head.weight differs"):
            dlm.import_weights(source, tmp_path / "other")


def test_illada_shares_one_table_between_input_and_output(tmp_path):
    """iLLaDA (arXiv 2606.25331) has LLaDA's tensors without the head, fewer heads for keys, and masks of id 5."""
    tensors = random_tensors("llada")
    head = tensors.pop("model.transformer.ff_out.weight")
    tensors["model.transformer.wte.weight"] = head
    source = write_source(tmp_path / "source", CONFIGS["llada"] | {"weight_tying": True}, tensors)
    dlm.import_weights(source, tmp_path / "model")
    sidecar = checkpoint.load_sidecar(tmp_path / "model")
    assert (sidecar.objective, sidecar.alignment, sidecar.mask_id) == ("mdm", "same", 5)
    assert "head" not in flat_params(tmp_path / "model")
    ids = np.random.default_rng(1).integers(0, V, 11)
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    expected = FORWARD["llada"](wide | {"model.transformer.ff_out.weight": wide["model.transformer.wte.weight"]}, ids)
    assert np.abs(logits(tmp_path / "model", ids[None])[0] - expected).max() < 1e-4
    dlm.export_weights(tmp_path / "model", tmp_path / "back", "llada")
    exported = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert bit_equal(exported, tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["weight_tying"] is True


@pytest.mark.slow
def test_a_mesh_gives_the_same_checkpoint(imported, tmp_path):
    source = make_source("llada", tmp_path / "source")
    dlm.import_weights(source, tmp_path / "two", mesh=make_mesh(MeshConfig(fsdp=2, tensor=2, data=2)))
    assert bit_equal(flat_params(imported("llada")), flat_params(tmp_path / "two"))


def test_the_index_says_which_shard_a_tensor_is_in(tmp_path):
    source, tensors = make_source("llama", tmp_path / "source"), random_tensors("llama")
    (source / "model.safetensors").unlink()
    head = {"lm_head.weight": tensors["lm_head.weight"]}
    stale = {name: tensor + 1 if name in head else tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(head, source / "a.safetensors")
    safetensors.numpy.save_file(stale, source / "b.safetensors")
    names = {name: "a.safetensors" if name in head else "b.safetensors" for name in tensors}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    dlm.import_weights(source, tmp_path / "model")
    np.testing.assert_array_equal(flat_params(tmp_path / "model")["head"][:, :V], head["lm_head.weight"].T)


def test_layers_of_two_dtypes_of_16_bits_keep_their_values(tmp_path):
    name = "model.layers.{}.mlp.up_proj.weight"
    tensors = random_tensors("llama", np.float16)
    tensors[name.format(1)] = np.full((F, D), 1e30, ml_dtypes.bfloat16)
    dlm.import_weights(write_source(tmp_path / "source", LLAMA, tensors), tmp_path / "model")
    up = flat_params(tmp_path / "model")["blocks/up"]
    assert up.dtype == np.float32
    np.testing.assert_array_equal(up[0], tensors[name.format(0)].T.astype(np.float32))
    np.testing.assert_array_equal(up[1], tensors[name.format(1)].T.astype(np.float32))


def test_an_output_that_exists_is_refused_and_kept(imported, tmp_path):
    source = make_source("llama", tmp_path / "source")
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists; delete it or choose another"):
        dlm.import_weights(source, tmp_path / "model")
    with pytest.raises(UserError, match="family='lama' must be one of gpt2, llama, "):
        dlm.import_weights(source, tmp_path / "new", "lama")
    with pytest.raises(UserError, match="exists; delete it or choose another"):
        dlm.export_weights(imported("llama"), tmp_path / "model", "llama")
    assert list((tmp_path / "model").iterdir()) == []
