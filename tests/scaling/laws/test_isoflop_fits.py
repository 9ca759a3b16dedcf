"""Parabolas and power laws against closed forms and scipy."""

import numpy as np
import pytest
from scipy import optimize, stats
from support.scaling_points import points

from diffusionlm.scaling.laws import isoflop_fits as fit


def test_a_parabola_through_three_points_is_the_lagrange_polynomial():
    x, y = np.array([1.0, 2.0, 4.0]), np.array([3.0, 1.0, 2.0])
    fitted = fit.parabola(x, y)
    # By hand: divided differences -2 and 1/2, then (1/2 + 2) / 3 = 5/6: y = 3 - 2 (x - 1) + 5/6 (x - 1) (x - 2).
    assert fitted.log_n == pytest.approx(1.5 + 2 / (2 * 5 / 6))
    assert fitted.loss == pytest.approx(3 - 2 * 1.7 + 5 / 6 * 1.7 * 0.7)
    np.testing.assert_allclose(fitted(x), y)
    np.testing.assert_allclose(fitted.residuals, 0, atol=1e-12)


def test_a_parabola_agrees_with_scipy():
    log_n, loss = points()
    fitted = fit.parabola(log_n, loss)

    def vertex_form(x, x0, y0, c):
        return y0 + c * (x - x0) ** 2

    sigma = np.full(6, 0.01)
    expected, covariance = optimize.curve_fit(
        vertex_form, log_n, loss, (log_n.mean(), 4.2, 0.1), sigma, absolute_sigma=True, ftol=1e-15, xtol=1e-15
    )
    np.testing.assert_allclose([fitted.log_n, fitted.loss, fitted.coefficients[2]], expected, rtol=1e-6)
    np.testing.assert_allclose(np.array(fitted.variances()) * 0.01**2, np.diag(covariance)[:2], rtol=1e-4)


def test_a_power_law_agrees_with_scipy():
    log_c = np.log([1.6e12, 5e12, 1.6e13, 5e13])
    log_y = 0.6 * log_c - 5 + np.array([0.02, -0.01, 0.03, -0.02])
    plain = fit.power_law(log_c, log_y)
    reference = stats.linregress(log_c, log_y)
    assert plain.exponent == pytest.approx(reference.slope)
    assert plain.log_prefactor == pytest.approx(reference.intercept)
    variances = np.array([1.0, 4.0, 2.0, 9.0]) * 1e-4
    weighted = fit.power_law(log_c, log_y, variances)
    expected, covariance = optimize.curve_fit(
        lambda x, level, slope: level + slope * (x - log_c.mean()), log_c, log_y, (20, 0.5), np.sqrt(variances), True
    )
    np.testing.assert_allclose([weighted.level, weighted.exponent], expected, rtol=1e-6)
    np.testing.assert_allclose(weighted.weights**2 @ variances, np.diag(covariance), rtol=1e-5)


def test_correlated_points_are_whitened():
    rng = np.random.default_rng(0)
    log_c, log_y = np.linspace(27, 32, 5), rng.standard_normal(5)
    root = rng.standard_normal((5, 5))
    fitted = fit.power_law(log_c, log_y, root @ root.T)
    design_matrix = np.vander(log_c - log_c.mean(), 2, increasing=True)
    expected, square_sum, *_ = np.linalg.lstsq(np.linalg.solve(root, design_matrix), np.linalg.solve(root, log_y))
    np.testing.assert_allclose([fitted.level, fitted.exponent], expected)
    assert fitted.chi_square == pytest.approx(square_sum[0])
