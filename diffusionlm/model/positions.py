"""Rotary position embeddings (RoPE; RoFormer, arXiv 2104.09864)."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm.config import ModelConfig


def rope_tables(cfg: ModelConfig, positions_BxT: jax.Array) -> jax.Array:
    """Return the cosines and sines of the rotary angles, float32 (B, T, 2, head_dim / 2).

    The angles are position * rope_theta ** (-2j / head_dim) for channel pairs j. `cfg.rope_bf16_tables` rounds the
    tables to bfloat16.
    """
    frequencies = cfg.rope_theta ** (-np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim)
    angles = positions_BxT[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    tables = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=2)
    return tables.astype(jnp.bfloat16).astype(jnp.float32) if cfg.rope_bf16_tables else tables


def rotate(x_BxTxHxK: jax.Array, rope_BxTx2xJ: jax.Array) -> jax.Array:
    """Rotate the two halves of each head (GPT-NeoX layout) in float32, and return the dtype of `x`."""
    cos, sin = rope_BxTx2xJ[:, :, None, 0], rope_BxTx2xJ[:, :, None, 1]
    first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxTxHxK.dtype)
