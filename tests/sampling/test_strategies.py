"""Strategies: transfer counts, ranking, confidence, and the reveal law."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from support.slow_cases import slow_but, thinned

from diffusionlm.sampling import strategies
from diffusionlm.sampling.propose import confidence_scores
from diffusionlm.sampling.strategies import SCORES, STRATEGIES, Scores, Step


@jax.jit
def all_scores(logits, token):
    by_entropy, by_margin = (
        confidence_scores(logits, token, jnp.int32(kind)) for kind in (Scores.ENTROPY, Scores.MARGIN)
    )
    return by_entropy._replace(margin_BxT=by_margin.margin_BxT)


def make_step(
    index=0, steps=1, *, logits, proposal=None, masked=None, initial=None, t=1.0, s=0.5, uniform=None, **rules
):
    # NumPy's arrays are put on the device as they are: each of JAX's would be a program of its own.
    logits = np.asarray(logits, np.float32)
    proposal = np.argmax(logits, -1) if proposal is None else np.asarray(proposal)
    B, T = logits.shape[:2]
    masked = np.ones((B, T), bool) if masked is None else np.asarray(masked)
    defaults = dict(
        threshold=0.9, factor=1.0, entropy_bound=0.1, remask=0.0, position_temperature=0.0, transfer_until=0.0
    )
    step = Step(
        index_B=np.full(B, index, np.int32),
        steps_B=np.full(B, steps, np.int32),
        mask_probability_t_B=np.full(B, t, np.float32),
        mask_probability_s_B=np.full(B, s, np.float32),
        proposal=all_scores(logits, proposal.astype(np.int32)),
        masked_BxT=masked,
        revealed_BxT=~masked,
        initial_B=masked.sum(-1, dtype=np.int32) if initial is None else np.asarray(initial, np.int32),
        demoted_BxT=np.zeros((B, T), bool),
        uniform_BxT=np.zeros((B, T), np.float32) if uniform is None else np.asarray(uniform, np.float32),
        gumbel_BxT=np.zeros((B, T), np.float32),
        rules=strategies.Rules(**{k: np.float32(v) for k, v in (defaults | rules).items()}),
    )
    return jax.device_put(step)


def log_odds(step):
    return step.proposal.log_odds_BxT


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


def test_ties_among_many_positions_are_broken_from_the_left():
    """A sort that is not stable keeps the order of a few equal numbers, but not of a thousand."""
    score = jnp.asarray(np.arange(1000) % 3, jnp.float32)[None]
    taken = strategies.highest(score, jnp.ones((1, 1000), bool), jnp.array([400], jnp.int32))
    expected = sorted(range(1000), key=lambda j: (-(j % 3), j))[:400]
    assert np.flatnonzero(taken[0]).tolist() == sorted(expected)


def test_log_odds_order_as_float64_probabilities_where_float32_ones_saturate():
    gaps = np.array([18.0, 22.0, 20.0, 19.0])  # 1 - p of about exp(-gap): all are exactly 1 in float32
    logits = np.stack([gaps, np.zeros(4), np.full(4, -1.0)], -1)[None]
    odds = np.asarray(log_odds(make_step(logits=logits)))
    p = special.softmax(logits.astype(np.float64), -1)[..., 0]
    assert (special.softmax(logits.astype(np.float32), -1)[..., 0] == 1).all()
    np.testing.assert_allclose(odds, np.log(p) - np.log1p(-p), rtol=1e-5)
    assert np.argsort(-odds[0]).tolist() == [1, 2, 3, 0]


def test_log_odds_are_of_the_proposal_with_suppressed_ids_out_of_the_softmax():
    logits = np.array([[[1.0, 2.0, -np.inf, 0.5], [0.0, -np.inf, -np.inf, -np.inf]]])
    odds = np.asarray(log_odds(make_step(logits=logits, proposal=[[3, 0]])))
    p = np.exp(0.5) / (np.exp(1) + np.exp(2) + np.exp(0.5))
    np.testing.assert_allclose(odds[0, 0], np.log(p / (1 - p)), rtol=1e-6)
    assert odds[0, 1] == np.inf


def test_scores_are_the_numbers_of_the_branches_that_compute_them():
    """`propose` switches by these numbers, and the loop raises them to LOG_ODDS where it needs a confidence."""
    assert {score.name: int(score) for score in Scores} == {"NONE": 0, "LOG_ODDS": 1, "ENTROPY": 2, "MARGIN": 3}


@pytest.mark.parametrize("name", thinned(STRATEGIES, every=2))
def test_strategies_look_at_no_more_than_they_say(name):
    """With the scores that `SCORES` names, and garbage for the others."""
    step = make_step(1, 4, logits=LOGITS, masked=MASKED, uniform=RNG.random((3, 9)))
    kept = {"token_BxT"} | {
        Scores.NONE: set(),
        Scores.LOG_ODDS: {"log_odds_BxT"},
        Scores.ENTROPY: {"log_odds_BxT", "entropy_BxT"},
        Scores.MARGIN: {"log_odds_BxT", "margin_BxT"},
    }[SCORES[name]]
    other = {
        field: jnp.asarray(RNG.normal(size=(3, 9)), jnp.float32) for field in step.proposal._fields if field not in kept
    }
    blinded = step._replace(proposal=step.proposal._replace(**other))
    for a, b in zip(STRATEGIES[name](step), STRATEGIES[name](blinded), strict=True):
        np.testing.assert_array_equal(a, b)


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


@pytest.mark.parametrize(
    "t, s, cap", [(0.8, 0.6, 0.3), (0.9, 0.5, 1.0), (0.2, 0.1, 0.5), (1.0, 0.7, 0.4), (0.3, 0.0, 0.2)]
)
def test_remdm_keeps_the_share_of_masks_on_schedule(t, s, cap):
    """A canvas with a share t of masks has a share s afterwards, for any cap (ReMDM, arXiv 2503.00307)."""
    n = 1000  # of each kind; the noise of position i is (i + 1/2) / n, so that a share p of it lies below p
    masked = np.arange(2 * n)[None] < n
    uniform = (np.arange(2 * n)[None] % n + 0.5) / n
    decision = STRATEGIES["remdm"](
        make_step(logits=np.zeros((1, 2 * n, 1)), masked=masked, t=t, s=s, uniform=uniform, remask=cap)
    )
    reveal = float((decision.reveal_BxT & masked).sum() / n)
    remask = float((decision.remask_BxT & ~masked).sum() / n)
    assert remask == pytest.approx(min(cap, 1.0, s / max(1 - t, 1e-12)), abs=1.1 / n)
    assert t * (1 - reveal) + (1 - t) * remask == pytest.approx(s, abs=2.2 / n)


# --- against slow references on random logits


RNG = np.random.default_rng(5)
LOGITS = RNG.normal(scale=2.0, size=(3, 9, 6))
MASKED = np.array([[True] * 9, [False, True] * 4 + [True], [True] * 3 + [False] * 6])
P = special.softmax(LOGITS, -1)


def revealed(name, **kwargs) -> list[set[int]]:
    kwargs = {"logits": LOGITS, "masked": MASKED, **kwargs}
    reveal = np.asarray(STRATEGIES[name](make_step(**kwargs)).reveal_BxT) & MASKED
    return [set(np.flatnonzero(row).tolist()) for row in reveal]


def best(row: int, score: np.ndarray, count: int) -> set[int]:
    masked = np.flatnonzero(MASKED[row]).tolist()
    return set(sorted(masked, key=lambda j: (-score[j], j))[:count])


COUNTS = [3, 2, 1]  # of 9, 5 and 3 masks in 4 steps, in the first of them


def test_entropy_and_margin_take_the_surest_positions():
    H = -(P * np.log(P)).sum(-1)
    top = np.sort(P, -1)
    lead = top[..., -1] - top[..., -2]
    assert revealed("entropy", steps=4) == [best(r, -H[r], n) for r, n in enumerate(COUNTS)]
    assert revealed("margin", steps=4) == [best(r, lead[r], n) for r, n in enumerate(COUNTS)]


def test_random_takes_as_many_by_noise_alone():
    noise = RNG.random((3, 9))
    assert revealed("random", steps=4, uniform=noise) == [best(r, noise[r], n) for r, n in enumerate(COUNTS)]
    # The schedule wants half of the masks gone, and the same of those that were there at first.
    rows = revealed("fixed_count", s=0.5, uniform=noise, initial=[9, 8, 3])
    assert [len(row) for row in rows] == [9 - 4, 5 - 4, 3 - 2]  # round half to even: 4.5, 4, 1.5


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.99])
def test_threshold_takes_all_that_is_sure_and_at_least_one(threshold):
    p = P.max(-1)
    expected = [{j for j in range(9) if MASKED[r, j] and p[r, j] >= threshold} or best(r, p[r], 1) for r in range(3)]
    assert revealed("confidence_threshold", threshold=threshold) == expected


@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0])
def test_factor_is_its_definition(factor):
    expected = []
    for r in range(3):
        p = np.sort(P[r].max(-1)[MASKED[r]])[::-1]
        n = max([k for k in range(1, len(p) + 1) if (k + 1) * (1 - p[k - 1]) < factor], default=1)
        expected.append(best(r, P[r].max(-1), n))
    assert revealed("confidence_factor", factor=factor) == expected


@pytest.mark.parametrize("bound", [0.0, 0.4, 2.0, 100.0])
def test_entropy_bound_is_its_definition(bound):
    H = -(P * np.log(P)).sum(-1)
    expected = []
    for r in range(3):
        h = np.sort(H[r][MASKED[r]])
        n = max(k for k in range(1, len(h) + 1) if h[:k].sum() - h[:k].max() <= bound)
        expected.append(best(r, -H[r], n))
    assert revealed("entropy_bound", entropy_bound=bound) == expected


def counts_on_time(name: str, masks: int, steps: int, **rules) -> list[int]:
    """Return how many of a row's masks each step reveals; the last reveals all that remain."""
    decide = jax.jit(STRATEGIES[name])
    step = make_step(0, steps, logits=np.zeros((1, masks, 2)), initial=[masks], **rules)
    remaining, counts = masks, []
    for i in range(steps - 1):
        masked = (np.arange(masks) < remaining)[None]
        step = step._replace(index_B=np.array([i], np.int32), masked_BxT=masked, revealed_BxT=~masked)
        counts.append(int((np.asarray(decide(step).reveal_BxT) & masked).sum()))
        remaining -= counts[-1]
    return [*counts, remaining]


@pytest.mark.parametrize(
    "masks, steps, expected", [(200, 256, [0] * 57 + [1] * 198 + [2]), (256, 128, [1] + [2] * 126 + [3])]
)
def test_smdms_schedule_is_golden(masks, steps, expected):
    assert counts_on_time("smdm_greedy", masks, steps) == expected
    assert counts_on_time("smdm_greedy", 40, 32)[0] == 1 and counts_on_time("smdm_greedy", 40, 32)[-1] == 3


@pytest.mark.parametrize(
    "name", slow_but(["entropy", "low_confidence", "margin", "random", "left_to_right"], ("entropy", "random"))
)
def test_dreams_schedule_is_golden(name):
    """With as many tokens as steps, none is revealed first and two last; 257 of 512 steps of 256 tokens are empty."""
    counts = functools.partial(counts_on_time, name, transfer_until=1e-3)
    assert counts(256, 256) == [0] + [1] * 254 + [2]
    assert counts(128, 64) == [1] + [2] * 62 + [3]
    if name == "entropy":
        assert counts(256, 512).count(0) == 257


def released_smdm_greedy(step):
    """SMDM's "greddy" as it was released: M counts the masks of the whole batch, which all rows compete for."""
    M = int(step.masked_BxT.sum())
    t, s = (1 - (int(step.index_B[0]) + i) / int(step.steps_B[0]) * (1 - strategies.SMDM_UNTIL) for i in (0, 1))
    p = np.where(step.masked_BxT, special.expit(np.asarray(log_odds(step), np.float64)), -1)
    taken = np.zeros(p.size, bool)
    taken[np.argsort(-p.ravel())[: int(M * (1 - s / t))]] = True
    return taken.reshape(p.shape)


@pytest.mark.parametrize("index", [0, 2])
def test_smdms_greedy_is_the_released_one_on_each_row_by_itself(index):
    """In a batch the released form lets rows compete, so that a row depends on its mates."""
    alone = []
    for r in range(3):
        step = make_step(index, 4, logits=LOGITS[r : r + 1], masked=MASKED[r : r + 1])
        alone.append(released_smdm_greedy(step)[0])
    together = make_step(index, 4, logits=LOGITS, masked=MASKED)
    np.testing.assert_array_equal(STRATEGIES["smdm_greedy"](together).reveal_BxT, alone)
    assert (released_smdm_greedy(together) != np.array(alone)).any()


def test_demoted_proposals_come_last():
    step = make_step(0, 2, logits=LOGITS[:1], masked=MASKED[:1])
    demoted = np.zeros((1, 9), bool)
    demoted[0, np.argsort(-P[0].max(-1))[:3]] = True  # the surest three
    taken = np.asarray(STRATEGIES["low_confidence"](step._replace(demoted_BxT=jnp.asarray(demoted))).reveal_BxT)
    assert taken.sum() == 5 and not (taken & demoted).any()
    last = step._replace(steps_B=jnp.ones(1, jnp.int32), demoted_BxT=jnp.asarray(demoted))
    assert np.asarray(STRATEGIES["low_confidence"](last).reveal_BxT).all()


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_demoted_proposals_count_as_wholly_doubtful(factor):
    """The demoted ones come last and have no confidence, so that only the others can be revealed beyond the first."""
    demoted = np.zeros((3, 9), bool)
    for r in range(3):
        demoted[r, np.argsort(np.where(MASKED[r], -P[r].max(-1), 2))[:2]] = True  # the surest two
    step = make_step(logits=LOGITS, masked=MASKED, factor=factor, threshold=0.3)._replace(demoted_BxT=demoted)
    expected = []
    for r in range(3):
        p = np.where(demoted[r], 0, P[r].max(-1))
        order = sorted(np.flatnonzero(MASKED[r]), key=lambda j: (demoted[r, j], -P[r, j].max()))
        fits = [k for k in range(1, len(order) + 1) if (k + 1) * (1 - p[order[k - 1]]) < factor]
        expected.append(set(order[: max(fits, default=1)]))
    taken = np.asarray(STRATEGIES["confidence_factor"](step).reveal_BxT)
    assert [set(np.flatnonzero(row)) for row in taken] == expected
    sure = np.asarray(STRATEGIES["confidence_threshold"](step).reveal_BxT)
    rest = MASKED & ~demoted
    best_rest = np.where(rest, P.max(-1), -1).argmax(-1)[:, None] == np.arange(9)
    np.testing.assert_array_equal(sure & MASKED, rest & ((P.max(-1) >= 0.3) | best_rest))


@pytest.mark.slow
def test_position_temperature_draws_without_replacement():
    """Two of three positions: the law of Dream's alg_temp, softmax(confidence / temperature) without replacement."""
    n, temperature = 20_000, 0.5
    p = np.array([0.8, 0.5, 0.4])
    logits = np.broadcast_to(np.log(np.stack([p, (1 - p) / 2, (1 - p) / 2], -1)), (n, 3, 3))
    gumbel = jax.random.gumbel(jax.random.key(0), (n, 3))
    step = make_step(0, 1, logits=logits, initial=[2] * n, position_temperature=temperature)._replace(gumbel_BxT=gumbel)
    left_out = np.asarray(~STRATEGIES["low_confidence"](step).reveal_BxT).argmax(1)
    w = special.softmax(p / temperature)
    law = [sum(w[i] * w[j] / (1 - w[i]) for i, j in ((a, b), (b, a))) for a, b in ((1, 2), (0, 2), (0, 1))]
    assert stats.chisquare(np.bincount(left_out, minlength=3), np.array(law) * n).pvalue > 1e-3
