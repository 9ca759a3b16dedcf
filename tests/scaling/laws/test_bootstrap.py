"""Intervals against exact ones: Student's t and Fieller's."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.scaling_points import points
from support.simulated_sweep import simulated

from diffusionlm.scaling.laws import isoflop_fits as fit
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.bootstrap import Bootstrap, estimate
from diffusionlm.scaling.laws.noise import CommonError, Noise

NOTHING_COMMON = CommonError(0.0, 0)


def fieller(parabola, variance, dof, confidence=0.95):
    """Return the exact interval of log N*, where the slope does not differ from zero (Fieller 1954).

    It is infinite where the curvature is not significant.
    """
    _, b, c = parabola.coefficients
    k = stats.t.ppf(0.5 + confidence / 2, dof) ** 2 * variance
    v = parabola.unscaled
    # (b + 2 c u)^2 <= k Var(b + 2 c u), a quadratic in u.
    quadratic = 4 * (c**2 - k * v[2, 2])
    linear = 4 * (b * c - k * v[1, 2])
    constant = b**2 - k * v[1, 1]
    if c <= 0 or quadratic <= 0:
        return -np.inf, np.inf
    half = np.sqrt(max(linear**2 - 4 * quadratic * constant, 0.0)) / (2 * quadratic)
    middle = parabola.centre - linear / (2 * quadratic)
    return float(middle - half), float(middle + half)


def test_fieller_is_where_the_slope_is_significant():
    fitted = fit.parabola(*points())
    for dof, confidence in ((4, 0.95), (8, 0.8)):
        ends = fieller(fitted, 0.01**2, dof, confidence)
        for end in ends:
            u = end - fitted.centre
            gradient = np.array([0, 1, 2 * u])
            slope = gradient @ fitted.coefficients
            t = slope / (0.01 * np.sqrt(gradient @ fitted.unscaled @ gradient))
            assert abs(t) == pytest.approx(stats.t.ppf(0.5 + confidence / 2, dof))
        assert ends[0] < fitted.log_n < ends[1]
    assert fieller(fitted, 0.5**2, 4) == (-np.inf, np.inf)


def test_the_bootstrap_of_log_n_is_fieller_and_that_of_a_value_is_students_t():
    fitted = fit.parabola(*points())
    noise = Noise(0.02, dof=4, cells=2, pooled=False)
    drawn = Bootstrap({"mdm": noise}, 400_000, 0).coefficients("mdm", [fitted], NOTHING_COMMON)[:, 0]
    log_n = estimate(fitted.log_n, fitted.centre + fit.vertex(drawn)[0])
    exact = fieller(fitted, noise.sd**2, noise.dof)
    # The quantile of 400,000 draws is off by about 1% of the width.
    np.testing.assert_allclose([log_n.low, log_n.high], exact, atol=0.02 * (exact[1] - exact[0]))
    level = estimate(fitted.coefficients[0], drawn[:, 0])
    half = stats.t.ppf(0.975, 4) * noise.sd * np.sqrt(fitted.unscaled[0, 0])
    np.testing.assert_allclose([level.high - level.value, level.value - level.low], half, rtol=0.02)


def test_an_insignificant_curvature_leaves_the_optimum_open():
    fitted = fit.parabola(*points())
    noise = Noise(0.3, dof=4, cells=2, pooled=False)
    drawn = Bootstrap({"mdm": noise}, 4000, 0).coefficients("mdm", [fitted], NOTHING_COMMON)[:, 0]
    params = estimate(fitted.log_n, fitted.centre + fit.vertex(drawn)[0], np.exp)
    assert (params.low, params.high) == (-np.inf, np.inf)
    assert not params.bounded


def test_draws_without_a_minimum_lie_beyond_both_ends_unless_there_is_one():
    draws = np.concatenate([np.linspace(0, 1, 961), np.full(40, np.nan)])
    interval = estimate(0.5, draws)
    assert (interval.low, interval.high) == (-np.inf, np.inf)  # 4% on either side
    interval = estimate(0.5, draws, has_minimum=True)
    assert (interval.low, interval.high) == pytest.approx((0.025, 0.975), abs=0.002)
    few = estimate(0.5, draws[:981])
    assert few.bounded and few.low < 0.01 and few.high > 0.99  # 2% of NaN take the place of as many draws


def test_noise_common_to_all_masks_widens_losses_and_nothing_else():
    results = [r for r in simulated() if r.objective == "mdm"]
    draws = 0.1 * np.random.default_rng(0).standard_normal(8)
    draws -= draws.mean()
    noisy = [replace(r, loss_per_draw=tuple(r.loss + draws), loss_stderr=0.03) for r in results]
    plain, shifted = (analyse(runs, full=False).objectives["mdm"] for runs in (results, noisy))
    stderr = draws.std(ddof=1) / np.sqrt(8)
    assert shifted.common_error == pytest.approx(stderr)
    for before, after in zip(plain.budgets, shifted.budgets, strict=True):
        np.testing.assert_allclose(after.optimum.params.interval, before.optimum.params.interval)
        # Almost all of the width is now the common shift's.
        low, high = after.optimum.loss.interval
        assert high - low == pytest.approx(2 * stats.t.ppf(0.975, 7) * stderr, rel=0.1)
        assert after.paired.stderr == pytest.approx(0, abs=1e-12)
