"""How often the checks that compare two estimates fail a right one, by simulation, and a wrong one.

Masks are drawn here by code of their own, and their costs come from a table: of a few dear tokens among cheap ones,
which are dearer the more is masked and vary with the set. Such passes are more skewed than those of a trained model.
"""

import math

import numpy as np
import pytest
from scipy import stats

from diffusionlm.evaluation.certificate.figures import STATED, Total, draws_agree, estimators_agree
from diffusionlm.likelihood.monte_carlo import Estimate

PASSES = 8


class Costs:
    """The cost of all masked tokens of a text of n tokens, for every set of masks."""

    def __init__(self, n, rng):
        sets = np.array([[s >> i & 1 for i in range(n)] for s in range(1 << n)], bool)
        share = sets.mean(-1, keepdims=True)
        costs = rng.gamma(0.5, 4.0, size=n) * (0.3 + 0.7 * share) * np.exp(0.4 * rng.normal(size=sets.shape))
        self.n, self.total_S, self.count_S = n, np.where(sets, costs, 0.0).sum(-1), sets.sum(-1)

    @property
    def bound(self):
        return np.mean([self.total_S[self.count_S == c].mean() * self.n / c for c in range(1, self.n + 1)])

    def exact_count(self, shape, draws, rng):
        """Return passes of so many draws, each of which masks one of n numbers of tokens, in nats."""
        first = rng.integers(1, self.n + 1, size=(*shape, 1))
        shift = np.floor(np.arange(draws) * self.n / draws + 0.5).astype(int)
        count = (first - 1 + shift) % self.n + 1
        nats = np.zeros(count.shape)
        for c in range(1, self.n + 1):
            here = count == c
            nats[here] = rng.choice(self.total_S[self.count_S == c], size=here.sum()) * self.n / c
        return nats.mean(-1)

    def iid(self, shape, draws, rng):
        """Return passes of so many draws, each of which masks a token with probability t, at the weight 1/t."""
        t = 1 - (rng.random((*shape, 1)) + np.arange(draws) / draws) % 1
        sets = sum((rng.random(t.shape) < t).astype(int) << i for i in range(self.n))
        return (self.total_S[sets] / t).mean(-1)


def totals(passes):
    """Return the total of each text, from its passes."""
    return [list(Total.of([Estimate(-x.mean(), x.std(ddof=1) / math.sqrt(PASSES), PASSES, 1)])) for x in passes]


def failures(n, texts, draws, other_draws, repeats, scale=1.0):
    """Return how often each check fails when the estimates are right but for the scale of the first."""
    rng, shape, failed = np.random.default_rng(n), (repeats, PASSES), {estimators_agree: 0, draws_agree: 0}
    costs = [Costs(n, rng) for _ in range(texts)]
    estimates = {
        "exact_count": scale * np.stack([cost.exact_count(shape, draws, rng) for cost in costs], 1),
        "iid": np.stack([cost.iid(shape, draws, rng) for cost in costs], 1),
    }
    if other_draws:
        estimates["other_draws"] = np.stack([cost.exact_count(shape, other_draws, rng) for cost in costs], 1)
    for r in range(repeats):
        columns = zip(*(totals(passes[r]) for passes in estimates.values()), strict=True)
        records = [dict(zip(estimates, column, strict=True)) for column in columns]
        for check in failed:
            failed[check] += check(records, [n] * texts).verdict == "fail"
    return failed


def test_the_estimators_of_the_simulation_have_one_mean():
    costs, rng = Costs(5, np.random.default_rng(0)), np.random.default_rng(1)
    for passes in (costs.exact_count((20_000,), 16, rng), costs.iid((20_000,), 16, rng)):
        assert abs(passes.mean() - costs.bound) < 4 * passes.std() / math.sqrt(20_000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "texts", "draws", "other_draws"), [(8, 1, 1, None), (8, 1, 4, 16), (8, 8, 4, 16), (10, 1, 16, 4)]
)
def test_right_estimates_disagree_as_rarely_as_is_stated(n, texts, draws, other_draws):
    """The numbers of failures are of a rate of at most that which is stated, over 10,000 certificates."""
    for check, failed in failures(n, texts, draws, other_draws, 10_000).items():
        assert stats.binomtest(failed, 10_000, STATED, alternative="greater").pvalue > 1e-3, (check.__name__, failed)


def test_estimates_that_are_a_fifth_too_low_disagree():
    assert min(failures(10, 30, 16, 4, 20, scale=0.8).values()) >= 18  # of 20
