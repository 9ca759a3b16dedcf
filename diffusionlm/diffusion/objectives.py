"""Training objectives on the shared trunk: the masked diffusion bound and the autoregressive cross-entropy."""

import jax
import jax.numpy as jnp
from flax import struct

from diffusionlm.config import ANSWER, Config, DiffusionConfig
from diffusionlm.diffusion import schedules
from diffusionlm.diffusion.corruption import Corrupted


def predicted_share(cfg: Config) -> float:
    """The share of positions whose labels the objective predicts, on average."""
    return 1.0 if cfg.objective == "arm" else schedules.build(cfg.diffusion).mean_mask_probability()


@struct.dataclass
class Targets:
    """What a forward pass is scored on, with the weights of its normalised sum: loss = sum(weight * cross-entropy)."""

    inputs_BxT: jax.Array  # int32, what the network sees
    segment_ids_BxT: jax.Array  # int32
    labels_BxT: jax.Array  # int32
    weight_BxT: jax.Array  # float32; sums of these weights over the *global* batch are already normalised
    counted_BxT: jax.Array  # float32, 1 where a label is predicted: for the unweighted cross-entropy


def mdm_targets(cfg: DiffusionConfig, tokens_BxT: jax.Array, corrupted: Corrupted) -> Targets:
    """Targets of masked diffusion.

    normalization "tokens": nats per token of the bound (SMDM, arXiv 2410.18514, Eq. 3; LLaDA, arXiv 2502.09992, Eq. 3),
    summed over masked positions and divided by all scored tokens of the global batch. "masked_tokens": divided by the
    masked ones instead (DiffuLLaMA, arXiv 2410.17891), which is about twice the bound and not one. "examples": by the
    scored tokens of its own example, and then the mean over the examples (LLaDA, Algorithm 2).

    alignment "shifted": position i is asked for token i + 1, and nothing asks for a text's first token, which must not
    be among the scored ones (`has_predecessor`).
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
    """Where a token of the same segment stands before: those that a shifted alignment can predict. Bool (B, T)."""
    return jnp.pad(segment_ids_BxT[:, 1:] == segment_ids_BxT[:, :-1], ((0, 0), (1, 0)))


def cart_weights(corrupted: Corrupted, p: float) -> jax.Array:
    """The weights of Dream's context-adaptive noise rescheduling (CART): masked tokens near visible ones weigh more.

    w_i = sum over visible j of p (1 - p)^(|i - j| - 1) / 2 for masked i (Dream 7B, arXiv 2508.15487; as released by
    Dream-Coder). They lie in [0, 1], are about 1 - t on average away from the ends of a text, and take the place of the
    bound's 1 / t. Padding and other segments are not visible. float32 (B, T).
    """
    segment_ids_BxT = corrupted.segment_ids_BxT
    visible_BxT = ((segment_ids_BxT != 0) & ~corrupted.masked_BxT).astype(jnp.float32)

    def step(one: tuple[jax.Array, jax.Array], two: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return one[0] * two[0], one[1] * two[0] + two[1]

    def before(visible_BxT: jax.Array, segment_ids_BxT: jax.Array) -> jax.Array:
        """sum over j before i of (1 - p)^(i - j - 1) visible_j, a sum that decays from place to place."""
        same_BxT = has_predecessor(segment_ids_BxT)
        decay_BxT = jnp.where(same_BxT, 1 - p, 0.0)
        upto_BxT = jax.lax.associative_scan(step, (decay_BxT, visible_BxT), axis=1)[1]
        return jnp.where(same_BxT, jnp.pad(upto_BxT[:, :-1], ((0, 0), (1, 0))), 0.0)

    behind_BxT = before(visible_BxT[:, ::-1], segment_ids_BxT[:, ::-1])[:, ::-1]
    weight_BxT = 0.5 * p * (before(visible_BxT, segment_ids_BxT) + behind_BxT)
    return jnp.where(corrupted.masked_BxT, weight_BxT, 0.0)


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


def arm_answer_targets(cfg: DiffusionConfig, tokens_BxL: jax.Array, parts_BxL: jax.Array) -> Targets:
    """Targets of next-token prediction of answers, given their prompts; nats per token.

    An answer's one EOS is predicted, and no padding: a text is over at its first EOS, and what stands behind is never
    generated. normalization "examples": the mean over an example's own tokens, then over the examples; else the mean
    over all tokens of answers (as SMDM fine-tunes its autoregressive models).

    Args:
      cfg: of it, the normalization.
      tokens_BxL: int32 ids.
      parts_BxL: int32 PROMPT, ANSWER (with its EOS), and behind them 0, padding.
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
    """(B, 1): with these weights, a sum over scored positions is the mean over rows of the mean over each row.

    Rows without scored positions do not count.
    """
    count_B = scored_BxT.sum(-1).astype(jnp.float32)
    rows = jnp.maximum((count_B > 0).sum().astype(jnp.float32), 1.0)
    return (1.0 / (jnp.maximum(count_B, 1.0) * rows))[:, None]
