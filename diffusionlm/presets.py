"""Model sizes by name: `presets.get("smdm_170m")`. The published ones have the exact parameter count of their source.

A preset fixes the network only: the mask id, the learning rate and the data belong to the experiments.
"""

import dataclasses

from diffusionlm.config import ModelConfig
from diffusionlm.config_model import RopeScaling
from diffusionlm.registry import Registry
from diffusionlm.twin import arm_twin as arm_twin

_presets: Registry[ModelConfig] = Registry("preset")

# The ladder of SMDM (2410.18514, repository ML-GSAI/SMDM, lit_gpt/config.py): millions of non-embedding parameters,
# layers, heads, head_dim, d_model, d_ff. The MLP is 4 times as wide as the model, except at size 75.
_SMDM = (
    (6, 6, 4, 64, 256, 1024),
    (19, 8, 6, 64, 384, 1536),
    (34, 8, 8, 64, 512, 2048),
    (48, 9, 9, 64, 576, 2304),
    (66, 10, 10, 64, 640, 2560),
    (75, 16, 8, 80, 640, 1600),
    (85, 13, 10, 64, 640, 2560),
    (113, 12, 12, 64, 768, 3072),
    (142, 15, 12, 64, 768, 3072),
    (170, 18, 12, 64, 768, 3072),
    (180, 14, 14, 64, 896, 3584),
    (206, 16, 14, 64, 896, 3584),
    (231, 18, 14, 64, 896, 3584),
    (268, 16, 16, 64, 1024, 4096),
    (302, 18, 16, 64, 1024, 4096),
    (336, 20, 16, 64, 1024, 4096),
    (472, 18, 10, 128, 1280, 5120),
    (551, 21, 10, 128, 1280, 5120),
    (571, 18, 11, 128, 1408, 5632),
    (629, 24, 10, 128, 1280, 5120),
    (666, 21, 11, 128, 1408, 5632),
    (717, 19, 12, 128, 1536, 6144),
    (761, 24, 11, 128, 1408, 5632),
    (831, 22, 12, 128, 1536, 6144),
    (944, 25, 12, 128, 1536, 6144),
    (1028, 20, 14, 128, 1792, 7168),
    (1233, 24, 14, 128, 1792, 7168),
    (1476, 22, 16, 128, 2048, 8192),
    (1678, 25, 16, 128, 2048, 8192),
    (2121, 28, 17, 128, 2176, 8704),
)


def get(name: str) -> ModelConfig:
    """Return the network of that name; an unknown name raises `UserError` with a suggestion."""
    return _presets.get(name)


def names() -> list[str]:
    """Return the names that `get` knows, sorted."""
    return _presets.names()


def _smdm(layers: int, heads: int, head_dim: int, d_model: int, d_ff: int) -> ModelConfig:
    return ModelConfig(
        d_model=d_model,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=head_dim,
        d_ff=d_ff,
        vocab_size=32000,
        mask_row=True,
        max_length=2048,
        # SMDM's code rounds the rotary tables to bfloat16; float32 is more accurate and the default here. Turn the
        # rounding on to reproduce the activations of its released weights.
        rope_bf16_tables=False,
        dtype="bfloat16",
    )


for _number, *_shape in _SMDM:
    _presets.register(f"smdm_{_number}m")(lambda shape=_shape: _smdm(*shape))


def _generic(layers: int, heads: int, d_ff: int) -> ModelConfig:
    """Return a size that nobody published, for vocabularies of 8191 pieces: with the mask row, 8192 rows."""
    return ModelConfig(
        d_model=64 * heads,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=64,
        d_ff=d_ff,
        vocab_size=8191,
        mask_row=True,
        max_length=1024,
        dtype="bfloat16",
    )


# Named by the number of all parameters. 768 x 12 is the trunk of GPT-2.
_presets.register("mdm_10m")(lambda: _generic(layers=7, heads=4, d_ff=768))
_presets.register("mdm_30m")(lambda: _generic(layers=7, heads=8, d_ff=1408))
_presets.register("mdm_100m")(lambda: _generic(layers=12, heads=12, d_ff=2048))


@_presets.register("llada_1b")
def _llada_1b() -> ModelConfig:
    """LLaDA 1B (2502.09992, Table 5). The mask is the vocabulary's id 126336, so no row is appended."""
    return ModelConfig(
        d_model=2048,
        n_layers=22,
        n_heads=32,
        n_kv_heads=4,
        head_dim=64,
        d_ff=5634,
        vocab_size=126464,
        mask_row=False,
        max_length=4096,
        rope_theta=500000.0,
        dtype="bfloat16",
    )


@_presets.register("llada_8b")
def _llada_8b() -> ModelConfig:
    """LLaDA 8B (2502.09992, Table 5; the remaining fields from the config.json of GSAI-ML/LLaDA-8B-Base)."""
    return dataclasses.replace(
        _llada_1b(), d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, d_ff=12288
    )


@_presets.register("llada_arm_7b")
def _llada_arm_7b() -> ModelConfig:
    """The autoregressive baseline of LLaDA 8B (2502.09992, Table 5)."""
    return arm_twin(dataclasses.replace(_llada_8b(), n_layers=28, n_kv_heads=8, d_ff=13440))


@_presets.register("tinyllama_1b")
def _tinyllama_1b() -> ModelConfig:
    """TinyLlama 1.1B (2401.02385; config.json of TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T)."""
    return ModelConfig(
        d_model=2048,
        n_layers=22,
        n_heads=32,
        n_kv_heads=4,
        head_dim=64,
        d_ff=5632,
        vocab_size=32000,
        mask_row=False,
        max_length=2048,
        causal=True,
        dtype="bfloat16",
    )


@_presets.register("gpt2")
def _gpt2() -> ModelConfig:
    """GPT-2 small (config.json of openai-community/gpt2)."""
    return ModelConfig(
        d_model=768,
        n_layers=12,
        n_heads=12,
        n_kv_heads=12,
        head_dim=64,
        d_ff=3072,
        vocab_size=50257,
        mask_row=False,
        max_length=1024,
        causal=True,
        norm="layernorm",
        positions="learned",
        mlp="gelu",
        linear_bias=True,
        tied_head=True,
        dtype="bfloat16",
    )


@_presets.register("gpt2_medium")
def _gpt2_medium() -> ModelConfig:
    """GPT-2 medium (config.json of openai-community/gpt2-medium)."""
    return dataclasses.replace(_gpt2(), d_model=1024, n_layers=24, n_heads=16, n_kv_heads=16, d_ff=4096)


@_presets.register("llama2_7b")
def _llama2_7b() -> ModelConfig:
    """LLaMA-2 7B (config.json of meta-llama/Llama-2-7b-hf), from which DiffuLLaMA (2410.17891) starts."""
    return ModelConfig(
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=32,
        head_dim=128,
        d_ff=11008,
        vocab_size=32000,
        mask_row=False,
        max_length=4096,
        causal=True,
        dtype="bfloat16",
    )


@_presets.register("dream_7b")
def _dream_7b() -> ModelConfig:
    """Dream 7B, a diffusion model shaped like Qwen2.5-7B; the mask is the vocabulary's id 151666.

    `max_length` is from its config.json; Dream was trained, and is used, on 2048 tokens.
    """
    return ModelConfig(
        d_model=3584,
        n_layers=28,
        n_heads=28,
        n_kv_heads=4,
        head_dim=128,
        d_ff=18944,
        vocab_size=152064,
        mask_row=False,
        max_length=131072,
        norm_eps=1e-6,
        rope_theta=1e6,
        qkv_bias=True,
        dtype="bfloat16",
    )


@_presets.register("llama3_8b")
def _llama3_8b() -> ModelConfig:
    """LLaMA 3.1 8B (config.json of meta-llama/Llama-3.1-8B)."""
    return ModelConfig(
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        d_ff=14336,
        vocab_size=128256,
        mask_row=False,
        max_length=131072,
        causal=True,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", factor=8.0, original_length=8192),
        dtype="bfloat16",
    )


@_presets.register("qwen3_8b")
def _qwen3_8b() -> ModelConfig:
    """Qwen3 8B (config.json of Qwen/Qwen3-8B-Base)."""
    return ModelConfig(
        d_model=4096,
        n_layers=36,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        d_ff=12288,
        vocab_size=151936,
        mask_row=False,
        max_length=32768,
        causal=True,
        norm_eps=1e-6,
        rope_theta=1e6,
        qk_norm=True,
        dtype="bfloat16",
    )


@_presets.register("mistral_7b")
def _mistral_7b() -> ModelConfig:
    """Mistral 7B (2310.06825; config.json of mistralai/Mistral-7B-v0.1), with its window of 4096 positions."""
    return dataclasses.replace(
        _llama2_7b(), n_kv_heads=8, d_ff=14336, max_length=32768, rope_theta=10000.0, sliding_window=4096
    )
