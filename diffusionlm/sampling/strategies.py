"""Which masked positions a denoising step reveals.

A strategy is a pure function of one `Step` that returns the positions whose proposed tokens are kept. The loop compiles
all of them into one switch, so choosing another does not recompile. A new strategy is one new function and one entry in
`STRATEGIES`. The loop reveals masked positions only, and all that are left at the last step, whatever a strategy says.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Step(NamedTuple):
    """What a strategy may look at: the state before the reveal, and the proposed tokens."""

    index: jax.Array  # int32 scalar: this step, counted from 0
    steps: jax.Array  # int32 scalar: how many steps there are
    reveal_probability: jax.Array  # float32 scalar: (alpha(s) - alpha(t)) / (1 - alpha(t)) for this step from t to s
    logits_BxTxV: jax.Array  # float32, un-tempered; suppressed ids are -inf
    proposal_BxT: jax.Array  # int32: the token drawn at every position
    masked_BxT: jax.Array  # bool: still to be revealed
    initial_B: jax.Array  # int32: how many positions were masked before step 0
    uniform_BxT: jax.Array  # float32 in [0, 1): fresh noise


def ancestral(step: Step) -> jax.Array:
    """Each masked position on its own, with the reverse process's probability (MDLM, arXiv 2406.07524).

    Approaches the model's own distribution as steps grow, so it suits models of any quality. Drawing the reveal and the
    token apart is the same law as one categorical over the vocabulary and the mask, without the float32 tail that such
    a categorical loses when the reveal probability is small.
    """
    return step.uniform_BxT < step.reveal_probability


def low_confidence(step: Step) -> jax.Array:
    """The most confident proposals, an even share a step (LLaDA's "low-confidence remasking", arXiv 2502.09992).

    Confidence is the un-tempered probability of the proposed token, whatever the temperature it was drawn at. Suits
    strong models: weak ones are surest of line breaks and commas, and repeat them. On a canvas of nothing but masks a
    model with rotary positions sees all positions alike, and rounding decides.
    """
    return highest(log_odds(step), step.masked_BxT, transfer_count(step))


def left_to_right(step: Step) -> jax.Array:
    """The leftmost masked positions, on the same schedule as `low_confidence`."""
    T = step.masked_BxT.shape[1]
    score_BxT = jnp.broadcast_to(-jnp.arange(T, dtype=jnp.float32), step.masked_BxT.shape)
    return highest(score_BxT, step.masked_BxT, transfer_count(step))


STRATEGIES: dict[str, Callable[[Step], jax.Array]] = {
    "ancestral": ancestral,
    "low_confidence": low_confidence,
    "left_to_right": left_to_right,
}


def transfer_count(step: Step) -> jax.Array:
    """How many positions of each row this step reveals: an even split of the initial masks, the remainder going first.

    LLaDA's rule: 10 masks in 4 steps give 3, 3, 2, 2. With more steps than masks the last steps give 0.

    Returns:
      int32 (B,).
    """
    remainder_B = step.initial_B % step.steps
    return step.initial_B // step.steps + (step.index < remainder_B).astype(jnp.int32)


def log_odds(step: Step) -> jax.Array:
    """log(p / (1 - p)) for the un-tempered probability p of each proposed token, float32 (B, T).

    The same order as p, but it does not saturate: in float32 all p above 1 - 6e-8 are equal, and ties would then reveal
    confident positions from left to right.
    """
    V = step.logits_BxTxV.shape[-1]
    chosen_BxTx1 = step.proposal_BxT[..., None]
    is_chosen_BxTxV = jnp.arange(V, dtype=jnp.int32)[None, None] == chosen_BxTx1
    others_BxT = jax.nn.logsumexp(jnp.where(is_chosen_BxTxV, -jnp.inf, step.logits_BxTxV), axis=-1)
    return jnp.take_along_axis(step.logits_BxTxV, chosen_BxTx1, axis=-1)[..., 0] - others_BxT


def highest(score_BxT: jax.Array, masked_BxT: jax.Array, count_B: jax.Array) -> jax.Array:
    """The `count_B` masked positions of each row with the highest scores; of equal scores the leftmost comes first.

    Returns:
      bool (B, T).
    """
    lowest = jnp.finfo(jnp.float32).min
    score_BxT = jnp.where(masked_BxT, jnp.maximum(score_BxT, lowest), -jnp.inf)
    order_BxT = jnp.argsort(-score_BxT, axis=-1, stable=True)
    rank_BxT = jnp.argsort(order_BxT, axis=-1)
    return masked_BxT & (rank_BxT < count_B[:, None])
