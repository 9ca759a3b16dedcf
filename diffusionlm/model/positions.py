"""Rotary position embeddings (RoPE; RoFormer, arXiv 2104.09864), and their changes for longer texts."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm.config import ModelConfig
from diffusionlm.config_model import RopeScaling


def rope_tables(cfg: ModelConfig, positions_BxT: jax.Array, length_B: jax.Array | None = None) -> jax.Array:
    """Return the cosines and sines of the rotary angles, float32 (B, T, 2, head_dim / 2).

    The angles are position * frequency for each channel pair. `cfg.rope_bf16_tables` rounds the tables to bfloat16.

    Args:
      cfg: the network.
      positions_BxT: int32 positions of the tokens.
      length_B: int32 lengths of the whole texts (`text_lengths`); only the dynamic kind of scaling needs them.
    """
    scaling = cfg.rope_scaling
    frequencies_J = jnp.asarray(frequencies(cfg.rope_theta, cfg.head_dim, scaling), jnp.float32)
    angles = positions_BxT[..., None].astype(jnp.float32) * frequencies_J[None, None]
    if scaling.kind == "dynamic":
        assert length_B is not None
        angles *= _dynamic_slowdown(scaling, length_B, cfg.head_dim)[:, None]
    tables = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=2)
    if scaling.kind == "yarn":
        tables *= scaling.attention_factor or 1 + 0.1 * math.log(scaling.factor)
    return tables.astype(jnp.bfloat16).astype(jnp.float32) if cfg.rope_bf16_tables else tables


def frequencies(theta: float, head_dim: int, scaling: RopeScaling) -> np.ndarray:
    """Return the angle of each channel pair at position 1, float64 (head_dim / 2,).

    They are theta ** (-2j / head_dim) for pair j, scaled as transformers does (its `modeling_rope_utils`). The dynamic
    kind depends on the length of the text and is left to `rope_tables`.
    """
    plain_J = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling.kind == "linear":  # position interpolation (arXiv 2306.15595)
        return plain_J / scaling.factor
    if scaling.kind not in ("llama3", "yarn"):
        return plain_J
    if scaling.kind == "llama3":  # by the turns that a pair makes in the original length
        turns_J = scaling.original_length * plain_J / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept_J = np.clip((turns_J - low) / (high - low), 0, 1)
    else:
        kept_J = 1 - _yarn_ramp(scaling, theta, head_dim)
    return plain_J * (kept_J + (1 - kept_J) / scaling.factor)


def _yarn_ramp(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """Return how far each pair is between its own frequency (0) and the divided one (1) (arXiv 2309.00071, Eq. 23)."""

    def pair_with(turns: float) -> float:
        return head_dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_with(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_with(scaling.beta_slow)), head_dim - 1)
    width = 0.001 if first == last else last - first
    return np.clip((np.arange(head_dim // 2) - first) / width, 0, 1)


def _dynamic_slowdown(scaling: RopeScaling, length_B: jax.Array, head_dim: int) -> jax.Array:
    """Return the factor of each frequency in texts of these lengths, float32 (B, head_dim / 2).

    A base that is multiplied by s ** (d / (d - 2)) multiplies frequency j by s ** (-2j / (d - 2)).
    """
    excess_B = jnp.maximum(length_B.astype(jnp.float32) / scaling.original_length, 1.0) - 1.0
    powers_J = jnp.asarray(-np.arange(0, head_dim, 2) / (head_dim - 2), jnp.float32)
    return jnp.exp(jnp.log1p(scaling.factor * excess_B)[:, None] * powers_J[None])


def text_lengths(positions_BxT: jax.Array, segment_ids_BxT: jax.Array | None) -> jax.Array:
    """Return the last position of each row's tokens, plus 1; padding (segment id 0) has none. int32 (B,)."""
    if segment_ids_BxT is not None:
        positions_BxT = jnp.where(segment_ids_BxT != 0, positions_BxT, 0)
    return positions_BxT.max(axis=1) + 1


def restarted(segment_ids_BxT: jax.Array) -> jax.Array:
    """Return the positions of tokens within their segments, int32 (B, T): each segment of a row counts from 0."""
    places_T = jnp.arange(segment_ids_BxT.shape[1], dtype=jnp.int32)
    is_start_BxT = jnp.pad(segment_ids_BxT[:, 1:] != segment_ids_BxT[:, :-1], ((0, 0), (1, 0)))
    return places_T[None] - jax.lax.cummax(jnp.where(is_start_BxT, places_T[None], 0), axis=1)


def rotate(x_BxTxHxK: jax.Array, rope_BxTx2xJ: jax.Array) -> jax.Array:
    """Rotate the two halves of each head (GPT-NeoX layout) in float32, and return the dtype of `x`."""
    cos, sin = rope_BxTx2xJ[:, :, None, 0], rope_BxTx2xJ[:, :, None, 1]
    first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxTxHxK.dtype)
