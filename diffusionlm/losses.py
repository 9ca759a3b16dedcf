"""Training objectives on the shared trunk: the masked diffusion bound and the autoregressive cross-entropy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from diffusionlm.config import DiffusionConfig
from diffusionlm.corruption import Corrupted
from diffusionlm.flops import head_chunks
from diffusionlm.sharding import rows_per_device


@struct.dataclass
class Targets:
    """What a forward pass is scored on, with the weights of its normalised sum: loss = sum(weight * cross-entropy)."""

    inputs_BxT: jax.Array  # int32, what the network sees
    segment_ids_BxT: jax.Array  # int32
    labels_BxT: jax.Array  # int32
    weight_BxT: jax.Array  # float32; sums of these weights over the *global* batch are already normalised
    counted_BxT: jax.Array  # float32, 1 where a label is predicted: for the unweighted cross-entropy


def mdm_targets(cfg: DiffusionConfig, tokens_BxT: jax.Array, corrupted: Corrupted) -> Targets:
    """Targets of the masked diffusion bound.

    normalization "tokens": nats per token of the bound (SMDM, arXiv 2410.18514, Eq. 3; LLaDA, arXiv 2502.09992, Eq. 3),
    summed over masked positions and divided by all scored tokens of the global batch. "masked_tokens": divided by the
    masked ones instead (DiffuLLaMA, arXiv 2410.17891), which is about twice the bound and not one.
    """
    masked_BxT = corrupted.masked_BxT.astype(jnp.float32)
    counted_BxT = masked_BxT if cfg.normalization == "masked_tokens" else corrupted.scored_BxT.astype(jnp.float32)
    weight_BxT = masked_BxT * corrupted.weight_B[:, None] / jnp.maximum(counted_BxT.sum(), 1.0)
    return Targets(corrupted.tokens_BxT, corrupted.segment_ids_BxT, tokens_BxT, weight_BxT, masked_BxT)


def arm_targets(tokens_BxL: jax.Array, segment_ids_BxL: jax.Array, *, segmented: bool) -> Targets:
    """Targets of next-token prediction: L tokens give T = L-1 inputs and labels; nats per token.

    With `segmented`, the first token of a document is not predicted from the document before it.
    """
    segments_BxT, label_segments_BxT = segment_ids_BxL[:, :-1], segment_ids_BxL[:, 1:]
    scored_BxT = label_segments_BxT != 0
    if segmented:
        scored_BxT &= label_segments_BxT == segments_BxT
    counted_BxT = scored_BxT.astype(jnp.float32)
    weight_BxT = counted_BxT / jnp.maximum(counted_BxT.sum(), 1.0)
    return Targets(tokens_BxL[:, :-1], segments_BxT, tokens_BxL[:, 1:], weight_BxT, counted_BxT)


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
