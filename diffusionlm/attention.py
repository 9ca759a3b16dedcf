"""Attention: one entry point for every mask kind."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Keys(NamedTuple):
    """What the S keys of an attention are, where they are not the T queries themselves."""

    places_BxT: jax.Array  # int32: which key each query is; only causal attention looks at it
    segment_ids_BxS: jax.Array  # int32


def attention(
    q_BxTxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxK: jax.Array,
    *,
    causal: bool,
    segment_ids_BxT: jax.Array | None,
    keys: Keys | None = None,
) -> jax.Array:
    """Softmax attention of H query heads over G key/value heads, scaled by 1/sqrt(K), with the softmax in float32.

    Args:
      q_BxTxHxK: queries; H is a multiple of G, and query head h reads key/value head h // (H // G).
      k_BxSxGxK: keys.
      v_BxSxGxK: values.
      causal: position i attends to positions j <= i only.
      segment_ids_BxT: positions attend within equal ids only; padding's own id is 0, so nothing else sees it.
      keys: what the keys are; None: the queries themselves, S = T.

    Returns:
      (B, T, H, K) in the dtype of the queries.
    """
    B, T, H, K = q_BxTxHxK.shape
    S, G = k_BxSxGxK.shape[1:3]
    R = H // G
    # Heads before positions, so that both products are plain batched matmuls: much faster on CPUs.
    q_BxGxRTxK = q_BxTxHxK.reshape(B, T, G, R, K).transpose(0, 2, 3, 1, 4).reshape(B, G, R * T, K)
    k_BxGxSxK, v_BxGxSxK = k_BxSxGxK.transpose(0, 2, 1, 3), v_BxSxGxK.transpose(0, 2, 1, 3)
    scores_BxGxRTxS = jnp.einsum("bgqk,bgsk->bgqs", q_BxGxRTxK, k_BxGxSxK, preferred_element_type=jnp.float32)
    scores_BxGxRxTxS = scores_BxGxRTxS.reshape(B, G, R, T, S) * K**-0.5
    mask_BxTxS = _mask(T, causal, segment_ids_BxT, keys)
    if mask_BxTxS is not None:
        # Finite, so that a row with nothing to attend to gives numbers and not NaN.
        floor = jnp.finfo(jnp.float32).min
        scores_BxGxRxTxS = jnp.where(mask_BxTxS[:, None, None], scores_BxGxRxTxS, floor)
    weights_BxGxRxTxS = jax.nn.softmax(scores_BxGxRxTxS, axis=-1).astype(v_BxSxGxK.dtype)
    weights_BxGxRTxS = weights_BxGxRxTxS.reshape(B, G, R * T, S)
    out_BxGxRTxK = jnp.einsum("bgqs,bgsk->bgqk", weights_BxGxRTxS, v_BxGxSxK)
    return out_BxGxRTxK.reshape(B, G, R, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _mask(T: int, causal: bool, segment_ids_BxT: jax.Array | None, keys: Keys | None) -> jax.Array | None:
    """True where a query (second-last axis) may attend to a key (last axis); None where every pair may."""
    mask_BxTxS = None
    if causal:
        places_BxT = jnp.arange(T)[None] if keys is None else keys.places_BxT
        S = T if keys is None else keys.segment_ids_BxS.shape[1]
        mask_BxTxS = jnp.arange(S)[None, None] <= places_BxT[..., None]
    if segment_ids_BxT is not None:
        segment_ids_BxS = segment_ids_BxT if keys is None else keys.segment_ids_BxS
        same_BxTxS = segment_ids_BxT[:, :, None] == segment_ids_BxS[:, None, :]
        mask_BxTxS = same_BxTxS if mask_BxTxS is None else mask_BxTxS & same_BxTxS
    return mask_BxTxS
