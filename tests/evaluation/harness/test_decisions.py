"""The Monte Carlo errors of decisions are those of simulations and closed forms."""

import math

import numpy as np
import pytest
from scipy import special

from diffusionlm.evaluation.harness import decisions
from diffusionlm.likelihood.monte_carlo import Estimate


def estimates(means, stderrs, passes=8):
    return [Estimate(float(m), float(s), passes, 0) for m, s in zip(means, stderrs, strict=True)]


def test_of_two_choices_the_difference_is_normal():
    for lead, a, b in [(0.0, 1.0, 1.0), (1.5, 1.0, 0.5), (-2.0, 0.3, 1.0), (0.4, 0.0, 0.7), (0.4, 0.7, 0.0)]:
        first, second = decisions.win_probabilities(estimates([lead, 0.0], [a, b]))
        assert first == pytest.approx(special.ndtr(lead / math.hypot(a, b)), abs=2e-3)
        assert first + second == pytest.approx(1, abs=2e-3)


def test_of_several_choices_it_is_the_share_of_a_simulation():
    means, stderrs = np.array([0.0, 0.3, -0.5, 0.31]), np.array([0.5, 0.2, 1.0, 0.0])
    draws = means + stderrs * np.random.default_rng(0).normal(size=(200_000, 4))
    share = np.bincount(draws.argmax(1), minlength=4) / len(draws)
    np.testing.assert_allclose(decisions.win_probabilities(estimates(means, stderrs)), share, atol=5e-3)


def test_exact_values_win_for_certain_and_the_first_of_equal_ones():
    assert decisions.win_probabilities(estimates([1, 2, 2, 0], [0, 0, 0, 0])).tolist() == [0, 1, 0, 0]
    assert decisions.accuracy_variance(estimates([1, 2], [0, 0]), [0]) == 0
    assert not decisions.is_undecided(estimates([1, 2], [0, 0], passes=1))


def test_the_variance_is_right_on_average_where_margins_are_spread():
    """Margins of 400 documents, five times as wide as the noise: the mean of p (1 - p) at the true margins."""
    rng, stderr = np.random.default_rng(1), 1.0
    margins = rng.normal(0, 5, 400)
    win = special.ndtr(margins / math.sqrt(2) / stderr)
    seen = margins + rng.normal(0, math.sqrt(2) * stderr, 400)
    variances = [decisions.accuracy_variance(estimates([m, 0], [stderr] * 2), [0]) for m in seen]
    assert np.mean(variances) == pytest.approx(np.mean(win * (1 - win)), rel=0.15)
    ties = rng.normal(0, math.sqrt(2), 400)  # equal choices: 1/6 instead of 1/4, as documented
    variances = [decisions.accuracy_variance(estimates([m, 0], [1, 1]), [0]) for m in ties]
    assert np.mean(variances) == pytest.approx(1 / 6, rel=0.1)


def test_a_variance_sums_over_several_right_choices():
    some = estimates([0.0, 0.0, -50.0], [1, 1, 1])
    assert decisions.accuracy_variance(some, [0]) == pytest.approx(0.25, abs=1e-3)
    assert decisions.accuracy_variance(some, [0, 1]) == pytest.approx(0, abs=1e-3)
    assert decisions.accuracy_variance(some, [-1]) == 0


def test_the_likeliest_choice_is_rarely_called_beaten():
    """Two choices as good as equal, from eight passes each: the first is below a decided leader in 5% of cases."""
    rng, wrong, n = np.random.default_rng(2), 0, 4000
    for _ in range(n):
        passes = rng.normal(0, 1, (2, 8))
        some = estimates(passes.mean(1), passes.std(1, ddof=1) / math.sqrt(8))
        wrong += bool(passes[1].mean() > passes[0].mean() and not decisions.is_undecided(some))
    assert wrong / n == pytest.approx(0.05, abs=0.012)


def test_rivals_share_the_level():
    lead = 2.2  # its one-sided p-value lies between 5% / 4 and 5%
    assert not decisions.is_undecided(estimates([lead, 0], [1, 0], 10_000))
    assert decisions.is_undecided(estimates([lead, 0, 0, 0, 0], [1, 0, 0, 0, 0], 10_000))


@pytest.mark.parametrize(
    ("means", "lengths", "by_sums", "by_either"),
    [([-6, -3], [2, 1], 0, 1), ([-3, -3], [3, 1], 1, 1), ([-6, -3], [1, 1], 0, 0), ([-9, -3], [2, 1], 0, 0)],
)
def test_a_document_is_undecided_if_one_of_its_metrics_is(means, lengths, by_sums, by_either):
    """Choices that are equal by sums differ per unit of length, and the other way round; the noise is 0.1 nats."""
    some = estimates(means, [0.1, 0.1], 64)
    assert decisions.choice_metrics(some, [0], {"acc": None})["undecided"] == by_sums
    assert decisions.choice_metrics(some, [0], {"acc": None, "acc_norm": lengths})["undecided"] == by_either


def test_the_perplexity_follows_the_delta_method():
    rng = np.random.default_rng(3)
    means, stderrs = rng.uniform(-3, -1, 50), rng.uniform(0.1, 0.4, 50)
    draws = means + stderrs * rng.normal(size=(20_000, 50))
    simulated = np.exp(-draws.sum(1) / 50).std()
    assert decisions.perplexity_stderr(estimates(means, stderrs), 50) == pytest.approx(simulated, rel=0.03)


def test_scores_per_length_keep_their_relative_errors():
    assert decisions.scaled(estimates([-6, -3], [0.6, 0.3]), [3, 1]) == estimates([-2, -3], [0.6 / 3, 0.3])
