"""The sidecars of imported models."""

import json

import ml_dtypes
import numpy as np
import pytest
from support.foreign_weights import GPT2, LLAMA, D, V, make_source, random_tensors, tensor_shapes, write_source

import diffusionlm as dlm
from diffusionlm import config, config_io
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import DiffusionConfig, ModelConfig
from diffusionlm.training.prepare import begins_with_bos
from diffusionlm.training.start import Start

SIDECARS = {  # family: objective, alignment, mask id, suppressed ids
    "gpt2": ("arm", "shifted", None, ()),
    "llama": ("arm", "shifted", None, ()),
    "mistral": ("arm", "shifted", None, ()),
    "qwen2": ("arm", "shifted", None, ()),
    "dream": ("mdm", "shifted", 37, ()),
    "llada": ("mdm", "same", 5, ()),
    "smdm": ("mdm", "same", V, ()),
    "diffugpt": ("mdm", "shifted", 7, (7,)),
    "diffullama": ("mdm", "shifted", 7, (7,)),
}


@pytest.mark.parametrize("family", SIDECARS)
def test_the_sidecar_describes_the_weights(family, imported):
    sidecar = checkpoint.load_sidecar(imported(family))
    cfg = config_io.from_dict(ModelConfig, sidecar.model)
    assert (sidecar.objective, sidecar.alignment, sidecar.mask_id, sidecar.suppressed_ids) == SIDECARS[family]
    assert cfg.causal == (sidecar.objective == "arm") and cfg.mask_row == (family == "smdm")
    assert (sidecar.bos_id, sidecar.eos_id, sidecar.pad_id, sidecar.canvas["start_id"]) == (1, 2, 2, 1)
    # A run that continues from it has the same mask, alignment and suppression.
    diffusion = config_io.from_dict(DiffusionConfig, sidecar.diffusion)
    run = config.Config(objective=sidecar.objective, model=cfg, diffusion=diffusion)
    assert (run.mask_id, run.suppressed_ids) == (sidecar.mask_id, sidecar.suppressed_ids)
    assert sidecar.objective == "arm" or diffusion.alignment == sidecar.alignment
    name = "model" if family == "smdm" else "source"
    assert Start(checkpoint.find(imported(family))).identity.startswith(f"{name}@0-")


def test_an_appended_mask_row_is_outside_the_vocabulary(tmp_path):
    """DiffuGPT-M has 50,258 rows, the last of them for the mask."""
    fields = GPT2 | {"n_embd": 4, "n_head": 2, "n_layer": 1, "n_positions": 8, "vocab_size": 50258}
    names = {n: s for n, s in tensor_shapes("diffugpt").items() if ".h.1." not in n}
    resized = {n: tuple({D: 4, 3 * D: 12, 4 * D: 16, 32: 8, V: 50258}[x] for x in s) for n, s in names.items()}
    tensors = {name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in resized.items()}
    dlm.import_weights(write_source(tmp_path / "source", fields, tensors), tmp_path / "model")
    sidecar = checkpoint.load_sidecar(tmp_path / "model")
    assert (sidecar.mask_id, sidecar.suppressed_ids) == (50257, ())
    assert (sidecar.model["vocab_size"], sidecar.model["mask_row"]) == (50257, True)


def test_suppression_and_the_mask_can_be_chosen(tmp_path):
    source = make_source("llada", tmp_path / "source")
    dlm.import_weights(source, tmp_path / "one", suppress_mask=True, mask_id=9)
    sidecar = checkpoint.load_sidecar(tmp_path / "one")
    assert (sidecar.mask_id, sidecar.suppressed_ids, sidecar.diffusion["suppress_mask"]) == (9, (9,), True)


def test_a_negative_id_means_none(tmp_path):
    fields = LLAMA | {"bos_token_id": -1, "pad_token_id": -1, "eos_token_id": []}
    source = write_source(tmp_path / "source", fields, random_tensors("llama"))
    dlm.import_weights(source, tmp_path / "model")
    sidecar = checkpoint.load_sidecar(tmp_path / "model")
    assert (sidecar.bos_id, sidecar.eos_id, sidecar.pad_id, sidecar.canvas["start_id"]) == (None,) * 4


def test_a_bos_that_only_config_json_has_begins_no_document(tmp_path):
    """Qwen has this: a token that its tokenizer lacks cannot be written into data."""
    source = make_source("llama", tmp_path / "source")
    (source / "vocab.json").write_text(json.dumps({chr(0x4E00 + i): i for i in range(V)}))
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "bos_token": None}))
    dlm.import_weights(source, tmp_path / "model")
    assert checkpoint.load_sidecar(tmp_path / "model").canvas["start_id"] == 1
    assert not begins_with_bos(checkpoint.load_sidecar(tmp_path / "model"))
