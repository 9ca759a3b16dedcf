"""Strategies decide which masked positions a denoising step reveals, and which tokens it takes back.

A strategy is a pure function of one `Step` that returns a `Decision`. The loop compiles all of them into one switch, so
choosing another does not recompile. A new strategy is one new function and one entry in `STRATEGIES`. The loop keeps to
the active block of each row, and reveals all that is left of it at its last step, whatever a strategy says.

Ties are broken from the left: of equal scores the leftmost position comes first.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusionlm.parallel.mesh import Array


class Rules(NamedTuple):
    """The parameters of the strategies, as data."""

    threshold: Array  # float32: of `confidence_threshold`
    factor: Array  # float32: of `confidence_factor`
    entropy_bound: Array  # float32, nats: of `entropy_bound`
    remask: Array  # float32: the cap of `remdm`
    position_temperature: Array  # float32: of the order in which positions are chosen; 0: the best first
    transfer_until: Array  # float32: of `transfer_count`


class Scores(IntEnum):
    """The scores that a strategy needs; entropy and margin come with the log-odds."""

    NONE = 0
    LOG_ODDS = 1
    ENTROPY = 2
    MARGIN = 3


class Proposal(NamedTuple):
    """The token drawn at every masked position of the active block, and how confident the model is in it.

    The judging distribution is the model's own or, where `confidence` is "drawn", the one that tokens are drawn from.
    """

    token_BxT: jax.Array  # int32
    log_odds_BxT: jax.Array  # float32: log(p / (1 - p)) of the probability p of the token in the judging distribution
    entropy_BxT: jax.Array  # float32, nats: of the judging distribution
    margin_BxT: jax.Array  # float32: the probability of the likeliest token minus that of the second


class Step(NamedTuple):
    """The state before a reveal and the proposed tokens, as a strategy sees them. S is the number of block steps."""

    index_B: jax.Array  # int32: this step of the active block, counted from 0
    steps_B: jax.Array  # int32: S
    mask_probability_t_B: jax.Array  # float32: 1 - alpha(t) before this step, t = 1 - index / S
    mask_probability_s_B: jax.Array  # float32: 1 - alpha(s) after it, s = t - 1 / S; 0 at the last step
    proposal: Proposal  # with the scores that `SCORES` says
    masked_BxT: jax.Array  # bool: still to be revealed, in the active block
    revealed_BxT: jax.Array  # bool: generated already, in the active block
    initial_B: jax.Array  # int32: masked positions of the block before its first step
    demoted_BxT: jax.Array  # bool: proposals that have no confidence (end of text, where the settings say so)
    uniform_BxT: jax.Array  # float32 in [0, 1): fresh noise
    gumbel_BxT: jax.Array  # float32: fresh noise
    rules: Rules


class Decision(NamedTuple):
    """The changes of the active block."""

    reveal_BxT: jax.Array  # bool: masked positions that keep their proposals
    remask_BxT: jax.Array  # bool: revealed positions that become masks again


# --- each position on its own


def ancestral(step: Step) -> Decision:
    """Reveal each masked position on its own, with the reverse process's probability (MDLM, arXiv 2406.07524).

    This approaches the model's own distribution as steps grow, so it suits models of any quality. Drawing the reveal
    and the token apart is the same law as one categorical over the vocabulary and the mask (MD4's "ancestral"; with
    `top_p` its "topp"), and keeps the float32 tail that such a categorical loses when the reveal probability is small.
    MD4's "mean", Dream's "origin" and DiffuLLaMA's sampler are this one.
    """
    reveal_B = 1 - step.mask_probability_s_B / step.mask_probability_t_B
    return _reveal(step.uniform_BxT < reveal_B[:, None])


def remdm(step: Step) -> Decision:
    """Reveal as `ancestral`, and mask revealed tokens again with probability sigma (ReMDM-cap, arXiv 2503.00307).

    sigma is the cap `remask`, at most (1 - alpha(s)) / alpha(t), and masks are revealed with probability
    (alpha(s) - (1 - sigma) alpha(t)) / (1 - alpha(t)), which keeps the share of masks on schedule.
    """
    alpha_t_B, alpha_s_B = 1 - step.mask_probability_t_B, 1 - step.mask_probability_s_B
    most_B = step.mask_probability_s_B / jnp.maximum(alpha_t_B, 1e-12)
    sigma_B = jnp.minimum(step.rules.remask, jnp.minimum(most_B, 1.0))
    reveal_B = (alpha_s_B - (1 - sigma_B) * alpha_t_B) / step.mask_probability_t_B
    return Decision(step.uniform_BxT < reveal_B[:, None], step.uniform_BxT < sigma_B[:, None])


# --- a number of positions, the best first


def fixed_count(step: Step) -> Decision:
    """Reveal random positions, leaving round((1 - alpha(s)) N) of the N masks: `ancestral` with its counts fixed."""
    remaining_B = jnp.round(step.initial_B.astype(jnp.float32) * step.mask_probability_s_B).astype(jnp.int32)
    count_B = jnp.maximum(step.masked_BxT.sum(-1, dtype=jnp.int32) - remaining_B, 0)
    return _reveal(highest(step.uniform_BxT, step.masked_BxT, count_B))


def random(step: Step) -> Decision:
    """Reveal random positions, an even share a step (LLaDA's "random remasking", arXiv 2502.09992)."""
    return _reveal(highest(step.uniform_BxT, step.masked_BxT, transfer_count(step)))


def low_confidence(step: Step) -> Decision:
    """Reveal the most confident proposals, an even share a step (LLaDA's "low-confidence remasking", 2502.09992).

    Confidence is the un-tempered probability of the proposed token (unless `confidence` says otherwise). This
    suits strong models: weak ones are most confident in line breaks and commas, and repeat them. On a canvas of nothing
    but masks a model with rotary positions sees all positions alike, and rounding decides.
    """
    return _best(step, step.proposal.log_odds_BxT, confidence(step))


def entropy(step: Step) -> Decision:
    """Reveal the positions whose distribution has the lowest entropy, an even share a step (Dream's "entropy")."""
    score_BxT = -step.proposal.entropy_BxT
    return _best(step, score_BxT, score_BxT)


def margin(step: Step) -> Decision:
    """Reveal the positions where the likeliest token leads by most, an even share a step (Dream's "topk_margin")."""
    return _best(step, step.proposal.margin_BxT, step.proposal.margin_BxT)


def left_to_right(step: Step) -> Decision:
    """Reveal the leftmost masked positions, an even share a step."""
    T = step.masked_BxT.shape[1]
    score_BxT = jnp.broadcast_to(-jnp.arange(T, dtype=jnp.float32), step.masked_BxT.shape)
    return _reveal(highest(score_BxT, step.masked_BxT, transfer_count(step)))


def smdm_greedy(step: Step) -> Decision:
    """Reveal as `low_confidence` on SMDM's "greddy" schedule: int(M (1 - s/t)) of M masks, on times from 1 to 1e-5.

    Rounding down, it may reveal nothing in its first steps. M counts the masks of the row; in SMDM's released code it
    counts those of the whole batch, for which all rows compete.
    """
    score_BxT = _demoted_last(step, step.proposal.log_odds_BxT)
    return _reveal(highest(score_BxT, step.masked_BxT, _scheduled_count(step, SMDM_UNTIL)))


# --- all positions that are confident enough


def confidence_threshold(step: Step) -> Decision:
    """Reveal all proposals with a probability of at least `threshold`, and always the best (Fast-dLLM, 2505.22618)."""
    confident_BxT = (confidence(step) >= step.rules.threshold) & ~step.demoted_BxT
    return _reveal(confident_BxT | _first(step, _demoted_last(step, step.proposal.log_odds_BxT)))


def confidence_factor(step: Step) -> Decision:
    """Reveal the n most confident, n >= 1 the largest with (n + 1)(1 - n-th confidence) < `factor` (Fast-dLLM)."""
    score_BxT = _demoted_last(step, step.proposal.log_odds_BxT)
    order_BxT, rank_BxT = _ranks(score_BxT, step.masked_BxT)
    doubt_BxT = jnp.where(step.masked_BxT & ~step.demoted_BxT, 1 - confidence(step), 1.0)
    n_T = jnp.arange(1, doubt_BxT.shape[1] + 1, dtype=jnp.float32)
    fits_BxT = (n_T[None] + 1) * jnp.take_along_axis(doubt_BxT, order_BxT, axis=-1) < step.rules.factor
    count_B = jnp.maximum(jnp.where(fits_BxT, jnp.arange(1, n_T.size + 1)[None], 0).max(-1), 1)
    return _reveal(step.masked_BxT & (rank_BxT < count_B[:, None]))


def entropy_bound(step: Step) -> Decision:
    """Reveal the lowest entropies, as many as keep sum(H) - max(H) within `entropy_bound`, at least one (2505.24857).

    The sum without its largest member bounds what drawing the tokens independently of each other can cost, in nats.
    """
    H_BxT = step.proposal.entropy_BxT
    order_BxT, rank_BxT = _ranks(-H_BxT, step.masked_BxT)
    sorted_BxT = jnp.take_along_axis(jnp.where(step.masked_BxT, H_BxT, jnp.inf), order_BxT, axis=-1)
    before_BxT = jnp.cumsum(jnp.where(jnp.isfinite(sorted_BxT), sorted_BxT, 0.0), axis=-1) - jnp.where(
        jnp.isfinite(sorted_BxT), sorted_BxT, 0.0
    )
    fits_BxT = jnp.isfinite(sorted_BxT) & (before_BxT <= step.rules.entropy_bound)  # sorted: the n-th is the maximum
    count_B = jnp.maximum(fits_BxT.sum(-1), 1)
    return _reveal(step.masked_BxT & (rank_BxT < count_B[:, None]))


STRATEGIES: dict[str, Callable[[Step], Decision]] = {
    "ancestral": ancestral,
    "remdm": remdm,
    "fixed_count": fixed_count,
    "random": random,
    "low_confidence": low_confidence,
    "entropy": entropy,
    "margin": margin,
    "left_to_right": left_to_right,
    "smdm_greedy": smdm_greedy,
    "confidence_threshold": confidence_threshold,
    "confidence_factor": confidence_factor,
    "entropy_bound": entropy_bound,
}

SCORES = dict.fromkeys(STRATEGIES, Scores.LOG_ODDS) | {  # the scores that each needs
    **dict.fromkeys(("ancestral", "remdm", "fixed_count", "random", "left_to_right"), Scores.NONE),
    **dict.fromkeys(("entropy", "entropy_bound"), Scores.ENTROPY),
    "margin": Scores.MARGIN,
}
SMDM_UNTIL = 1e-5  # the last time of its schedule
REMASKING = ("remdm",)  # these use every step of a block, since they may take revealed tokens back


# --- what they share


def transfer_count(step: Step) -> jax.Array:
    """Return how many positions of each row this step reveals: an even share of the masks, the remainder going first.

    This is LLaDA's rule: 10 masks in 4 steps give 3, 3, 2, 2. With more steps than masks the last steps give 0. Where
    `transfer_until` is not 0 it is Dream's rule, int(M (1 - s/t)) of the M remaining masks, on times from 1 to
    `transfer_until`, which rounds down and leaves the rest to the last step.

    Returns:
      int32 (B,).
    """
    remainder_B = step.initial_B % step.steps_B
    even_B = step.initial_B // step.steps_B + (step.index_B < remainder_B).astype(jnp.int32)
    until = step.rules.transfer_until
    return jnp.where(until > 0, _scheduled_count(step, until), even_B)


def _scheduled_count(step: Step, until: Array | float) -> jax.Array:
    """Return int(M (1 - s/t)) for the M masks of each row, on times from 1 to `until`. int32 (B,)."""
    masks_B = step.masked_BxT.sum(-1, dtype=jnp.int32)
    S = step.steps_B.astype(jnp.float32)
    t_B, s_B = (1 - (step.index_B + i).astype(jnp.float32) / S * (1 - until) for i in (0, 1))
    return jnp.floor(masks_B.astype(jnp.float32) * (1 - s_B / t_B)).astype(jnp.int32)


def confidence(step: Step) -> jax.Array:
    """Return the probability of each proposed token in the judging distribution, float32 (B, T)."""
    return jax.nn.sigmoid(step.proposal.log_odds_BxT)


def highest(score_BxT: jax.Array, masked_BxT: jax.Array, count_B: jax.Array) -> jax.Array:
    """Mark the `count_B` masked positions of each row with the highest scores. bool (B, T)."""
    _, rank_BxT = _ranks(score_BxT, masked_BxT)
    return masked_BxT & (rank_BxT < count_B[:, None])


def _ranks(score_BxT: jax.Array, masked_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return each row's positions in falling order of score, unmasked ones last; and the rank of each position."""
    lowest = jnp.finfo(jnp.float32).min
    score_BxT = jnp.where(masked_BxT, jnp.maximum(score_BxT, lowest), -jnp.inf)
    order_BxT = jnp.argsort(-score_BxT, axis=-1, stable=True)
    return order_BxT, jnp.argsort(order_BxT, axis=-1)


def _best(step: Step, score_BxT: jax.Array, tempered_BxT: jax.Array) -> Decision:
    """Reveal an even share of the masks by score; with a position temperature, draw it without replacement.

    The draw is from softmax(tempered / position_temperature) over positions, as Dream's `alg_temp`, by Gumbel top-k.
    """
    temperature = step.rules.position_temperature
    drawn_BxT = tempered_BxT / jnp.where(temperature > 0, temperature, 1.0) + step.gumbel_BxT
    score_BxT = _demoted_last(step, jnp.where(temperature > 0, drawn_BxT, score_BxT))
    return _reveal(highest(score_BxT, step.masked_BxT, transfer_count(step)))


def _demoted_last(step: Step, score_BxT: jax.Array) -> jax.Array:
    return jnp.where(step.demoted_BxT, -jnp.inf, score_BxT)


def _first(step: Step, score_BxT: jax.Array) -> jax.Array:
    return highest(score_BxT, step.masked_BxT, jnp.ones_like(step.initial_B))


def _reveal(reveal_BxT: jax.Array) -> Decision:
    return Decision(reveal_BxT, jnp.zeros_like(reveal_BxT))
