"""Means and shares with their standard errors."""

import math

import numpy as np
import pytest
from scipy import special, stats

from diffusionlm.evaluation import results


@pytest.mark.parametrize("n", [2, 5, 300])
@pytest.mark.parametrize("value", [False, True])
def test_a_share_of_all_or_none_has_the_width_of_wilsons_interval(n, value):
    level = float(special.erf(1 / math.sqrt(2)))  # of one standard error to both sides
    interval = stats.binomtest(n * value, n).proportion_ci(level, method="wilson")
    metric = results.share([value] * n)
    assert metric == (value, pytest.approx(interval.high - interval.low))


def test_a_share_of_none_is_about_as_uncertain_as_a_share_of_one_item():
    """No jump: one hit among 100 has sqrt(0.01 * 0.99 / 99)."""
    none, single = results.share([False] * 100), results.share([True] + [False] * 99)
    assert none.stderr == pytest.approx(1 / 101) and none.stderr == pytest.approx(single.stderr, rel=0.02)


def test_the_error_of_equal_differences_is_unknown():
    assert results.mean_difference([0.0, 0.0, 0.0]) == (0, None)
    assert results.mean_difference([0.0, 1.0]) == results.mean([0.0, 1.0])


def test_other_shares_are_means():
    values = [True, False, False, True, False]
    assert results.share(values) == results.mean([1.0, 0.0, 0.0, 1.0, 0.0]) == (0.4, pytest.approx(math.sqrt(0.24 / 4)))
    assert results.share([True]) == (1, None)


def test_fields_of_truth_values_are_shares():
    records = [{"right": True, "score": 1.0}, {"right": True, "score": 1.0}]
    metrics = results.means(records, ["right", "score"])
    assert metrics == {"right": (1, pytest.approx(1 / 3)), "score": (1, 0)}


def test_the_standard_error_of_a_mean_is_that_of_independent_values():
    values = [0.5, 2.0, 3.5, 1.0]
    assert results.mean(values) == (1.75, pytest.approx(np.std(values, ddof=1) / 2))
