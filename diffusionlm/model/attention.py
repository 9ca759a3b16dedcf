"""Attention: one entry point for every kind of mask, on every device.

Masks are full, causal, causal within a window, block-causal, within segments, or arbitrary data. `attention_kernels`
has kernels for all but the last; `reference_attention` computes any.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from diffusionlm.model import attention_kernels


class Keys(NamedTuple):
    """The S keys of an attention, where they are not at the positions of the T queries."""

    places_BxT: jax.Array  # int32, the index of each query's own key; only causal attention uses it
    segment_ids_BxS: jax.Array  # int32


def attention(
    q_BxTxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxK: jax.Array,
    *,
    causal: bool,
    block: int = 1,
    window: int = 0,
    segment_ids_BxT: jax.Array | None = None,
    keys: Keys | None = None,
    allowed_TxS: jax.Array | None = None,
) -> jax.Array:
    """Compute softmax attention of H query heads over G key/value heads, scaled by 1/sqrt(K), softmax in float32.

    Args:
      q_BxTxHxK: queries; H is a multiple of G, and query head h reads key/value head h // (H // G).
      k_BxSxGxK: keys.
      v_BxSxGxK: values.
      causal: position i attends to positions j <= i only.
      block: with `causal`, a position also attends to later ones of its own block of this many positions.
      window: with `causal` and blocks of 1, a position attends to this many newest positions only, itself among them;
        0: to all.
      segment_ids_BxT: int32, positions attend within equal ids only; padding has id 0, so nothing else attends to it.
      keys: where the keys are; None: at the positions of the queries, S = T.
      allowed_TxS: bool, a mask on top of the others, such as `annealed_mask`.

    Returns:
      (B, T, H, K) in the dtype of the queries.
    """
    operands = (q_BxTxHxK, k_BxSxGxK, v_BxSxGxK)
    kernel = attention_kernels.choose_kernel(q_BxTxHxK) if keys is None and allowed_TxS is None else None
    if kernel == "splash":
        return attention_kernels.splash(
            *operands, causal=causal, block=block, window=window, segment_ids_BxT=segment_ids_BxT
        )
    T = q_BxTxHxK.shape[1]
    if kernel == "cudnn":
        is_causal = causal and block == 1 and not window  # the only mask that the kernel needs no array for
        mask_BxTxT = attention_mask(T, causal and not is_causal, block, window, segment_ids_BxT)
        return attention_kernels.cudnn(*operands, causal=is_causal, mask_BxTxT=mask_BxTxT)
    mask_BxTxS = attention_mask(T, causal, block, window, segment_ids_BxT, keys)
    if allowed_TxS is not None:
        mask_BxTxS = allowed_TxS[None] if mask_BxTxS is None else mask_BxTxS & allowed_TxS[None]
    return reference_attention(*operands, mask_BxTxS)


def reference_attention(
    q_BxTxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxK: jax.Array, mask_BxTxS: jax.Array | None
) -> jax.Array:
    """Compute attention for any mask, with all scores in memory; a mask with one row (B = 1) applies to all rows."""
    B, T, H, K = q_BxTxHxK.shape
    S, G = k_BxSxGxK.shape[1:3]
    R = H // G
    # Heads before positions, so that both products are plain batched matmuls: much faster on CPUs.
    q_BxGxRTxK = q_BxTxHxK.reshape(B, T, G, R, K).transpose(0, 2, 3, 1, 4).reshape(B, G, R * T, K)
    k_BxGxSxK, v_BxGxSxK = k_BxSxGxK.transpose(0, 2, 1, 3), v_BxSxGxK.transpose(0, 2, 1, 3)
    scores_BxGxRTxS = jnp.einsum("bgqk,bgsk->bgqs", q_BxGxRTxK, k_BxGxSxK, preferred_element_type=jnp.float32)
    scores_BxGxRxTxS = scores_BxGxRTxS.reshape(B, G, R, T, S) * K**-0.5
    if mask_BxTxS is not None:
        # Finite, so that a query with nothing to attend to gives numbers and not NaN.
        floor = jnp.finfo(jnp.float32).min
        scores_BxGxRxTxS = jnp.where(mask_BxTxS[:, None, None], scores_BxGxRxTxS, floor)
    weights_BxGxRxTxS = jax.nn.softmax(scores_BxGxRxTxS, axis=-1).astype(v_BxSxGxK.dtype)
    weights_BxGxRTxS = weights_BxGxRxTxS.reshape(B, G, R * T, S)
    out_BxGxRTxK = checkpoint_name(
        jnp.einsum("bgqs,bgsk->bgqk", weights_BxGxRTxS, v_BxGxSxK), attention_kernels.CHECKPOINT
    )
    return out_BxGxRTxK.reshape(B, G, R, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def attention_mask(
    T: int,
    causal: bool,
    block: int,
    window: int,
    segment_ids_BxT: jax.Array | None,
    keys: Keys | None = None,
) -> jax.Array | None:
    """Return where a query (second-last axis) may attend to a key (last axis), bool; None: everywhere.

    Arguments are those of `attention`; the first axis of the mask is B or 1.
    """
    mask_BxTxS = None
    if causal:
        places_BxT = jnp.arange(T)[None] if keys is None else keys.places_BxT
        S = T if keys is None else keys.segment_ids_BxS.shape[1]
        mask_BxTxS = jnp.arange(S)[None, None] // block <= places_BxT[..., None] // block
        if window:
            mask_BxTxS &= jnp.arange(S)[None, None] > places_BxT[..., None] - window
    if segment_ids_BxT is not None:
        segment_ids_BxS = segment_ids_BxT if keys is None else keys.segment_ids_BxS
        same_BxTxS = segment_ids_BxT[:, :, None] == segment_ids_BxS[:, None, :]
        mask_BxTxS = same_BxTxS if mask_BxTxS is None else mask_BxTxS & same_BxTxS
    return mask_BxTxS


def annealed_mask(key: jax.Array, T: int, fraction: jax.Array | float) -> jax.Array:
    """Return a mask between causal and full attention: later positions are open with probability `fraction`.

    A step has one mask for all rows, heads and layers (DiffuLLaMA, arXiv 2410.17891, Section 3.2). Bool (T, T).
    """
    return jnp.tri(T, dtype=bool) | jax.random.bernoulli(key, fraction, (T, T))
