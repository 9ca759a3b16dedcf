"""Strategies: transfer counts, ranking, confidence, and the reveal law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from diffusionlm.sampling import strategies
from diffusionlm.sampling.strategies import STRATEGIES, Step


def make_step(
    index=0, steps=1, *, logits, proposal=None, masked=None, initial=None, t=1.0, s=0.5, uniform=None, **rules
):
    logits = jnp.asarray(logits, jnp.float32)
    B, T = logits.shape[:2]
    masked = jnp.ones((B, T), bool) if masked is None else jnp.asarray(masked)
    defaults = dict(threshold=0.9, factor=1.0, entropy_bound=0.1, remask=0.0, position_temperature=0.0)
    return Step(
        index_B=jnp.full(B, index, jnp.int32),
        steps_B=jnp.full(B, steps, jnp.int32),
        mask_probability_t_B=jnp.full(B, t, jnp.float32),
        mask_probability_s_B=jnp.full(B, s, jnp.float32),
        logits_BxTxV=logits,
        proposal_BxT=jnp.argmax(logits, -1).astype(jnp.int32) if proposal is None else jnp.asarray(proposal, jnp.int32),
        masked_BxT=masked,
        revealed_BxT=~masked,
        initial_B=masked.sum(-1, dtype=jnp.int32) if initial is None else jnp.asarray(initial, jnp.int32),
        demoted_BxT=jnp.zeros((B, T), bool),
        uniform_BxT=jnp.zeros((B, T)) if uniform is None else jnp.asarray(uniform, jnp.float32),
        gumbel_BxT=jnp.zeros((B, T)),
        rules=strategies.Rules(**{k: jnp.float32(v) for k, v in (defaults | rules).items()}),
    )


@pytest.mark.parametrize(
    "masks, steps, expected",
    [
        (10, 4, [3, 3, 2, 2]),
        (7, 10, [1] * 7 + [0] * 3),
        (32, 12, [3] * 8 + [2] * 4),
        (5, 1, [5]),
        (0, 3, [0, 0, 0]),
    ],
)
def test_transfer_counts_are_lladas(masks, steps, expected):
    logits = np.zeros((1, 2, 3))
    counts = [
        int(strategies.transfer_count(make_step(i, steps, logits=logits, initial=[masks]))[0]) for i in range(steps)
    ]
    assert counts == expected


def test_highest_takes_the_count_of_each_row_and_only_masked_positions():
    score = jnp.array([[0.9, 0.5, 0.7, 0.1], [0.1, 0.2, 0.3, 0.4]])
    masked = jnp.array([[False, True, True, True], [True, True, False, True]])
    taken = strategies.highest(score, masked, jnp.array([2, 1], jnp.int32))
    assert taken.tolist() == [[False, True, True, False], [False, False, False, True]]
    assert strategies.highest(score, masked, jnp.array([4, 0], jnp.int32)).tolist() == [masked[0].tolist(), [False] * 4]


def test_highest_breaks_ties_from_the_left_and_survives_infinite_scores():
    score = jnp.array([[1.0, 2.0, 1.0, 2.0, 1.0], [-jnp.inf, -jnp.inf, jnp.inf, -jnp.inf, jnp.inf]])
    masked = jnp.array([[True] * 5, [False, False, True, True, True]])
    taken = strategies.highest(score, masked, jnp.array([3, 3], jnp.int32))
    assert taken.tolist() == [[True, True, False, True, False], [False, False, True, True, True]]


def test_log_odds_order_as_float64_probabilities_where_float32_ones_saturate():
    gaps = np.array([18.0, 22.0, 20.0, 19.0])  # 1 - p of about exp(-gap): all are exactly 1 in float32
    logits = np.stack([gaps, np.zeros(4), np.full(4, -1.0)], -1)[None]
    odds = np.asarray(strategies.log_odds(make_step(logits=logits)))
    p = special.softmax(logits.astype(np.float64), -1)[..., 0]
    assert (special.softmax(logits.astype(np.float32), -1)[..., 0] == 1).all()
    np.testing.assert_allclose(odds, np.log(p) - np.log1p(-p), rtol=1e-5)
    assert np.argsort(-odds[0]).tolist() == [1, 2, 3, 0]


def test_log_odds_are_of_the_proposal_with_suppressed_ids_out_of_the_softmax():
    logits = np.array([[[1.0, 2.0, -np.inf, 0.5], [0.0, -np.inf, -np.inf, -np.inf]]])
    odds = np.asarray(strategies.log_odds(make_step(logits=logits, proposal=[[3, 0]])))
    p = np.exp(0.5) / (np.exp(1) + np.exp(2) + np.exp(0.5))
    np.testing.assert_allclose(odds[0, 0], np.log(p / (1 - p)), rtol=1e-6)
    assert odds[0, 1] == np.inf


def test_low_confidence_reveals_the_most_probable_proposals():
    logits = np.zeros((1, 4, 3))
    logits[0, :, 0] = [1.0, 4.0, 2.0, 3.0]
    revealed = STRATEGIES["low_confidence"](make_step(0, 2, logits=logits)).reveal_BxT
    assert revealed.tolist() == [[False, True, False, True]]


def test_low_confidence_judges_the_drawn_token_and_not_the_likeliest():
    logits = np.log(np.array([[[0.9, 0.1], [0.4, 0.6]]]))
    revealed = STRATEGIES["low_confidence"](make_step(0, 2, logits=logits, proposal=[[1, 1]])).reveal_BxT
    assert revealed.tolist() == [[False, True]]


def test_left_to_right_takes_the_first_masked_positions():
    masked = [[False, True, False, True, True]]
    revealed = STRATEGIES["left_to_right"](make_step(0, 2, logits=np.zeros((1, 5, 2)), masked=masked)).reveal_BxT
    assert revealed.tolist() == [[False, True, False, True, False]]


def test_ancestral_reveals_with_the_given_probability():
    uniform = np.asarray(jax.random.uniform(jax.random.key(0), (1, 100_000)))
    step = make_step(logits=np.zeros((1, 100_000, 1)), t=1.0, s=0.7, uniform=uniform)
    rate = float(STRATEGIES["ancestral"](step).reveal_BxT.mean())
    assert abs(rate - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 100_000)
