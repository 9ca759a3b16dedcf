"""The quadratic surface over size and share, against its algebra."""

import numpy as np
import pytest
from scipy import optimize, special

from diffusionlm.scaling.laws import surface as surfaces

COEFFICIENTS = np.array([4.0, -0.02, 0.05, 0.08, 0.03, 0.05])


def points():
    n, share = np.meshgrid([11.0, 12.2, 13.1], [0.25, 0.5, 0.75, 0.9])
    return n.ravel(), share.ravel()


def test_it_goes_through_a_quadratic_and_finds_its_minimum():
    n, share = points()
    fit = surfaces.surface(n, share, surfaces.terms(n - 12, special.logit(share) - 0.3) @ COEFFICIENTS)
    assert np.abs(fit.residuals).max() < 1e-12
    found = optimize.minimize(lambda z: surfaces.terms(*z) @ fit.coefficients, (0.0, 0.0), tol=1e-12)
    u, x, loss = surfaces.minimum(fit.coefficients)
    np.testing.assert_allclose((u, x, loss), (*found.x, found.fun), atol=1e-6)
    for place in (-0.7, 0.4):
        found = optimize.minimize_scalar(lambda u, x=place: float(surfaces.terms(u, x) @ fit.coefficients))
        np.testing.assert_allclose(surfaces.at_share(fit.coefficients, place), (found.x, found.fun), atol=1e-6)


def test_a_saddle_and_a_ridge_have_no_minimum():
    saddle, ridge = COEFFICIENTS.copy(), COEFFICIENTS.copy()
    saddle[4] = 0.2
    ridge[3:] = -1.0, 0.0, -1.0
    for coefficients in (saddle, ridge):
        assert np.isnan(surfaces.minimum(coefficients)).all()
    assert np.isfinite(surfaces.minimum(np.stack([saddle, COEFFICIENTS]))[0]).tolist() == [False, True]


def test_runs_that_do_not_determine_it_give_none():
    n, share = points()
    assert surfaces.surface(n[share != 0.25][:5], share[share != 0.25][:5], np.ones(5)) is None
    two_shares = share < 0.6
    assert surfaces.surface(n[two_shares], share[two_shares], np.ones(two_shares.sum())) is None


@pytest.mark.slow
def test_the_variances_of_the_minimum_are_those_of_simulated_noise():
    n, share = points()
    truth = surfaces.terms(n - 12, special.logit(share) - 0.3) @ COEFFICIENTS
    fit = surfaces.surface(n, share, truth)
    rng, sd = np.random.default_rng(0), 1e-4
    drawn = [
        surfaces.minimum(surfaces.surface(n, share, truth + sd * e).coefficients) for e in rng.normal(size=(4000, 12))
    ]
    assert np.var(drawn, axis=0) / sd**2 == pytest.approx(surfaces.variances(fit), rel=0.1)
