"""Approach 3 against the surface that its data come from, and against scipy."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, special
from support.scaling_points import grid
from support.simulated_sweep import complete

from diffusionlm.scaling.laws import parametric
from diffusionlm.scaling.laws.simulation import Truth, make_grid, simulate

SURFACE = {"e": 2.0, "a": 20.0, "b": 150.0, "alpha": 0.25, "beta": 0.30}


def surface(n, d):
    return SURFACE["e"] + SURFACE["a"] / n ** SURFACE["alpha"] + SURFACE["b"] / d ** SURFACE["beta"]


def on_surface(noise, seed=0):
    truths = {"mdm": Truth((3e5, 0.545), (4.6, -0.06), 0.08, 0.0)}
    rng = np.random.default_rng(seed)
    cells = simulate(make_grid(truths, sizes=6), truths, rng)
    return [replace(r, loss=float(surface(r.params, r.tokens) + noise * rng.standard_normal())) for r in cells]


def test_the_parametric_fit_finds_exponents_and_losses_of_its_own_surface():
    fitted = parametric.fit(on_surface(0.0))
    assert fitted.params_exponent == pytest.approx(0.30 / 0.55, abs=1e-4)
    assert fitted.params_exponent + fitted.tokens_exponent == pytest.approx(1)
    for c in (1.6e12, 1.6e14):
        best = optimize.minimize_scalar(
            lambda log_n, c=c: surface(np.exp(log_n), c / 6 / np.exp(log_n)), bounds=(8, 18), method="bounded"
        )
        n, d, loss = fitted.optimum(c)
        assert np.log(n) == pytest.approx(best.x, abs=1e-3)
        assert loss == pytest.approx(best.fun, abs=1e-5)
        assert 6 * n * d == pytest.approx(c, rel=1e-4)


def test_the_parametric_fit_agrees_with_an_uncentred_fit_from_one_start():
    results = on_surface(0.01)
    fitted = parametric.fit(results, noise_sd=0.01, refits=5)
    log_n, log_d, loss = np.log([(r.params, r.tokens, r.loss) for r in results]).T

    def residuals(q):
        return np.log(np.exp(q[0] - q[3] * log_n) + np.exp(q[1] - q[4] * log_d) + np.exp(q[2])) - loss

    other = optimize.least_squares(
        residuals,
        (3, 5, 0.5, 0.3, 0.3),
        loss="huber",
        f_scale=1e-3,
        x_scale="jac",
        max_nfev=5000,
        ftol=1e-14,
        xtol=1e-14,
    )
    assert fitted.objective <= other.cost / 1e-6 * (1 + 1e-6)  # the cost is the sum of Huber losses
    assert fitted.params_exponent == pytest.approx(other.x[4] / (other.x[3] + other.x[4]), abs=1e-3)
    assert 0 < fitted.stderr[0] < 0.05
    assert fitted.params_exponent == pytest.approx(0.30 / 0.55, abs=4 * fitted.stderr[0])
    assert fitted.optimum(1.6e14)[2] == pytest.approx(3.47, abs=0.03)


@pytest.mark.parametrize("noise_sd", [1e-4, 0.005])
def test_a_noise_below_the_scatter_makes_no_smaller_errors_than_the_scatter(noise_sd):
    """Ten other draws of the noise show what it does to the exponent."""
    stderr = parametric.fit(grid(4, 7, 0, 0.01), noise_sd=noise_sd, refits=20).stderr[0]
    others = [parametric.fit(grid(4, 7, seed, 0.01)).params_exponent for seed in range(1, 11)]
    assert np.std(others, ddof=1) / 2 < stderr < 2 * np.std(others, ddof=1)
    larger = parametric.fit(grid(4, 7, 0, 0.01), noise_sd=0.03, refits=20).stderr[0]
    assert larger > 1.5 * stderr


def test_the_derivatives_of_the_surface():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 12))
    q = np.array([0.1, -0.2, 0.5, -1.0, -1.3])
    numerical = optimize.approx_fprime(q, lambda q: parametric._log_loss(q, x, y)[0], 1e-7)
    np.testing.assert_allclose(parametric._log_loss(q, x, y)[1], numerical, atol=1e-5)


def test_the_fit_minimises_the_huber_loss_of_log_loss():
    """No smaller sum near the fit, by a minimiser that needs no derivatives."""
    results = on_surface(0.01)
    fitted = parametric.fit(results)
    log_n, log_d, loss = np.log([(r.params, r.tokens, r.loss) for r in results]).T

    def objective(q):
        a, b, e, alpha, beta = q
        predicted = np.log(np.exp(a - alpha * log_n) + np.exp(b - beta * log_d) + np.exp(e))
        return special.huber(1.0, (predicted - loss) / parametric.DELTA).sum()

    best = np.array([fitted.log_a, fitted.log_b, np.log(fitted.e), fitted.alpha, fitted.beta])
    assert fitted.objective == pytest.approx(objective(best), rel=1e-6)
    polished = optimize.minimize(
        objective,
        best,
        method="Nelder-Mead",
        options={"maxiter": 500, "initial_simplex": [best, *(best + 1e-4 * np.eye(5))]},
    )
    assert polished.fun >= fitted.objective * (1 - 1e-4)


def test_an_exponent_with_a_large_standard_error_is_not_determined():
    fitted = parametric.fit([r for r in complete() if r.objective == "arm"])
    assert fitted.determined
    assert replace(fitted, stderr=(0.1, 0.1)).determined
    assert not replace(fitted, stderr=(0.4, 0.1)).determined


@pytest.mark.parametrize("seed", range(5))
def test_losses_that_do_not_change_but_for_rounding_determine_nothing(seed):
    rounding = np.random.default_rng(seed).integers(-2, 3, 100) * np.spacing(3.0)
    assert parametric.fit([replace(r, loss=3.0 + e) for r, e in zip(on_surface(0.0), rounding, strict=False)]) is None
