"""The cross-entropy of labels under the vocabulary projection, without the logits of many tokens at once."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusionlm.flops import head_chunks
from diffusionlm.sharding import rows_per_device


def cross_entropy(
    head: Callable[[jax.Array], jax.Array],
    hidden_BxTxD: jax.Array,
    labels_BxT: jax.Array,
    suppressed_V: jax.Array,
    chunk: int,
) -> jax.Array:
    """-log softmax(logits)[label] in float32 nats, (B, T), without suppressed ids.

    Of more than `chunk` tokens the vocabulary projection runs over chunks that the backward pass recomputes, so that
    their logits never exist together. Chunks are cut along T, which no mesh axis splits.

    Args:
      head: hidden states (B, t, D) to raw float32 logits (B, t, V).
      hidden_BxTxD: final hidden states.
      labels_BxT: int32 ids; none may be suppressed.
      suppressed_V: bool, True for ids that get no probability.
      chunk: most tokens that each device projects at a time; one position of each of its rows is the least.
    """

    def nll(hidden_BxCxD: jax.Array, labels_BxC: jax.Array) -> jax.Array:
        logits_BxCxV = jnp.where(suppressed_V[None, None], -jnp.inf, head(hidden_BxCxD))
        label_BxC = jnp.take_along_axis(logits_BxCxV, labels_BxC[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BxCxV, axis=-1) - label_BxC

    B, T, D = hidden_BxTxD.shape
    S = head_chunks(rows_per_device(B), T, chunk)
    if S == 1:
        return nll(hidden_BxTxD, labels_BxT)
    C = -(-T // S)
    padding = ((0, 0), (0, S * C - T))  # what it costs is cut off again below
    hidden_SxBxCxD = jnp.pad(hidden_BxTxD, (*padding, (0, 0))).reshape(B, S, C, D).swapaxes(0, 1)
    labels_SxBxC = jnp.pad(labels_BxT, padding).reshape(B, S, C).swapaxes(0, 1)
    _, nll_SxBxC = jax.lax.scan(
        lambda _, x: (None, jax.checkpoint(nll, prevent_cse=False)(*x)), None, (hidden_SxBxCxD, labels_SxBxC)
    )
    return nll_SxBxC.swapaxes(0, 1).reshape(B, S * C)[:, :T]
