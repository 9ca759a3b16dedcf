"""Likelihood estimators as laws over masks, against an arbitrary table of cross-entropies: no network, no prompt.

The table gives every token under every mask a cross-entropy; the bound is then a finite sum.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support.released_estimators import DIFFULLAMA_DRAWS, RELEASED, llada_counts
from support.slow_cases import slow_but

from diffusionlm.likelihood import estimators
from diffusionlm.likelihood.estimators import PlanRequest

ESTIMATORS = estimators.ESTIMATORS | RELEASED

N = 5  # target tokens, in K places
K = 8
TABLE = np.random.default_rng(0).gamma(2.0, size=(2**N, N))  # [which are masked, token]
# More masks make a token harder, as of a real model: what makes the draws' spread over counts matter.
TABLE *= (1 + np.array([bin(m).count("1") for m in range(2**N)]))[:, None]


def bound() -> float:
    """The mean over all orders: sum over sets of masks, with probability 1/(n C(n, c)) and weight n/c."""
    total = 0.0
    for m in range(1, 2**N):
        masked = [i for i in range(N) if m >> i & 1]
        total += TABLE[m, masked].sum() / (math.comb(N, len(masked)) * len(masked))
    return total


def over_orders() -> float:
    """The same by its other definition: tokens predicted one by one, in an order that is uniform."""
    totals = []
    for order in itertools.permutations(range(N)):
        hidden = 2**N - 1
        total = 0.0
        for i in order:
            total += TABLE[hidden, i]
            hidden &= ~(1 << i)
        totals.append(total)
    return float(np.mean(totals))


@functools.cache
def _program(name: str, draws: int, places: int):
    def plan(key, first, n):
        return ESTIMATORS[name].plan(PlanRequest(n, places, draws, first, key))

    return jax.jit(jax.vmap(plan, in_axes=(0, None, None)))


def planner(name: str, draws: int, n: int = N, places: int = K):
    return lambda keys, first: _program(name, draws, places)(keys, first, jnp.int32(n))


def nats(plan, table=TABLE, n=N) -> np.ndarray:
    """Return the nats of each pass."""
    masked, weight = np.asarray(plan.masked_DxK), np.asarray(plan.weight_DxK)
    assert not masked[..., n:].any() and not weight[..., n:].any()
    which = masked[..., :n] @ (1 << np.arange(n))
    return (table[which] * weight[..., :n]).sum((-2, -1))


@functools.cache
def passes(name: str, draws: int, count: int, seed: int = 0) -> np.ndarray:
    return nats(planner(name, draws)(jax.random.split(jax.random.key(seed), count), jnp.int32(0)))


def test_the_two_definitions_of_the_bound_agree():
    assert bound() == pytest.approx(over_orders(), rel=1e-12)


@pytest.mark.parametrize(
    "name, draws",
    slow_but(itertools.product(("exact_count", "iid"), (1, 4, 8, 10)), (("exact_count", 8), ("iid", 1))),
)
def test_the_mean_over_passes_is_the_bound(name, draws):
    estimates = passes(name, draws, 20_000)
    assert abs(estimates.mean() - bound()) < 3.5 * estimates.std() / math.sqrt(len(estimates))


@pytest.mark.slow
def test_exact_count_has_the_lower_variance():
    for draws in (1, 8):
        assert passes("exact_count", draws, 20_000).var() < 0.9 * passes("iid", draws, 20_000).var()


def test_draws_of_a_pass_beat_independent_ones():
    assert passes("exact_count", 8, 20_000).var() < 0.8 * passes("exact_count", 1, 20_000).var() / 8


@pytest.mark.parametrize(
    "name, n",
    [("exact_count", 5), *(pytest.param(name, 32, marks=pytest.mark.slow) for name in ("exact_count", "iid"))],
)
def test_intervals_cover(name, n):
    """95% of Student's t over 8 passes of 16 draws, 1,000 times; 92 to 98% are asked for.

    A token's cross-entropy grows with the number of masks, and with a mask to its left, so that the bound, over counts
    c of masks, is a finite sum for any n.
    """
    rng = np.random.default_rng(n)
    own, more, to_left = rng.gamma(2.0, size=(3, n))
    to_left[0] = 0.0
    bound = 0.0
    for c in range(1, n + 1):  # n/c, times the probability c/n that a token is masked, times its mean cross-entropy
        bound += (own + more * c / n + to_left * (c - 1) / max(n - 1, 1)).sum() / n
    nats_of_keys = []
    for keys in jax.random.split(jax.random.key(7), (8, 1000)):  # in parts, to save memory
        plan = planner(name, 16, n, 8 if n <= 8 else 32)(keys, jnp.int32(0))
        masked, weight = np.asarray(plan.masked_DxK)[..., :n], np.asarray(plan.weight_DxK)[..., :n]
        before = np.pad(masked, ((0, 0), (0, 0), (1, 0)))[..., :n]
        nll = own + more * masked.mean(-1, keepdims=True) + to_left * before
        nats_of_keys.append((nll * weight).sum((1, 2)))
    estimates = np.stack(nats_of_keys, axis=1)  # (1000, 8)
    assert abs(estimates.mean() - bound) < 3.5 * estimates.std() / math.sqrt(estimates.size)
    reach = stats.t.ppf(0.975, 7) * estimates.std(axis=1, ddof=1) / math.sqrt(8)
    assert 0.92 < (np.abs(estimates.mean(axis=1) - bound) < reach).mean() < 0.98


def test_any_order_is_the_bound_in_any_chunks():
    keys = jax.random.split(jax.random.key(0), 1)  # not looked at
    for draws in (64, 7):
        total = sum(nats(planner("any_order", draws)(keys, jnp.int32(first)))[0] for first in range(0, 2**N - 1, draws))
        assert total == pytest.approx(bound(), rel=1e-5)
    assert ESTIMATORS["any_order"].rows(N) == 2**N - 1


def test_chain_rule_goes_from_left_to_right():
    expected = sum(TABLE[(2**N - 1) >> i << i, i] for i in range(N))
    keys = jax.random.split(jax.random.key(0), 1)
    for draws in (8, 2):
        total = sum(nats(planner("chain_rule", draws)(keys, jnp.int32(first)))[0] for first in range(0, N, draws))
        assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_dream_leaves_out_what_lies_below_its_least_time():
    """Integrated over t from 0.001 on by quadrature, its mean; a thousandth or so below the bound."""
    nodes, widths = np.polynomial.legendre.leggauss(60)
    t, widths = 1e-3 + (1 - 1e-3) * (nodes + 1) / 2, widths / 2
    sizes = np.array([bin(m).count("1") for m in range(2**N)])
    sums = np.array([TABLE[m, [i for i in range(N) if m >> i & 1]].sum() for m in range(2**N)])
    expected = ((t[:, None] ** sizes) * ((1 - t[:, None]) ** (N - sizes)) * sums / t[:, None] * widths[:, None]).sum()
    estimates = passes("dream", 4, 20_000)
    assert abs(estimates.mean() - expected) < 3.5 * estimates.std() / math.sqrt(len(estimates))
    assert expected != pytest.approx(bound(), rel=1e-4)


@pytest.mark.parametrize("name, least", slow_but([("iid", 0.0), ("dream", 1e-3)], (("iid", 0.0),)))
def test_times_are_a_lattice_with_one_offset(name, least):
    """t = (u + r/b) mod 1, mask probability p = least + (1 - least) t, weight 1/p; least is Dream's, and 0 SMDM's."""
    draws, n = 8, 64
    plan = planner(name, draws, n, n)(jax.random.split(jax.random.key(2), 2000), jnp.int32(0))
    masked, weight = np.asarray(plan.masked_DxK), np.asarray(plan.weight_DxK, np.float64)
    p = np.full(masked.shape[:2], np.nan)
    some = masked.any(-1)  # what masks nothing does not tell its time
    p[some] = 1 / (weight.max(-1)[some] * draws)
    assert ((weight == weight.max(-1, keepdims=True)) == masked)[some].all() and not weight[~masked].any()
    t = (p - least) / (1 - least)
    assert least - 1e-6 < np.nanmin(p) < least + 0.01 and 0.999 < np.nanmax(p) < 1 + 1e-6
    offset = (t * draws) % 1.0  # the same for all draws of a pass, around the circle
    apart = np.abs(offset - offset[:, -1:])
    assert np.nanmax(np.minimum(apart, 1 - apart)) < 1e-4
    assert all(
        len(set(row[some].astype(int))) == some.sum() for row, some in zip((t - 1e-7) * draws, some, strict=True)
    )
    # Each draw's time is uniform, and its tokens are masked with that probability. Times near 0 mask nothing.
    assert stats.kstest(t[:, 0][t[:, 0] > 0.2], stats.uniform(0.2, 0.8).cdf).pvalue > 1e-4
    z = (masked.sum(-1) - n * p)[t > 0.2] / np.sqrt(n * p * (1 - p) + 1e-9)[t > 0.2]
    assert abs(z.mean()) < 4 / math.sqrt(z.size) and z.std() == pytest.approx(1.0, abs=0.03)


def test_diffullamas_score_is_the_mean_of_means():
    """Against a loop over its own masks: 32 noise levels k/32, unweighted, nothing masked counting as 0."""
    plan = planner("diffullama", DIFFULLAMA_DRAWS)(jax.random.split(jax.random.key(0), 3000), jnp.int32(0))
    masked = np.asarray(plan.masked_DxK)
    expected = []
    for masked_DxN in masked[:50, :, :N]:
        score = 0.0
        for row in masked_DxN:
            which = [i for i in range(N) if row[i]]
            if which:
                score += sum(TABLE[sum(1 << i for i in which), i] for i in which) / len(which)
        expected.append(score / 32)
    np.testing.assert_allclose(nats(plan)[:50], expected, rtol=1e-5)
    for k in range(1, 33):  # each token masked with probability k/32 in draw k; all of them in the last
        share = masked[:, k - 1, :N].mean()
        assert abs(share - k / 32) <= 4 * math.sqrt(k / 32 * (1 - k / 32) / (3000 * N))


@pytest.mark.slow
@pytest.mark.parametrize(
    "n, factor",
    [(4, 0.82), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0.51), (2, 0.68), (8, 0.90)))],
)
def test_diffullamas_score_favours_short_answers(n, factor):
    """It gives this share of a constant cross-entropy (each to one unit of the last place)."""
    plan = planner("diffullama", DIFFULLAMA_DRAWS, n)(jax.random.split(jax.random.key(n), 20_000), jnp.int32(0))
    share = np.asarray(plan.weight_DxK).sum((1, 2)).mean()
    assert share == pytest.approx(np.mean([1 - (1 - k / 32) ** n for k in range(1, 33)]), abs=0.003)
    assert share == pytest.approx(factor, abs=0.011)


@pytest.mark.parametrize("draws", [8, *(pytest.param(draws, marks=pytest.mark.slow) for draws in (10, 16))])
def test_counts_are_uniform_for_every_draw(draws):
    masked = np.asarray(
        planner("exact_count", draws)(jax.random.split(jax.random.key(1), 5000), jnp.int32(0)).masked_DxK
    )
    counts = masked.sum(-1)
    for r in range(draws):
        assert stats.chisquare(np.bincount(counts[:, r], minlength=N + 1)[1:]).pvalue > 1e-4, r
    spread = np.sort(counts, axis=1)  # b draws over n counts: each count b/n times, give or take one
    for c in range(1, N + 1):
        assert np.abs((spread == c).sum(1) - draws / N).max() <= 1


@pytest.mark.parametrize(
    "n, draws, k, expected",
    [
        (12, 16, 5, [5, 6, 6, 7, 8, 9, 10, 10, 11, 12, 12, 1, 2, 3, 4, 4]),
        (5, 8, 1, [1, 2, 2, 3, 4, 4, 5, 5]),
        (100, 8, 37, [37, 50, 62, 74, 87, 100, 12, 24]),
        (1, 4, 1, [1, 1, 1, 1]),
    ],
)
def test_lladas_counts_are_golden(n, draws, k, expected):
    assert llada_counts(n, draws, k) == expected


def test_lladas_counts_are_not_uniform():
    """The reason that ours differ: of 12 tokens in 16 draws, every fourth draw rounds a half, to even counts only."""
    counts = np.array([llada_counts(12, 16, k) for k in range(1, 13)])
    assert (counts % 2 == 0).mean() == pytest.approx(10 / 16)


@pytest.mark.slow
def test_the_noise_of_a_pass_does_not_depend_on_the_bucket():
    keys = jax.random.split(jax.random.key(3), 1)
    small, large = (planner("exact_count", 4, places=places)(keys, jnp.int32(0)) for places in (N, 16))
    np.testing.assert_array_equal(small.masked_DxK, large.masked_DxK[..., :N])
    np.testing.assert_array_equal(small.weight_DxK, large.weight_DxK[..., :N])


@pytest.mark.parametrize("name", ["exact_count", "iid", "chain_rule", "any_order"])
def test_a_single_token_is_exact(name):
    """One token is always masked, at weight 1: every estimator gives its cross-entropy."""
    table = np.array([[0.0], [1.7]])
    estimates = nats(planner(name, 4, 1)(jax.random.split(jax.random.key(0), 500), jnp.int32(0)), table, 1)
    if name == "iid":  # masked with probability t at weight 1/t
        assert abs(estimates.mean() - 1.7) < 4 * estimates.std() / math.sqrt(len(estimates))
    else:
        np.testing.assert_allclose(estimates, 1.7, rtol=1e-6)


@pytest.mark.parametrize("draws, first", [(1, 0), (3, 0), (2, 1)])
def test_an_autoregressive_model_scores_every_token_once_with_nothing_masked(draws, first):
    """Row 0 alone has the weights, so that rows that fill up a batch add nothing."""
    keys = jax.random.split(jax.random.key(0), 1)
    masked, weight = planner("autoregressive", draws)(keys, jnp.int32(first))
    assert not masked.any()
    rows = first + np.arange(draws)
    np.testing.assert_array_equal(weight[0], (rows[:, None] == 0) & (np.arange(K) < N))


def test_exact_estimators_take_as_many_passes_as_they_say():
    """One for each token, one for each set of masks but the empty one, and a single one."""
    rows = {name: [e.rows(n) for n in (1, 2, 5)] for name, e in estimators.ESTIMATORS.items() if e.rows}
    assert rows == {"chain_rule": [1, 2, 5], "any_order": [1, 3, 31], "autoregressive": [1, 1, 1]}


def test_rows_of_an_exact_estimator_behind_the_last_one_weigh_nothing():
    keys = jax.random.split(jax.random.key(0), 1)
    for name in ("chain_rule", "any_order", "autoregressive"):
        weight = planner(name, 4)(keys, jnp.int32(ESTIMATORS[name].rows(N))).weight_DxK
        np.testing.assert_array_equal(weight, 0.0)
