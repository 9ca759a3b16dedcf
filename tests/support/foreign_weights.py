"""Tiny models in the formats of other systems, and checkpoints of ours, for the tests of importing and exporting."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from diffusionlm import config_io, presets
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.config import DiffusionConfig, ModelConfig
from diffusionlm.data.chat_templates import Template
from diffusionlm.model.transformer import Transformer
from support.random_params import draw_params

D, H, G, F, L, V = 16, 4, 2, 24, 2, 40
QWEN3_HEAD = 6  # the width of its heads, which together are wider than the model
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
CONFIGS: dict[str, dict[str, Any] | None] = {
    "gpt2": GPT2 | {"architectures": ["GPT2LMHeadModel"]},
    "llama": LLAMA,
    "mistral": LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None},
    "qwen2": LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 9},
    "qwen3": LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": QWEN3_HEAD},
    "dream": LLAMA | {"architectures": ["DreamModel"], "model_type": "Dream", "mask_token_id": 37},
    "llada": IDS
    | {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
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


def tensor_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors of a tiny model, written out as its system has them."""
    kv = G * D // H
    if family in ("gpt2", "diffugpt"):
        body, embed = ("transformer.", "transformer.wte") if family == "gpt2" else ("denoise_model.", "embed_tokens")
        shapes = {f"{embed}.weight": (V, D), f"{body}wpe.weight": (32, D)}
        linears = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D)}
        for i in range(L):
            for name, shape in linears.items():
                shapes |= {f"{body}h.{i}.{name}.weight": shape, f"{body}h.{i}.{name}.bias": shape[1:]}
        norms = [f"h.{i}.ln_{n}" for i in range(L) for n in (1, 2)] + ["ln_f"]
        return shapes | {f"{body}{norm}.{part}": (D,) for norm in norms for part in ("weight", "bias")}
    if family == "smdm":
        shapes = {"transformer.wte.weight": (V + 1, D), "lm_head.weight": (V, D), "transformer.ln_f.weight": (D,)}
        for i in range(L):
            b = f"transformer.h.{i}."
            shapes |= {f"{b}norm_1.weight": (D,), f"{b}norm_2.weight": (D,)}
            shapes |= {f"{b}attn.attn.weight": (3 * D, D), f"{b}attn.proj.weight": (D, D)}
            shapes |= {f"{b}mlp.swiglu.w1.weight": (F, D), f"{b}mlp.swiglu.w2.weight": (F, D)}
            shapes |= {f"{b}mlp.swiglu.w3.weight": (D, F)}
        return shapes
    if family == "llada":
        t = "model.transformer."
        shapes = {f"{t}wte.weight": (V, D), f"{t}ff_out.weight": (V, D), f"{t}ln_f.weight": (D,)}
        names = {"q_proj": (D, D), "k_proj": (kv, D), "v_proj": (kv, D), "attn_out": (D, D), "ff_proj": (F, D)}
        names |= {"up_proj": (F, D), "ff_out": (D, F), "attn_norm": (D,), "ff_norm": (D,)}
        return shapes | {f"{t}blocks.{i}.{name}.weight": shape for i in range(L) for name, shape in names.items()}
    shapes = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    K = QWEN3_HEAD if family == "qwen3" else D // H
    names = {"self_attn.q_proj": (H * K, D), "self_attn.k_proj": (G * K, D), "self_attn.v_proj": (G * K, D)}
    names |= {"self_attn.q_norm": (K,), "self_attn.k_norm": (K,)} if family == "qwen3" else {}
    names |= {"self_attn.o_proj": (D, H * K), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    names |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
    for i in range(L):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in names.items()}
        if family in ("qwen2", "dream"):
            shapes |= {f"model.layers.{i}.self_attn.{n}_proj.bias": (D if n == "q" else kv,) for n in "qkv"}
    return shapes


def random_tensors(family: str, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: (0.5 * rng.standard_normal(shape)).astype(dtype) for name, shape in tensor_shapes(family).items()}


def write_source(directory: Path, config_json: dict | None, tensors: dict[str, np.ndarray]) -> Path:
    """Write a directory as the Hugging Face hub has it, without tokenizer files."""
    directory.mkdir(parents=True, exist_ok=True)
    if config_json is not None:
        (directory / "config.json").write_text(json.dumps(config_json))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def make_source(family: str, directory: Path, dtype=np.float32) -> Path:
    """Write the tiny model of a family and return what to import."""
    source = write_source(directory, CONFIGS[family], random_tensors(family, dtype))
    return source / "model.safetensors" if family == "smdm" else source


def import_options(family: str) -> dict:
    """Return the options that a tiny model needs where its config.json does not say enough."""
    family_option = {"family": family} if family in ("smdm", "diffullama") else {}
    return family_option | ({"mask_id": 7} if family in ("diffugpt", "diffullama") else {})


def logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """Return logits (B, T, V) of a checkpoint in float32, without the rows that pad the vocabulary."""
    cfg = dataclasses.replace(config_io.from_dict(ModelConfig, checkpoint.load_sidecar(path).model), dtype="float32")
    params, model = checkpoint.load_params(path, jnp.float32), Transformer(cfg)

    def forward(params, ids_BxT):
        hidden = model.apply({"params": params}, ids_BxT)
        return model.apply({"params": params}, hidden, method=Transformer.head)

    return np.asarray(jax.jit(forward)(params, jnp.asarray(ids, jnp.int32)))[..., : cfg.vocab_size]


def flat_params(path: Path) -> dict[str, np.ndarray]:
    """Return the parameters of a checkpoint by name."""
    return {
        name: np.asarray(leaf)
        for name, leaf in traverse_util.flatten_dict(checkpoint.load_params(path), sep="/").items()
    }


def bit_equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Return True if two dictionaries hold the same bytes under the same names."""
    return all(first[name].tobytes() == second[name].tobytes() for name in first | second)


def save_native(path: Path, alignment: str = "same", **changes) -> ModelConfig:
    """Save a checkpoint that was made here, with a mask row, and with texts that begin with EOS."""
    cfg = ModelConfig(
        **{"d_model": D, "n_layers": L, "n_heads": H, "n_kv_heads": H, "head_dim": 4, "d_ff": F} | changes
    )
    cfg = dataclasses.replace(cfg, vocab_size=V, max_length=32)
    arm = cfg.causal
    diffusion = DiffusionConfig(schedule="cosine", alignment=alignment)
    sidecar = Sidecar(
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
    checkpoint.save_params(path, draw_params(cfg), sidecar)
    return cfg
