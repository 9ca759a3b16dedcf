"""The surface by variable projection, against exact surfaces, scipy and simulated noise."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import optimize, stats
from support.simulated_sweep import simulated

from diffusionlm.scaling.laws import surface_fit
from diffusionlm.scaling.laws.noise import EXACT_DOF, Noise, given_noise

TRUTH = {"e": 1.69, "a": 406.4, "b": 410.7, "alpha": 0.465, "beta": 0.155}


def surface(n, d, e, a, b, alpha, beta):
    return e + a / n**alpha + b / d**beta


def runs(noise=0.0, seed=0, truth=TRUTH):
    """Return 45 runs at five budgets, sizes x8 around N*."""
    rng, template = np.random.default_rng(seed), simulated()[0]
    rows = []
    for c in (1e17, 1e18, 1e19, 1e20, 1e21):
        best = (truth["alpha"] * truth["a"] / truth["beta"] / truth["b"]) ** (1 / (truth["alpha"] + truth["beta"]))
        best *= (c / 6) ** (truth["beta"] / (truth["alpha"] + truth["beta"]))
        for n in best * np.geomspace(1 / 8, 8, 9):
            loss = surface(n, c / 6 / n, **truth) + noise * rng.standard_normal()
            rows.append(replace(template, budget=c, params=n, tokens=c / 6 / n, flops=c, loss=loss))
    return rows


def test_an_exact_surface_is_found_with_its_optima():
    fitted = surface_fit.fit_surface(runs())
    assert (fitted.e, fitted.alpha, fitted.beta) == pytest.approx((1.69, 0.465, 0.155), rel=1e-5)
    assert (np.exp(fitted.log_a), np.exp(fitted.log_b)) == pytest.approx((406.4, 410.7), rel=1e-3)
    for c in (1e17, 1e24):
        best = optimize.minimize_scalar(lambda x, c=c: surface(np.exp(x), c / 6 / np.exp(x), **TRUTH), bracket=(15, 25))
        assert fitted.log_params(c) == pytest.approx(best.x, abs=1e-3)
        assert fitted.optimum(c)[2] == pytest.approx(best.fun, rel=1e-5)
    assert fitted.exponent.value == pytest.approx(0.25, abs=1e-6) and fitted.determined and fitted.scatter < 1e-9


def test_its_errors_are_those_of_scipys_curve_fit():
    rows = runs(noise=0.01)
    fitted = surface_fit.fit_surface(rows)
    n, d, loss = (np.array([getattr(r, key) for r in rows]) for key in ("params", "tokens", "loss"))

    def model(_, e, log_a, log_b, alpha, beta):
        return surface(n, d, e, np.exp(log_a), np.exp(log_b), alpha, beta)

    start = (fitted.e, fitted.log_a, fitted.log_b, fitted.alpha, fitted.beta)
    best, covariance = optimize.curve_fit(model, n, loss, start, maxfev=10_000)
    assert np.sum((loss - model(n, *best)) ** 2) == pytest.approx(np.sum(fitted.residuals**2), rel=1e-6)
    assert (fitted.alpha, fitted.beta) == pytest.approx(tuple(best[3:]), rel=1e-3)
    errors = np.sqrt(np.diag(fitted.covariance))[[0, 3, 4]]
    np.testing.assert_allclose(errors, np.sqrt(np.diag(covariance))[[0, 3, 4]], rtol=0.02)


def test_the_profile_interval_ends_where_the_best_fit_is_too_much_worse():
    rows = runs(noise=0.01)
    fitted = surface_fit.fit_surface(rows)
    smallest = np.sum(fitted.residuals**2)
    n, d, loss = (np.array([getattr(r, key) for r in rows]) for key in ("params", "tokens", "loss"))

    def square_sum(log_total, share):
        """Return that of the best E, A and B, by linear least squares."""
        total = np.exp(log_total)
        design = np.stack([np.ones(len(n)), (n / 1e8) ** -(total * (1 - share)), (d / 1e10) ** -(total * share)], 1)
        return float(np.sum((loss - design @ np.linalg.lstsq(design, loss)[0]) ** 2))

    for end in fitted.exponent.interval:
        best = optimize.minimize_scalar(lambda x, end=end: square_sum(x, end), bounds=(-2, 1), method="bounded")
        growth = best.fun - smallest
        assert growth == pytest.approx((stats.t.ppf(0.975, 40) * fitted.sd) ** 2, rel=0.02)


def test_a_surface_without_an_irreducible_term_is_not_determined():
    fitted = surface_fit.fit_surface(runs(truth=TRUTH | {"e": 0.0}, noise=1e-4))
    assert fitted.e < 0.05 and not (fitted.determined and fitted.e == 0)
    negative = surface_fit.fit_surface([replace(r, loss=r.loss - 2.0) for r in runs()])
    assert negative.e == 0 and not negative.determined and negative.loss_at(1e20).interval is None
    assert surface_fit.fit_surface(runs()[:6]) is None


@pytest.mark.parametrize("noise", [None, given_noise(0.005)])
def test_losses_that_do_not_change_determine_nothing(noise):
    """Any exponent fits them; nothing is divided by their scatter of zero."""
    fitted = surface_fit.fit_surface([replace(run, loss=3.0) for run in runs()], noise)
    assert not fitted.determined and fitted.exponent.interval == (0.0, 1.0) and fitted.covariance is None
    assert fitted.e == pytest.approx(3.0) and fitted.loss_at(1e20).interval is fitted.params_at(1e20).interval is None


def test_losses_that_do_not_change_with_tokens_leave_the_exponent_open():
    fitted = surface_fit.fit_surface([replace(run, loss=2 + 100 / run.params**0.4) for run in runs()])
    assert not fitted.determined and fitted.exponent.interval == (0.0, 1.0) and fitted.alpha == pytest.approx(0.4)


def test_intervals_use_the_degrees_of_freedom_of_the_variance_that_they_use():
    """A noise that was pooled over four cells of three seeds has eight, however many runs the surface has."""
    rows, seeds = runs(noise=0.01), Noise(0.02, dof=8, cells=4, pooled=False)
    few, exact, none = (surface_fit.fit_surface(rows, noise) for noise in (seeds, given_noise(0.02), None))
    assert (few.sd_dof, exact.sd_dof, none.sd_dof) == (8, EXACT_DOF, 40) and few.dof == 40
    ratio = stats.t.ppf(0.975, 8) / stats.norm.ppf(0.975)
    for estimate in (lambda fit: fit.loss_at(1e21), lambda fit: fit.loss_of_run(1e9, 1e11)):
        assert estimate(few).width == pytest.approx(ratio * estimate(exact).width, rel=1e-5)
    assert few.exponent.width > 1.1 * exact.exponent.width


def test_leverages_of_a_surface_at_a_bound_are_those_of_its_other_numbers():
    """They add up to the numbers that are free: four where E is zero."""
    rows = [replace(run, loss=run.loss - 2.0) for run in runs()]
    fitted = surface_fit.fit_surface(rows)
    assert fitted.e == 0 and fitted.at_bound
    leverages = fitted.leverages(np.log([r.params for r in rows]), np.log([r.tokens for r in rows]))
    assert leverages.sum() == pytest.approx(4, abs=1e-6)


@pytest.mark.slow
def test_intervals_and_prediction_intervals_hold():
    hits = {"exponent": [], "params": [], "loss": [], "run": []}
    exact, rng = surface_fit.fit_surface(runs()), np.random.default_rng(9)
    for seed in range(200):
        fitted = surface_fit.fit_surface(runs(noise=0.01, seed=seed), given_noise(0.01))
        n, d, loss = exact.optimum(1e22)
        hits["exponent"].append(not fitted.exponent.excludes(0.25))
        hits["params"].append(not fitted.params_at(1e22).excludes(n))
        hits["loss"].append(not fitted.loss_at(1e22).excludes(loss))
        hits["run"].append(not fitted.loss_of_run(n, d).excludes(loss + 0.01 * rng.standard_normal()))
    for key, held in hits.items():  # four standard errors of a share of 200 are 6%
        assert 0.89 <= np.mean(held) <= 0.995, key
