"""Attention: one entry point for every mask kind."""

import jax
import jax.numpy as jnp


def attention(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    *,
    causal: bool,
    segment_ids_BxT: jax.Array | None,
) -> jax.Array:
    """Softmax attention of H query heads over G key/value heads, scaled by 1/sqrt(K), with the softmax in float32.

    Args:
      q_BxTxHxK: queries; H is a multiple of G, and query head h reads key/value head h // (H // G).
      k_BxTxGxK: keys.
      v_BxTxGxK: values.
      causal: position i attends to positions j <= i only.
      segment_ids_BxT: positions attend within equal ids only; padding's own id is 0, so nothing else sees it.

    Returns:
      (B, T, H, K) in the dtype of the queries.
    """
    B, T, H, K = q_BxTxHxK.shape
    G = k_BxTxGxK.shape[2]
    q_BxTxGxRxK = q_BxTxHxK.reshape(B, T, G, H // G, K)
    scores_BxGxRxTxS = jnp.einsum("btgrk,bsgk->bgrts", q_BxTxGxRxK, k_BxTxGxK, preferred_element_type=jnp.float32)
    scores_BxGxRxTxS *= K**-0.5
    mask_BxTxS = _mask(T, causal, segment_ids_BxT)
    if mask_BxTxS is not None:
        # Finite, so that a row with nothing to attend to gives numbers and not NaN.
        floor = jnp.finfo(jnp.float32).min
        scores_BxGxRxTxS = jnp.where(mask_BxTxS[:, None, None], scores_BxGxRxTxS, floor)
    weights_BxGxRxTxS = jax.nn.softmax(scores_BxGxRxTxS, axis=-1).astype(v_BxTxGxK.dtype)
    out_BxTxGxRxK = jnp.einsum("bgrts,bsgk->btgrk", weights_BxGxRxTxS, v_BxTxGxK)
    return out_BxTxGxRxK.reshape(B, T, H, K)


def _mask(T: int, causal: bool, segment_ids_BxT: jax.Array | None) -> jax.Array | None:
    """True where a query (second-last axis) may attend to a key (last axis); None where every pair may."""
    mask_BxTxS = None
    if causal:
        mask_BxTxS = jnp.tril(jnp.ones((T, T), bool))[None]
    if segment_ids_BxT is not None:
        same_BxTxS = segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :]
        mask_BxTxS = same_BxTxS if mask_BxTxS is None else mask_BxTxS & same_BxTxS
    return mask_BxTxS
