"""Training objectives on the shared trunk: the masked diffusion bound and the autoregressive cross-entropy."""

import jax
import jax.numpy as jnp
from flax import struct

from diffusionlm.config import ANSWER, Config, DiffusionConfig
from diffusionlm.diffusion import schedules
from diffusionlm.diffusion.corruption import Corrupted


def predicted_share(cfg: Config) -> float:
    """Return the mean share of positions whose labels the objective predicts."""
    return 1.0 if cfg.objective == "arm" else schedules.build(cfg.diffusion).mean_mask_probability()


@struct.dataclass
class Targets:
    """The inputs, labels and weights of a forward pass: loss = sum(weight * cross-entropy)."""

    inputs_BxT: jax.Array  # int32, the input of the network
    segment_ids_BxT: jax.Array  # int32
    labels_BxT: jax.Array  # int32
    weight_BxT: jax.Array  # float32, already normalised over the *global* batch
    counted_BxT: jax.Array  # float32, 1 where a label is predicted; for the unweighted cross-entropy


def mdm_targets(cfg: DiffusionConfig, tokens_BxT: jax.Array, corrupted: Corrupted) -> Targets:
    """Return the targets of masked diffusion.

    With normalisation "tokens" the loss is in nats per token of the bound (SMDM, arXiv 2410.18514, Eq. 3; LLaDA, arXiv
    2502.09992, Eq. 3): a sum over masked positions, divided by all scored tokens of the global batch. "masked_tokens"
    divides by the masked tokens instead (DiffuLLaMA, arXiv 2410.17891), which gives about twice the bound and is not a
    bound itself. "examples" divides by the scored tokens of each example and takes the mean over the examples (LLaDA,
    Algorithm 2).

    With alignment "shifted", position i predicts token i + 1, and no position predicts the first token of a text, which
    must not be scored (`has_predecessor`).
    """
    masked_BxT = corrupted.masked_BxT.astype(jnp.float32)
    weight_BxT = jnp.where(corrupted.masked_BxT, corrupted.weight_B[:, None], 0.0)
    if cfg.weighting == "cart":
        weight_BxT = cart_weights(corrupted, cfg.cart_p)
    if cfg.normalization == "examples":
        weight_BxT *= _mean_of_means(corrupted.scored_BxT)
    else:
        counted_BxT = masked_BxT if cfg.normalization == "masked_tokens" else corrupted.scored_BxT.astype(jnp.float32)
        weight_BxT /= jnp.maximum(counted_BxT.sum(), 1.0)
    if cfg.alignment == "shifted":
        tokens_BxT, weight_BxT, masked_BxT = (
            jnp.pad(x_BxT[:, 1:], ((0, 0), (0, 1))) for x_BxT in (tokens_BxT, weight_BxT, masked_BxT)
        )
    return Targets(corrupted.tokens_BxT, corrupted.segment_ids_BxT, tokens_BxT, weight_BxT, masked_BxT)


def has_predecessor(segment_ids_BxT: jax.Array) -> jax.Array:
    """Return the tokens that follow one of their own segment, which a shifted alignment can predict. bool (B, T)."""
    return jnp.pad(segment_ids_BxT[:, 1:] == segment_ids_BxT[:, :-1], ((0, 0), (1, 0)))


def cart_weights(corrupted: Corrupted, p: float) -> jax.Array:
    """Return the weights of Dream's context-adaptive noise rescheduling (CART): higher for masks near visible tokens.

    The weight of a masked position is the sum of p (1 - p)^(d - 1) / 2 over the distances d to all visible positions
    (Dream 7B, arXiv 2508.15487; as released by Dream-Coder). The weights lie in [0, 1], are about 1 - t on average away
    from the ends of a text, and replace the bound's 1 / t. Padding and other segments are not visible. float32 (B, T).
    """
    segment_ids_BxT = corrupted.segment_ids_BxT
    visible_BxT = ((segment_ids_BxT != 0) & ~corrupted.masked_BxT).astype(jnp.float32)

    def combine(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return first[0] * second[0], first[1] * second[0] + second[1]

    def before(visible_BxT: jax.Array, segment_ids_BxT: jax.Array) -> jax.Array:
        """Return the sum over j before i of (1 - p)^(i - j - 1) visible_j."""
        same_BxT = has_predecessor(segment_ids_BxT)
        decay_BxT = jnp.where(same_BxT, 1 - p, 0.0)
        upto_BxT = jax.lax.associative_scan(combine, (decay_BxT, visible_BxT), axis=1)[1]
        return jnp.where(same_BxT, jnp.pad(upto_BxT[:, :-1], ((0, 0), (1, 0))), 0.0)

    behind_BxT = before(visible_BxT[:, ::-1], segment_ids_BxT[:, ::-1])[:, ::-1]
    weight_BxT = 0.5 * p * (before(visible_BxT, segment_ids_BxT) + behind_BxT)
    return jnp.where(corrupted.masked_BxT, weight_BxT, 0.0)


def arm_targets(tokens_BxL: jax.Array, segment_ids_BxL: jax.Array, *, segmented: bool) -> Targets:
    """Return the targets of next-token prediction, in nats per token: L tokens give T = L-1 inputs and labels.

    With `segmented`, the first token of a document is not predicted from the document before it.
    """
    segments_BxT, label_segments_BxT = segment_ids_BxL[:, :-1], segment_ids_BxL[:, 1:]
    scored_BxT = label_segments_BxT != 0
    if segmented:
        scored_BxT &= label_segments_BxT == segments_BxT
    counted_BxT = scored_BxT.astype(jnp.float32)
    weight_BxT = counted_BxT / jnp.maximum(counted_BxT.sum(), 1.0)
    return Targets(tokens_BxL[:, :-1], segments_BxT, tokens_BxL[:, 1:], weight_BxT, counted_BxT)


def arm_answer_targets(cfg: DiffusionConfig, tokens_BxL: jax.Array, parts_BxL: jax.Array) -> Targets:
    """Return the targets of next-token prediction of answers given their prompts, in nats per token.

    The EOS of an answer is predicted and the padding after it is not: a text ends with its first EOS. With
    normalisation "examples" the loss is the mean over the tokens of each example and then over the examples; else the
    mean over all tokens of answers (as SMDM fine-tunes its autoregressive models).

    Args:
      cfg: gives the normalisation.
      tokens_BxL: int32 ids.
      parts_BxL: int32 PROMPT, ANSWER (with its EOS), and 0 at the padding after them.
    """
    scored_BxT = parts_BxL[:, 1:] == ANSWER
    counted_BxT = scored_BxT.astype(jnp.float32)
    if cfg.normalization == "examples":
        weight_BxT = counted_BxT * _mean_of_means(scored_BxT)
    else:
        weight_BxT = counted_BxT / jnp.maximum(counted_BxT.sum(), 1.0)
    segment_ids_BxT = (parts_BxL[:, :-1] != 0).astype(jnp.int32)
    return Targets(tokens_BxL[:, :-1], segment_ids_BxT, tokens_BxL[:, 1:], weight_BxT, counted_BxT)


def _mean_of_means(scored_BxT: jax.Array) -> jax.Array:
    """Return weights (B, 1) that make a sum over scored positions the mean over rows of the mean over each row.

    Rows without scored positions do not count.
    """
    count_B = scored_BxT.sum(-1).astype(jnp.float32)
    rows = jnp.maximum((count_B > 0).sum().astype(jnp.float32), 1.0)
    return (1.0 / (jnp.maximum(count_B, 1.0) * rows))[:, None]
