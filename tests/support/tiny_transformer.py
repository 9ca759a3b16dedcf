"""A Transformer of every variety, with random parameters, and its jitted forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffusionlm.config import ModelConfig
from diffusionlm.config_model import RopeScaling
from diffusionlm.model.transformer import Transformer

B, T = 2, 8
BASE = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=24, vocab_size=60, max_length=12, head_chunk=8
)
GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "linear_bias": True, "tied_head": True}
SCALINGS = {  # with pairs on either side of each ramp, and texts of 8 that are longer than the first training's
    "linear": RopeScaling("linear", factor=3),
    "dynamic": RopeScaling("dynamic", factor=3, original_length=5),
    "llama3": RopeScaling("llama3", factor=3, original_length=150, high_freq_factor=5),
    "yarn": RopeScaling("yarn", factor=3, original_length=400, beta_fast=20),
}
VARIANTS = {
    "smdm": BASE,  # RMSNorm, rotary, SwiGLU, no biases, its own head
    "grouped": dataclasses.replace(BASE, n_kv_heads=2, rope_theta=500000.0),
    "dream": dataclasses.replace(BASE, qkv_bias=True, norm_eps=1e-2),
    "bf16 tables": dataclasses.replace(BASE, rope_bf16_tables=True),
    "gpt2": dataclasses.replace(BASE, causal=True, mask_row=False, **GPT2),
    "qwen3": dataclasses.replace(BASE, qk_norm=True, n_kv_heads=2, norm_eps=1e-2),
    "window": dataclasses.replace(BASE, causal=True, sliding_window=3),
    **{kind: dataclasses.replace(BASE, rope_scaling=scaling) for kind, scaling in SCALINGS.items()},
}
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
COUNTED = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
WHOLE = np.ones((B, T), np.int32)


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, (B, T)).astype(np.int32)


@functools.cache
def parameters(cfg: ModelConfig):
    """Random values for every parameter, gains and biases too, so that each matters."""
    shapes = nn.unbox(jax.eval_shape(Transformer(cfg).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def forward(cfg: ModelConfig):
    """Jitted (params, tokens, segment ids, positions) -> hidden states, logits."""
    model = Transformer(cfg)

    def run(params, tokens, segments, positions):
        hidden = model.apply({"params": params}, tokens, segments, positions)
        return hidden, model.apply({"params": params}, hidden, method=Transformer.head)

    return jax.jit(run)
