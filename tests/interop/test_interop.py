"""Weights in and out: against transformers, against forward passes in the sources' own layouts, and bit for bit."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from support import source_forward
from support.helpers import make_params

import diffusionlm as dlm
from diffusionlm import config, config_io, presets
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import DiffusionConfig, MeshConfig, ModelConfig
from diffusionlm.data.chat_templates import Template
from diffusionlm.data.prepare import begins_with_bos
from diffusionlm.errors import UserError
from diffusionlm.interop import safetensors as ours_format
from diffusionlm.interop.families import FAMILIES
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.training.start import identity

PARITY = Path(__file__).parents[1] / "data" / "parity"
D, H, G, F, L, V = 16, 4, 2, 24, 2, 40
TINY_SMDM = dataclasses.replace(
    presets.get("smdm_6m"), d_model=D, n_layers=L, n_heads=H, n_kv_heads=H, head_dim=D // H, d_ff=F, vocab_size=V
)
IDS = {"bos_token_id": 1, "eos_token_id": 2}
LLAMA = IDS | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "intermediate_size": F,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
GPT2 = {"model_type": "gpt2", "n_embd": D, "n_layer": L, "n_head": H, "n_positions": 32, "vocab_size": V} | IDS
CONFIGS = {
    "gpt2": GPT2 | {"architectures": ["GPT2LMHeadModel"]},
    "llama": LLAMA,
    "qwen2": LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 9},
    "dream": LLAMA | {"architectures": ["DreamModel"], "model_type": "Dream", "mask_token_id": 37},
    "llada": IDS
    | {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "block_type": "llama",
        "d_model": D,
        "n_heads": H,
        "n_kv_heads": G,
        "n_layers": L,
        "mlp_hidden_size": F,
        "embedding_size": V,
        "vocab_size": V,
        "max_sequence_length": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "weight_tying": False,
        "mask_token_id": 5,
    },
    "smdm": None,
    "diffugpt": GPT2,
    "diffullama": LLAMA,
}


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tiny model, written out as its system has them."""
    kv = G * D // H
    if family in ("gpt2", "diffugpt"):
        body, embed = ("transformer.", "transformer.wte") if family == "gpt2" else ("denoise_model.", "embed_tokens")
        found = {f"{embed}.weight": (V, D), f"{body}wpe.weight": (32, D)}
        linears = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D)}
        for i in range(L):
            for name, shape in linears.items():
                found |= {f"{body}h.{i}.{name}.weight": shape, f"{body}h.{i}.{name}.bias": shape[1:]}
        norms = [f"h.{i}.ln_{n}" for i in range(L) for n in (1, 2)] + ["ln_f"]
        return found | {f"{body}{norm}.{part}": (D,) for norm in norms for part in ("weight", "bias")}
    if family == "smdm":
        found = {"transformer.wte.weight": (V + 1, D), "lm_head.weight": (V, D), "transformer.ln_f.weight": (D,)}
        for i in range(L):
            b = f"transformer.h.{i}."
            found |= {f"{b}norm_1.weight": (D,), f"{b}norm_2.weight": (D,)}
            found |= {f"{b}attn.attn.weight": (3 * D, D), f"{b}attn.proj.weight": (D, D)}
            found |= {f"{b}mlp.swiglu.w1.weight": (F, D), f"{b}mlp.swiglu.w2.weight": (F, D)}
            found |= {f"{b}mlp.swiglu.w3.weight": (D, F)}
        return found
    if family == "llada":
        t = "model.transformer."
        found = {f"{t}wte.weight": (V, D), f"{t}ff_out.weight": (V, D), f"{t}ln_f.weight": (D,)}
        names = {"q_proj": (D, D), "k_proj": (kv, D), "v_proj": (kv, D), "attn_out": (D, D), "ff_proj": (F, D)}
        names |= {"up_proj": (F, D), "ff_out": (D, F), "attn_norm": (D,), "ff_norm": (D,)}
        return found | {f"{t}blocks.{i}.{name}.weight": shape for i in range(L) for name, shape in names.items()}
    found = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    names = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D)}
    names |= {"self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    names |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    for i in range(L):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in names.items()}
        if family in ("qwen2", "dream"):
            found |= {f"model.layers.{i}.self_attn.{n}_proj.bias": (D if n == "q" else kv,) for n in "qkv"}
    return found


def tensors_of(family: str, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: (0.5 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes(family).items()}


def write_source(directory: Path, described: dict | None, tensors: dict[str, np.ndarray]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    if described is not None:
        (directory / "config.json").write_text(json.dumps(described))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(autouse=True)
def tiny_ladder(monkeypatch):
    monkeypatch.setattr(presets, "names", lambda: ["smdm_tiny"])
    monkeypatch.setattr(presets, "get", lambda name: TINY_SMDM)


def options(family: str) -> dict:
    """What has to be said about a tiny model of the families whose config.json does not."""
    named = {"family": family} if family in ("smdm", "diffullama") else {}
    return named | ({"mask_id": 7} if family in ("diffugpt", "diffullama") else {})


def source_of(family: str, directory: Path, dtype=np.float32) -> Path:
    source = write_source(directory, CONFIGS[family], tensors_of(family, dtype))
    return source / "model.safetensors" if family == "smdm" else source


def logits_of(path: Path, ids: np.ndarray) -> np.ndarray:
    """(B, T, V) in float32, without the rows that pad the vocabulary."""
    cfg = dataclasses.replace(config_io.from_dict(ModelConfig, checkpoint.load_sidecar(path).model), dtype="float32")
    params, model = checkpoint.load_params(path, jnp.float32), Transformer(cfg)

    def forward(params, ids_BxT):
        hidden = model.apply({"params": params}, ids_BxT)
        return model.apply({"params": params}, hidden, method=Transformer.head)

    return np.asarray(jax.jit(forward)(params, jnp.asarray(ids, jnp.int32)))[..., : cfg.vocab_size]


def flat(path: Path) -> dict[str, np.ndarray]:
    return {n: np.asarray(x) for n, x in traverse_util.flatten_dict(checkpoint.load_params(path), sep="/").items()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_logits_are_those_of_transformers(name, tmp_path):
    golden = np.load(PARITY / name / "golden.npz")
    dlm.import_weights(PARITY / name, tmp_path / "model")
    found = logits_of(tmp_path / "model", golden["ids"])
    assert golden["logits"].std() > 0.5
    assert np.abs(found - golden["logits"]).max() < 1e-4


FORWARD = {
    "llada": lambda t, ids: source_forward.llada(t, ids, H, 5e5, 1e-5),
    "smdm": lambda t, ids: source_forward.smdm(t, ids, H, causal=False),
    "dream": lambda t, ids: source_forward.dream(t, ids, H, 500.0, 1e-6),
    "diffugpt": lambda t, ids: source_forward.diffugpt(t, ids, H),
}


@pytest.mark.parametrize("family", FORWARD)
def test_logits_are_those_of_the_description(family, tmp_path):
    dlm.import_weights(source_of(family, tmp_path / "source"), tmp_path / "model", **options(family))
    ids = np.random.default_rng(1).integers(0, V, 11)
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors_of(family).items()}
    found = logits_of(tmp_path / "model", ids[None])[0]
    assert np.abs(found - FORWARD[family](wide, ids)).max() < 1e-4


def test_the_autoregressive_models_of_smdm_are_known_by_their_rows(tmp_path):
    tensors = tensors_of("smdm")
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:V].copy()
    source = write_source(tmp_path / "source", None, tensors)
    dlm.import_weights(source / "model.safetensors", tmp_path / "model", "smdm")
    sidecar = checkpoint.load_sidecar(tmp_path / "model")
    assert (sidecar.objective, sidecar.alignment, sidecar.mask_id) == ("arm", "shifted", None)
    ids = np.random.default_rng(1).integers(0, V, 11)
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    found = logits_of(tmp_path / "model", ids[None])[0]
    assert np.abs(found - source_forward.smdm(wide, ids, H, causal=True)).max() < 1e-4


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips_are_exact(family, dtype, tmp_path):
    source = source_of(family, tmp_path / "source", dtype)
    dlm.import_weights(source, tmp_path / "one", **options(family))
    dlm.export_weights(tmp_path / "one", tmp_path / "out", family)
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    given = tensors_of(family, dtype)
    assert set(written) == set(given)
    for name, tensor in given.items():
        assert written[name].dtype == dtype and written[name].tobytes() == tensor.tobytes(), name
    again = tmp_path / "out" / "model.safetensors" if family == "smdm" else tmp_path / "out"
    dlm.import_weights(again, tmp_path / "two", **options(family))
    one, two = flat(tmp_path / "one"), flat(tmp_path / "two")
    assert all(one[name].tobytes() == two[name].tobytes() for name in one | two)
    assert all(tensor.dtype == dtype for tensor in one.values())
    sidecars = [dataclasses.replace(checkpoint.load_sidecar(tmp_path / n), source={}) for n in ("one", "two")]
    assert sidecars[0] == sidecars[1]


def test_tensors_may_be_sharded_and_lack_their_prefix(tmp_path):
    tensors = tensors_of("gpt2")
    dlm.import_weights(write_source(tmp_path / "whole", CONFIGS["gpt2"], tensors), tmp_path / "one")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32), "h.1.attn.masked_bias": np.ones((), np.float32)}
    source = tmp_path / "parts"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIGS["gpt2"]))
    names = sorted(bare)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in files.items():
        safetensors.numpy.save_file({name: bare[name] for name in own}, source / file)
    index = {"weight_map": {name: file for file, own in files.items() for name in own}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    dlm.import_weights(source, tmp_path / "two")
    one, two = flat(tmp_path / "one"), flat(tmp_path / "two")
    assert all(one[name].tobytes() == two[name].tobytes() for name in one | two)


def test_files_of_several_shards_are_what_the_library_reads(tmp_path):
    tensors = tensors_of("llama", ml_dtypes.bfloat16)
    specs = {name: ours_format.Spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    files = ours_format.write(tmp_path, specs, tensors.__getitem__, shard_bytes=4000)
    index = json.loads((tmp_path / files[-1]).read_text())
    assert len(files) > 3 and index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    found = {}
    for file in files[:-1]:
        part = safetensors.numpy.load_file(tmp_path / file)
        assert sum(tensor.nbytes for tensor in part.values()) <= 4000 or len(part) == 1
        assert all(index["weight_map"][name] == file for name in part)
        found |= part
    assert all(found[name].tobytes() == tensor.tobytes() for name, tensor in tensors.items())
    assert {name: one.shape for name, one in ours_format.find(tmp_path).items()} == shapes("llama")


@pytest.mark.parametrize("stored", [["embedding"], ["head"], ["embedding", "head"]])
def test_a_tied_head_is_known_by_either_name(stored, tmp_path):
    tensors = tensors_of("llama")
    table = tensors.pop("lm_head.weight")
    names = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}
    del tensors["model.embed_tokens.weight"]
    tensors |= {names[one]: table for one in stored}
    source = write_source(tmp_path / "source", LLAMA | {"tie_word_embeddings": True}, tensors)
    dlm.import_weights(source, tmp_path / "model")
    found = flat(tmp_path / "model")
    assert "head" not in found and found["embed"][:V].tobytes() == table.tobytes()
    assert not found["embed"][V:].any()
    if len(stored) == 2:
        tensors["lm_head.weight"] = table + 1
        write_source(source, None, tensors)
        with pytest.raises(UserError, match="is tied, and its lm_head.weight differs"):
            dlm.import_weights(source, tmp_path / "other")


def test_a_mesh_gives_the_same_checkpoint(tmp_path):
    source = source_of("llada", tmp_path / "source")
    dlm.import_weights(source, tmp_path / "one")
    dlm.import_weights(source, tmp_path / "two", mesh=make_mesh(MeshConfig(fsdp=2, tensor=2, data=2)))
    one, two = flat(tmp_path / "one"), flat(tmp_path / "two")
    assert all(one[name].tobytes() == two[name].tobytes() for name in one | two)


SIDECARS = {  # objective, alignment, mask id, suppressed ids
    "gpt2": ("arm", "shifted", None, ()),
    "llama": ("arm", "shifted", None, ()),
    "qwen2": ("arm", "shifted", None, ()),
    "dream": ("mdm", "shifted", 37, ()),
    "llada": ("mdm", "same", 5, ()),
    "smdm": ("mdm", "same", V, ()),
    "diffugpt": ("mdm", "shifted", 7, (7,)),
    "diffullama": ("mdm", "shifted", 7, (7,)),
}


@pytest.mark.parametrize("family", SIDECARS)
def test_the_sidecar_says_what_the_weights_mean(family, tmp_path):
    dlm.import_weights(source_of(family, tmp_path / "source"), tmp_path / "model", **options(family))
    sidecar = checkpoint.load_sidecar(tmp_path / "model")
    cfg = config_io.from_dict(ModelConfig, sidecar.model)
    assert (sidecar.objective, sidecar.alignment, sidecar.mask_id, sidecar.suppressed_ids) == SIDECARS[family]
    assert cfg.causal == (sidecar.objective == "arm") and cfg.mask_row == (family == "smdm")
    assert (sidecar.bos_id, sidecar.eos_id, sidecar.pad_id, sidecar.canvas["start_id"]) == (1, 2, 2, 1)
    # What a run says that goes on from it: the same mask, alignment and suppression.
    diffusion = config_io.from_dict(DiffusionConfig, sidecar.diffusion)
    run = config.Config(objective=sidecar.objective, model=cfg, diffusion=diffusion)
    assert (run.mask_id, run.suppressed_ids) == (sidecar.mask_id, sidecar.suppressed_ids)
    assert sidecar.objective == "arm" or diffusion.alignment == sidecar.alignment
    name = "model" if family == "smdm" else "source"
    assert identity(tmp_path / "model").startswith(f"{name}@0-")


def test_an_appended_mask_row_is_none_of_the_vocabulary(tmp_path):
    """DiffuGPT-M has 50,258 rows, of which the last is the mask's."""
    described = GPT2 | {"n_embd": 4, "n_head": 2, "n_layer": 1, "n_positions": 8, "vocab_size": 50258}
    names = {n: s for n, s in shapes("diffugpt").items() if ".h.1." not in n}
    resized = {n: tuple({D: 4, 3 * D: 12, 4 * D: 16, 32: 8, V: 50258}[x] for x in s) for n, s in names.items()}
    tensors = {name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in resized.items()}
    dlm.import_weights(write_source(tmp_path / "source", described, tensors), tmp_path / "model")
    sidecar = checkpoint.load_sidecar(tmp_path / "model")
    assert (sidecar.mask_id, sidecar.suppressed_ids) == (50257, ())
    assert (sidecar.model["vocab_size"], sidecar.model["mask_row"]) == (50257, True)


def test_suppression_is_asked_for(tmp_path):
    source = source_of("llada", tmp_path / "source")
    dlm.import_weights(source, tmp_path / "one", suppress_mask=True, mask_id=9)
    sidecar = checkpoint.load_sidecar(tmp_path / "one")
    assert (sidecar.mask_id, sidecar.suppressed_ids, sidecar.diffusion["suppress_mask"]) == (9, (9,), True)


def broken(family="llama", described=None, **changes):
    """A source with other tensors (None: without it) and another config.json."""

    def make(directory):
        tensors = tensors_of(family)
        for name, tensor in changes.items():
            tensors.pop(name, None)
            if tensor is not None:
                tensors[name] = tensor
        return write_source(directory, CONFIGS[family] | (described or {}), tensors)

    return make


def truncated(directory):
    source = source_of("llama", directory)
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:-100])
    return source


def without_a_shard(directory):
    source = source_of("llama", directory)
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    names = {name: "model-00001-of-00002.safetensors" for name in shapes("llama")}
    names["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return source


def pickled(directory):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA))
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02")
    return directory


def nothing(directory):
    return directory


def damaged(name, content):
    def make(directory):
        source = source_of("llama", directory)
        (source / name).write_bytes(content)
        return source

    return make


def with_long_tokenizer(directory):
    source = source_of("llama", directory)
    vocabulary = {chr(0x4E00 + i): i for i in range(V + 1)}
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return source


REFUSED = {
    "rope_scaling": (broken(described={"rope_scaling": {"type": "linear", "factor": 2.0}}), "has rope_scaling="),
    "rope_parameters": (broken(described={"rope_parameters": {"rope_type": "llama3"}}), "has rope_scaling="),
    "sliding_window": (broken(described={"sliding_window": 32}), "has sliding_window=32"),
    "use_sliding_window": (broken("qwen2", {"use_sliding_window": True}), "has use_sliding_window=True"),
    "activation": (broken(described={"hidden_act": "gelu"}), "has hidden_act='gelu', and this version computes 'silu'"),
    "attention_bias": (broken(described={"attention_bias": True}), "has attention_bias=True"),
    "qk_norm": (broken("llada", {"attention_layer_norm": True}), "has attention_layer_norm=True"),
    "architecture": (broken(described={"architectures": ["MambaForCausalLM"]}), "MambaForCausalLM, and this version"),
    "field": (broken(described={"hidden_size": None}), "lacks hidden_size"),
    "missing": (broken(**{"model.norm.weight": None}), "lacks 1 of 21 tensors: model.norm.weight"),
    "unknown": (broken(extra=np.zeros(2, np.float32)), "has 1 tensors that this family does not know: extra"),
    "shape": (
        broken(**{"model.norm.weight": np.zeros(9, np.float32)}),
        r"1 tensors have other shapes .*: model.norm.weight \[9\] instead of \[16\]",
    ),
    "dtype": (broken(extra=np.zeros(2, np.int64)), "has 'extra' in I64, and this version reads F32, F16, BF16"),
    "truncated": (truncated, "model.safetensors is cut short"),
    "shard": (without_a_shard, "lacks 1 of its 2 shards, first model-00002-of-00002.safetensors"),
    "pickle": (pickled, "pytorch_model.bin is a pickle.*convert it to safetensors"),
    "nothing": (nothing, "no weights at .*: it does not exist"),
    "header": (damaged("model.safetensors", b"\x10\0\0\0\0\0\0\0not a header at "), "has a damaged header"),
    "config": (damaged("config.json", b"{"), "cannot read .*config.json, it is damaged"),
    "tokenizer": (with_long_tokenizer, f"the tokenizer has {V + 1} ids, and the model {V} input rows"),
    "mask_id": (broken("dream", {"mask_token_id": None}), "config.json has no mask_token_id; .* --mask_id"),
    "mask_range": (broken("dream", {"mask_token_id": V}), f"mask_id={V} must lie in"),
    "ids": (broken(described={"eos_token_id": V}), rf"eos_token_id={V} must lie in \[0, {V}\)"),
    "id_type": (broken(described={"bos_token_id": "1"}), "has bos_token_id='1', which must be a token's id"),
    "mask_type": (broken("dream", {"mask_token_id": True}), "has mask_token_id=True, which must be a token's id"),
    "text": (broken(described={"hidden_size": "16"}), "has hidden_size='16', which must be a whole number of at least"),
    "fraction": (broken(described={"num_attention_heads": 4.0}), "has num_attention_heads=4.0, which must be a whole"),
    "zero": (broken(described={"num_attention_heads": 0}), "has num_attention_heads=0, which must be a whole number"),
    "number": (broken(described={"rope_theta": "abc"}), "has rope_theta='abc', which must be a number"),
    "truth": (broken(described={"tie_word_embeddings": 1}), "has tie_word_embeddings=1, which must be true or false"),
    "scaling_text": (broken(described={"rope_scaling": "linear"}), "has rope_scaling='linear'"),
    "window_text": (broken(described={"sliding_window": 9, "max_position_embeddings": None}), "has sliding_window=9"),
    "ours": (broken(described={"diffusionlm": {"family": "llama"}}), "has a damaged 'diffusionlm'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_and_leaves_nothing(case, tmp_path):
    make, message = REFUSED[case]
    source = make(tmp_path / "source")
    with pytest.raises(UserError, match=message) as error:
        dlm.import_weights(source, tmp_path / "model")
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


@pytest.mark.parametrize(("named", "also"), [("qwen2", "lacks 6 of"), ("gpt2", "lacks n_embd"), ("smdm", "no size")])
def test_a_family_that_config_json_contradicts_is_doubted(named, also, tmp_path):
    source = source_of("llama", tmp_path / "source")
    with pytest.raises(UserError, match=rf"{also}.*; or is --family {named} wrong\? config.json says llama"):
        dlm.import_weights(source, tmp_path / "model", family=named)
    with pytest.raises(UserError, match="lacks 1 of 21 tensors: model.norm.weight; complete it$"):
        dlm.import_weights(broken(**{"model.norm.weight": None})(tmp_path / "less"), tmp_path / "model", family="llama")


def test_a_negative_id_is_none(tmp_path):
    source = broken(described={"bos_token_id": -1, "pad_token_id": -1, "eos_token_id": []})(tmp_path / "source")
    dlm.import_weights(source, tmp_path / "model")
    sidecar = checkpoint.load_sidecar(tmp_path / "model")
    assert (sidecar.bos_id, sidecar.eos_id, sidecar.pad_id, sidecar.canvas["start_id"]) == (None,) * 4


def test_the_index_says_which_shard_a_tensor_is_in(tmp_path):
    source, tensors = source_of("llama", tmp_path / "source"), tensors_of("llama")
    (source / "model.safetensors").unlink()
    head = {"lm_head.weight": tensors["lm_head.weight"]}
    stale = {name: tensor + 1 if name in head else tensor for name, tensor in tensors.items()}
    safetensors.numpy.save_file(head, source / "a.safetensors")
    safetensors.numpy.save_file(stale, source / "b.safetensors")
    names = {name: "a.safetensors" if name in head else "b.safetensors" for name in tensors}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    dlm.import_weights(source, tmp_path / "model")
    np.testing.assert_array_equal(flat(tmp_path / "model")["head"][:, :V], head["lm_head.weight"].T)


def test_layers_of_two_dtypes_of_16_bits_keep_their_values(tmp_path):
    name = "model.layers.{}.mlp.up_proj.weight"
    tensors = tensors_of("llama", np.float16)
    tensors[name.format(1)] = np.full((F, D), 1e30, ml_dtypes.bfloat16)
    dlm.import_weights(write_source(tmp_path / "source", LLAMA, tensors), tmp_path / "model")
    up = flat(tmp_path / "model")["blocks/up"]
    assert up.dtype == np.float32
    np.testing.assert_array_equal(up[0], tensors[name.format(0)].T.astype(np.float32))
    np.testing.assert_array_equal(up[1], tensors[name.format(1)].T.astype(np.float32))


def test_bos_of_config_json_alone_is_put_before_no_document(tmp_path):
    """As Qwen has it: what its tokenizer does not have cannot be written into data."""
    source = source_of("llama", tmp_path / "source")
    (source / "vocab.json").write_text(json.dumps({chr(0x4E00 + i): i for i in range(V)}))
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "bos_token": None}))
    dlm.import_weights(source, tmp_path / "model")
    assert checkpoint.load_sidecar(tmp_path / "model").canvas["start_id"] == 1
    assert not begins_with_bos(str(tmp_path / "model"))


def test_an_output_that_exists_is_kept(tmp_path):
    source = source_of("llama", tmp_path / "source")
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists; delete it or choose another"):
        dlm.import_weights(source, tmp_path / "model")
    with pytest.raises(UserError, match="unknown family 'lama'; did you mean 'llama'"):
        dlm.import_weights(source, tmp_path / "new", "lama")
    dlm.import_weights(source, tmp_path / "new")
    with pytest.raises(UserError, match="exists; delete it or choose another"):
        dlm.export_weights(tmp_path / "new", tmp_path / "model", "llama")
    assert list((tmp_path / "model").iterdir()) == []


def save_ours(path: Path, alignment: str = "same", **changes) -> ModelConfig:
    """A model that was made here, with a mask row, and texts that begin with EOS."""
    cfg = ModelConfig(
        **{"d_model": D, "n_layers": L, "n_heads": H, "n_kv_heads": H, "head_dim": 4, "d_ff": F} | changes
    )
    cfg = dataclasses.replace(cfg, vocab_size=V, max_length=32)
    arm = cfg.causal
    diffusion = DiffusionConfig(schedule="cosine", alignment=alignment)
    sidecar = checkpoint.Sidecar(
        objective="arm" if arm else "mdm",
        model=config_io.to_dict(cfg),
        diffusion=config_io.to_dict(diffusion),
        mask_id=None if arm else V,
        eos_id=2,
        bos_id=1,
        alignment="shifted" if arm else alignment,
        canvas={"max_length": 20, "start_id": 2},
        source={"step": 3},
        template=Template("mine", "{role}: {content}\n", 2).to_dict(),
    )
    checkpoint.save_params(path, make_params(cfg), sidecar)
    return cfg


def test_an_appended_mask_row_grows_the_vocabulary_of_the_export(tmp_path):
    save_ours(tmp_path / "model")
    (first, second) = dlm.export_weights(tmp_path / "model", tmp_path / "out", "llama", dtype="bfloat16")
    assert "row 40 of 41" in first and "both directions" in second and "predicts token i, not i + 1" in second
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (described["vocab_size"], described["mask_token_id"], described["torch_dtype"]) == (V + 1, V, "bfloat16")
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    ours = flat(tmp_path / "model")
    assert (written["model.embed_tokens.weight"] == ours["embed"][: V + 1].astype(ml_dtypes.bfloat16)).all()
    assert written["lm_head.weight"].shape == (V + 1, D)


@pytest.mark.parametrize(
    ("format", "alignment", "changes"),
    [
        ("llama", "same", {}),
        ("llama", "shifted", {}),
        ("diffullama", "shifted", {}),
        ("llada", "same", {"rope_bf16_tables": True}),
        ("llama", "same", {"causal": True, "mask_row": False}),
    ],
)
def test_a_model_of_ours_comes_back_as_it_was(format, alignment, changes, tmp_path):
    """Also what no config.json has a field for: how texts and prompts begin, alignment, schedule, mask row."""
    cfg = save_ours(tmp_path / "model", alignment, **changes)
    dlm.export_weights(tmp_path / "model", tmp_path / "out", format)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 2  # for other libraries
    dlm.import_weights(tmp_path / "out", tmp_path / "again")
    one, two = (checkpoint.load_sidecar(tmp_path / name) for name in ("model", "again"))
    assert dataclasses.replace(one, source={}, pad_id=2, model={}) == dataclasses.replace(two, source={}, model={})
    assert one.model | {"head_chunk": 0} == two.model | {"head_chunk": 0}
    one, two = flat(tmp_path / "model"), flat(tmp_path / "again")
    for params in (one, two):  # what pads the vocabulary means nothing
        params["embed"], params["head"] = params["embed"][: cfg.embedding_rows], params["head"][:, :V]
    assert all(one[name].tobytes() == two[name].tobytes() for name in one | two)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 0}, r"has diffusionlm.max_length=0, which must lie in \[1, 32\]"),
        ({"max_length": 33}, r"has diffusionlm.max_length=33, which must lie in \[1, 32\]"),
        ({"start_id": 9999}, r"diffusionlm.start_id=9999 must lie in \[0, 41\)"),
        ({"bos_id": -3}, r"bos_token_id=-3 must lie in \[0, 41\)"),
        ({"template": {"foo": 1}}, "damaged 'diffusionlm': a chat template of version None"),
        ({"diffusion": {"schedule": "nope"}}, "damaged 'diffusionlm': .*schedule.*'nope'"),
        ({"family": "lama"}, "diffusionlm.family='lama', and there is"),
    ],
)
def test_an_export_of_ours_that_was_edited_is_refused_and_leaves_nothing(changes, message, tmp_path):
    save_ours(tmp_path / "model")
    dlm.export_weights(tmp_path / "model", tmp_path / "out", "llama")
    file = tmp_path / "out" / "config.json"
    described = json.loads(file.read_text())
    for name, value in changes.items():
        old = described["diffusionlm"][name]
        described["diffusionlm"][name] = old | value if name == "diffusion" else value
    file.write_text(json.dumps(described))
    with pytest.raises(UserError, match=message):
        dlm.import_weights(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_adapters_are_in_the_weights_of_an_export(tmp_path):
    cfg = save_ours(tmp_path / "model", lora_rank=2)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), make_params(cfg))
    sidecar = checkpoint.load_sidecar(tmp_path / "model")
    checkpoint.save_params(tmp_path / "tuned", params, sidecar)
    dlm.export_weights(tmp_path / "tuned", tmp_path / "out", "llada")
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    blocks = {name: np.asarray(leaf, np.float64) for name, leaf in params["blocks"].items() if name[-4:] != "norm"}
    for i in range(L):
        up = blocks["up"][i] + 2 * blocks["up_lora_down"][i] @ blocks["up_lora_up"][i]
        found = written[f"model.transformer.blocks.{i}.up_proj.weight"]
        np.testing.assert_allclose(found, up.T, rtol=0, atol=1e-6)


def test_values_beyond_float16_are_refused(tmp_path):
    cfg = save_ours(tmp_path / "model")
    params = make_params(cfg)
    params["embed"] = params["embed"].at[3, 4].set(1e5)
    checkpoint.save_params(tmp_path / "large", params, checkpoint.load_sidecar(tmp_path / "model"))
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
        ("smdm", {"d_ff": 32}, "2 layers of width 16 and MLP width 32 are no size of SMDM's ladder"),
        ("llada", {"alignment": "shifted"}, "predicts token i in it, and token i . 1 in .* are dream, .*diffullama"),
        ("diffullama", {}, "predicts token i . 1 in it, and token i in this model; formats of those are llada, smdm"),
        ("qwen", {}, "unknown format 'qwen'; did you mean 'qwen2'"),
    ],
)
def test_a_format_that_cannot_express_a_model_is_refused(format, changes, message, tmp_path):
    save_ours(tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message):
        dlm.export_weights(tmp_path / "model", tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


def test_an_imported_model_samples_and_is_scored(data_dir, tmp_path, capsys):
    """Figure of an independent NumPy forward pass; the wrong rotary layout gives 5.117."""
    from diffusionlm.cli.main import main

    source = Path(data_dir) / "weights" / "tinystories-656k"
    assert main(["import", str(source), "--output", str(tmp_path / "model")]) == 0
    assert "llama, 656,000 parameters, autoregressive, its tokenizer" in capsys.readouterr().out
    data = str(Path(data_dir) / "tinystories" / "valid.jsonl")
    assert main(["evaluate", str(tmp_path / "model"), "perplexity", "--data", data, "--limit", "15", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert abs(report["metrics"]["nats_per_token"]["value"] - 2.999) < 1e-3
    assert main(["export", str(tmp_path / "model"), "--format", "llama", "--output", str(tmp_path / "out")]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    text = dlm.load(tmp_path / "model").generate("Once upon a time", length=40, temperature=0.5)[0].text
    assert len(text.split()) > 15


def test_the_verbs_say_what_they_made_and_what_is_wrong(tmp_path, capsys):
    from diffusionlm.cli.main import main

    source = source_of("dream", tmp_path / "source")
    args = ["import", str(source), "--output", str(tmp_path / "model"), "--suppress_mask", "yes"]
    assert main(args) == 0
    count = sum(math.prod(shape) for shape in shapes("dream").values())
    assert f"dream, {count:,} parameters, masked diffusion, mask id 37, no tokenizer" in capsys.readouterr().out
    assert checkpoint.load_sidecar(tmp_path / "model").suppressed_ids == (37,)
    args = ["export", str(tmp_path / "model"), "--format", "qwen2", "--output", str(tmp_path / "out")]
    assert main(args) == 0
    assert "note: the model attends in both directions" in capsys.readouterr().out
    for mistake in (args, ["import", str(source)], ["import", "nowhere", "--output", "x"], [*args[:3], "x", *args[4:]]):
        assert main(mistake) == 2
        error = capsys.readouterr().err
        assert error.startswith("diffusionlm: error: ") and error.count("\n") == 1


@pytest.mark.slow
def test_little_more_than_the_model_is_in_memory(tmp_path):
    """At most 1.3 times a checkpoint of 1 GB, beside what Python and JAX take before."""
    script = Path(__file__).parents[2] / "experiments/benchmarks/interop_memory.py"
    ran = subprocess.run([sys.executable, script, "1000", tmp_path], capture_output=True, text=True, check=True)
    peaks = re.findall(r"(\w+): (\d+) MB .* peak (\d+) MB before, (\d+) after", ran.stdout)
    assert [name for name, *_ in peaks] == ["brought_in", "brought_out"]
    for _, size, before, after in peaks:
        assert int(after) - int(before) < 1.3 * int(size)
