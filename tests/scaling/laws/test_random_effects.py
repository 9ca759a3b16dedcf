"""The scatter of optima about a law, against its chi-square statistic and its known distribution."""

import numpy as np
import pytest
from scipy import optimize, stats

from diffusionlm.scaling.laws.isoflop_fits import gls_weights
from diffusionlm.scaling.laws.noise import EXACT_DOF
from diffusionlm.scaling.laws.random_effects import random_effect

LOG_C = np.array([0.0, 1.1, 2.3, 3.4, 4.7, 5.8])
DESIGN = np.vander(LOG_C - LOG_C.mean(), 2, increasing=True)
VARIANCES = np.array([1.0, 0.3, 2.0, 0.5, 1.5, 0.8]) * 1e-4


def statistic(y, t):
    """Return the sum of squared residuals of the GLS line over their variances."""
    residuals = y - DESIGN @ gls_weights(DESIGN, np.diag(VARIANCES + t)) @ y
    return float((residuals**2 / (VARIANCES + t)).sum())


def scattered(sd, seed=0):
    rng = np.random.default_rng(seed)
    return 20 + 0.5 * LOG_C + rng.standard_normal(6) * np.sqrt(VARIANCES + sd**2)


def test_the_estimate_is_where_the_statistic_is_at_its_median():
    y = scattered(0.1)
    effect = random_effect(DESIGN, y, VARIANCES, EXACT_DOF)
    expected = optimize.brentq(lambda t: statistic(y, t) - stats.chi2.median(4), 0, 1)
    assert effect.sd == pytest.approx(np.sqrt(expected), rel=0.01)
    assert (effect.statistic, effect.dof) == (pytest.approx(statistic(y, 0)), 4)


def test_optima_that_scatter_less_than_noise_does_in_two_of_three_cases_have_none():
    y = 20 + 0.5 * LOG_C + 0.002 * np.array([1, -1, 1, -1, 1, -1])
    effect = random_effect(DESIGN, y, VARIANCES, EXACT_DOF)
    assert statistic(y, 0) < stats.chi2.ppf(2 / 3, 4) and effect.sd == 0
    more = 20 + 2 * (y - 20)
    wide = random_effect(DESIGN, more - 0.5 * LOG_C, 1e-2 * VARIANCES, EXACT_DOF)
    assert wide.statistic > stats.chi2.ppf(2 / 3, 4) and wide.sd > 0
    assert not effect.draw(np.random.default_rng(0), np.ones(100)).any()
    assert random_effect(DESIGN[:2], y[:2], VARIANCES[:2], EXACT_DOF) is None


def test_draws_have_the_distribution_that_makes_the_statistic_chi_square():
    """The share of draws below t is that of chi-square draws above Q(t); with doubled noise, Q is computed with it."""
    y = scattered(0.1)
    effect = random_effect(DESIGN, y, VARIANCES, EXACT_DOF)
    for ratio in (1.0, 2.0):
        drawn = effect.draw(np.random.default_rng(0), np.full(20_000, ratio))
        for t in (0.05**2, 0.1**2, 0.2**2):
            doubled = statistic(y, t) if ratio == 1 else statistic_at(y, t, ratio)
            assert np.mean(drawn**2 < t) == pytest.approx(stats.chi2.sf(doubled, 4), abs=0.012)


def statistic_at(y, t, ratio):
    weights = gls_weights(DESIGN, np.diag(ratio * VARIANCES + t))
    return float(((y - DESIGN @ weights @ y) ** 2 / (ratio * VARIANCES + t)).sum())


@pytest.mark.parametrize("sd", [0.0, 0.01, 0.1])
def test_intervals_of_the_slope_hold_with_and_without_a_random_effect(sd):
    """The slope is in 92 to 98% of 600 intervals that follow from the draws, give or take 0.9%."""
    rng, inside = np.random.default_rng(1), []
    for seed in range(600):
        y = scattered(sd, seed)
        effect = random_effect(DESIGN, y, VARIANCES, EXACT_DOF)
        weights = gls_weights(DESIGN, np.diag(VARIANCES + effect.sd**2))[1]
        sds = effect.draw(rng, np.ones(400))
        spread = np.sqrt(((VARIANCES + sds[:, None] ** 2) * weights**2).sum(1))
        low, high = np.quantile(weights @ y + spread * rng.standard_normal(400), [0.025, 0.975])
        inside.append(low <= 0.5 <= high)
    assert 0.92 <= np.mean(inside) <= 0.985
