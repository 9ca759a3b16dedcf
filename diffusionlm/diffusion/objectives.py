"""Training objectives on the shared trunk: the masked diffusion bound and the autoregressive cross-entropy."""

import jax
import jax.numpy as jnp
from flax import struct

from diffusionlm.config import Config, DiffusionConfig
from diffusionlm.config_data import ANSWER, PARTS, PROMPT
from diffusionlm.diffusion import schedules
from diffusionlm.diffusion.corruption import Corrupted

LEVELS = 10  # of noise, by which losses are reported: equal parts of the share of masked tokens


def level_names() -> list[str]:
    """Return the names of the levels of noise, such as "0.1-0.2"."""
    return [f"{level / LEVELS:.1f}-{(level + 1) / LEVELS:.1f}" for level in range(LEVELS)]


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
    level_B: jax.Array  # int32, the level of noise, in [0, LEVELS); 0 without noise
    # Of a mixture: int32, the source of each row; float32, its part of what the loss is a mean over, which sum to 1.
    source_B: jax.Array | None = None
    share_B: jax.Array | None = None


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
        weight_BxT *= _mean_of_means(corrupted.scored_BxT, corrupted.segment_ids_BxT)
    else:
        counted_BxT = masked_BxT if cfg.normalization == "masked_tokens" else corrupted.scored_BxT.astype(jnp.float32)
        weight_BxT /= jnp.maximum(counted_BxT.sum(), 1.0)
    if cfg.alignment == "shifted":
        tokens_BxT, weight_BxT, masked_BxT = (
            jnp.pad(x_BxT[:, 1:], ((0, 0), (0, 1))) for x_BxT in (tokens_BxT, weight_BxT, masked_BxT)
        )
    return Targets(
        corrupted.tokens_BxT, corrupted.segment_ids_BxT, tokens_BxT, weight_BxT, masked_BxT, noise_levels(corrupted)
    )


def row_shares(cfg: DiffusionConfig, corrupted: Corrupted) -> jax.Array:
    """Return the part that each row has in the mean that the loss of masked diffusion is. float32 (B,).

    The weights of `mdm_targets` are normalised over the batch. The part of its rows in the loss, divided by the sum of
    their shares, is the loss that these rows have alone.
    """
    scored_BxT = corrupted.scored_BxT.astype(jnp.float32)
    if cfg.normalization == "examples":
        return (scored_BxT * _mean_of_means(corrupted.scored_BxT, corrupted.segment_ids_BxT)).sum(-1)
    masked = cfg.normalization == "masked_tokens"
    counted_B = (corrupted.masked_BxT.astype(jnp.float32) if masked else scored_BxT).sum(-1)
    return counted_B / jnp.maximum(counted_B.sum(), 1.0)


def noise_levels(corrupted: Corrupted) -> jax.Array:
    """Return the level of noise of each row, by the share of its scored tokens that are masked. int32 (B,)."""
    masked_B, scored_B = corrupted.masked_BxT.sum(-1), corrupted.scored_BxT.sum(-1)
    return jnp.minimum(LEVELS * masked_B // jnp.maximum(scored_B, 1), LEVELS - 1)


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

    def before(visible_BxT: jax.Array, segment_ids_BxT: jax.Array) -> jax.Array:
        """Return the sum over j before i of (1 - p)^(i - j - 1) visible_j."""
        same_BxT = has_predecessor(segment_ids_BxT)
        decay_BxT = jnp.where(same_BxT, 1 - p, 0.0)
        upto_BxT = _decaying_sum(visible_BxT, decay_BxT)
        return jnp.where(same_BxT, jnp.pad(upto_BxT[:, :-1], ((0, 0), (1, 0))), 0.0)

    behind_BxT = before(visible_BxT[:, ::-1], segment_ids_BxT[:, ::-1])[:, ::-1]
    weight_BxT = 0.5 * p * (before(visible_BxT, segment_ids_BxT) + behind_BxT)
    return jnp.where(corrupted.masked_BxT, weight_BxT, 0.0)


def _decaying_sum(values_BxT: jax.Array, decay_BxT: jax.Array) -> jax.Array:
    """Return x with x_i = decay_i x_(i-1) + values_i along each row."""

    def combine(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return first[0] * second[0], first[1] * second[0] + second[1]

    return jax.lax.associative_scan(combine, (decay_BxT, values_BxT), axis=1)[1]


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
    return _arm(tokens_BxL, segments_BxT, weight_BxT, counted_BxT)


def _arm(tokens_BxL: jax.Array, segments_BxT: jax.Array, weight_BxT: jax.Array, counted_BxT: jax.Array) -> Targets:
    no_noise_B = jnp.zeros(len(tokens_BxL), jnp.int32)
    return Targets(tokens_BxL[:, :-1], segments_BxT, tokens_BxL[:, 1:], weight_BxT, counted_BxT, no_noise_B)


def example_segments(ids_BxT: jax.Array) -> jax.Array:
    """Return the number of the example that each token belongs to, from 1, and 0 at all padding. int32 (B, T)."""
    parts_BxT = ids_BxT % PARTS
    return jnp.where((parts_BxT == PROMPT) | (parts_BxT == ANSWER), ids_BxT // PARTS + 1, 0)


def arm_answer_targets(
    cfg: DiffusionConfig, tokens_BxL: jax.Array, ids_BxL: jax.Array, learn: str = "answers"
) -> Targets:
    """Return the targets of next-token prediction of answers given their prompts, in nats per token.

    The EOS of an answer is predicted and the padding after it is not: a text ends with its first EOS. With
    normalisation "examples" the loss is the mean over the tokens of each example and then over the examples; else the
    mean over all tokens of answers (as SMDM fine-tunes its autoregressive models).

    Args:
      cfg: gives the normalisation.
      tokens_BxL: int32 ids.
      ids_BxL: int32, examples and their parts, as records have them.
      learn: "answers"; or "all", which predicts the prompts too, but for their first token.
    """
    segments_BxL = example_segments(ids_BxL)
    scored_BxT = ids_BxL[:, 1:] % PARTS == ANSWER
    if learn == "all":
        scored_BxT = has_predecessor(segments_BxL)[:, 1:] & (segments_BxL[:, 1:] != 0)
    counted_BxT = scored_BxT.astype(jnp.float32)
    if cfg.normalization == "examples":
        weight_BxT = counted_BxT * _mean_of_means(scored_BxT, segments_BxL[:, 1:])
    else:
        weight_BxT = counted_BxT / jnp.maximum(counted_BxT.sum(), 1.0)
    return _arm(tokens_BxL, segments_BxL[:, :-1], weight_BxT, counted_BxT)


def _mean_of_means(scored_BxT: jax.Array, segment_ids_BxT: jax.Array) -> jax.Array:
    """Return weights (B, T) that make a sum over scored positions the mean over examples of the mean over each.

    Each segment of a row is an example. Those without scored positions do not count.
    """
    scored_BxT = scored_BxT.astype(jnp.float32)
    continues_BxT = has_predecessor(segment_ids_BxT).astype(jnp.float32)
    continued_BxT = jnp.pad(continues_BxT[:, 1:], ((0, 0), (0, 1)))  # by the token after it
    upto_BxT = _decaying_sum(scored_BxT, continues_BxT)
    from_BxT = _decaying_sum(scored_BxT[:, ::-1], continued_BxT[:, ::-1])[:, ::-1]
    count_BxT = upto_BxT + from_BxT - scored_BxT
    examples = ((continues_BxT == 0) & (count_BxT > 0)).sum().astype(jnp.float32)
    return 1.0 / (jnp.maximum(count_BxT, 1.0) * jnp.maximum(examples, 1.0))
