"""IsoFLOP curves of a common shape, against the surfaces whose curves they are."""

import numpy as np
import pytest
from scipy import optimize

from diffusionlm.scaling.laws import curves
from diffusionlm.scaling.laws.isoflop_fits import parabola

E, A, B = 1.69, 406.4, 410.7
BUDGETS = (1e17, 1e18, 1e19, 1e20, 1e21)


def optimum(alpha, beta, c):
    """Return log N* of the surface E + A / N^alpha + B / D^beta with C = 6 N D (2203.15556, Eq. 4)."""
    return (np.log(alpha * A / (beta * B)) + beta * np.log(c / 6)) / (alpha + beta)


def points(alpha, beta, c, width=16.0, off=0.0, sizes=15):
    log_n = optimum(alpha, beta, c) + off + np.linspace(-1, 1, sizes) * np.log(width)
    return curves.Points(log_n, E + A * np.exp(-alpha * log_n) + B * np.exp(-beta * (np.log(c / 6) - log_n)))


def test_the_terms_are_those_of_a_parabola_near_zero_and_span_both_exponentials():
    u = np.linspace(-1, 1, 7)
    np.testing.assert_allclose(curves.terms(1e-3 * u, 0.4, 0.2), np.vander(1e-3 * u, 3, increasing=True), atol=1e-7)
    exponentials = np.stack([np.ones(7), np.exp(-0.4 * u), np.exp(0.2 * u)], 1)
    _, residual, rank, _ = np.linalg.lstsq(exponentials, curves.terms(u, 0.4, 0.2))
    assert rank == 3 and residual.max() < 1e-25


def test_the_minimum_its_curvature_and_gradients_are_those_of_a_search():
    rng = np.random.default_rng(0)
    fitted = curves.curve(points(0.34, 0.28, 1e19, off=0.4), 0.5, 0.2)
    step = 1e-5

    def search(coefficients):
        u = optimize.minimize_scalar(
            lambda u: float(curves.terms(u, 0.5, 0.2) @ coefficients), options={"xtol": 1e-12}
        ).x
        return u, float(curves.terms(u, 0.5, 0.2) @ coefficients)

    u, loss = search(fitted.coefficients)
    assert (fitted.log_n - fitted.centre, fitted.loss) == pytest.approx((u, loss), abs=1e-6)
    for part, gradient in zip((0, 1), fitted.gradients(), strict=True):
        direction = rng.standard_normal(3)
        moved = [search(fitted.coefficients + sign * 1e-3 * direction)[part] for sign in (-1, 1)]
        assert gradient @ direction == pytest.approx((moved[1] - moved[0]) / 2e-3, rel=1e-3)
    around = fitted(fitted.log_n + 100 * step * np.array([-1, 0, 1]))
    assert fitted.curvature == pytest.approx((around[0] - 2 * around[1] + around[2]) / (100 * step) ** 2 / 2, rel=1e-4)


def test_curves_that_rise_or_fall_all_the_way_have_no_minimum():
    coefficients = np.array([[3.0, 0.0, 0.1], [3.0, 1.0, 0.1], [3.0, -1.0, 0.1], [3.0, 0.0, -0.1]])
    u, _ = curves.minimum(coefficients, 0.4, 0.4)
    assert np.isfinite(u).tolist() == [True, False, False, False]


@pytest.mark.parametrize(("alpha", "beta", "bias"), [(0.31, 0.31, 0.0), (0.34, 0.28, 0.0523), (0.465, 0.155, 0.2629)])
def test_the_curves_of_an_exact_surface_have_its_optima_where_parabolas_are_off_by_the_published_bias(
    alpha, beta, bias
):
    """Sizes x16 around N*: parabolas are off by one amount at every budget (2603.22339), and the curves are not."""
    budgets = [points(alpha, beta, c) for c in BUDGETS]
    shape = curves.fit_shape(budgets, None)
    assert (shape.alpha, shape.beta) == pytest.approx((alpha, beta), abs=1e-6)
    for c, at in zip(BUDGETS, budgets, strict=True):
        assert curves.curve(at, shape.alpha, shape.beta).log_n == pytest.approx(optimum(alpha, beta, c), abs=1e-6)
        assert parabola(at.log_n, at.loss).log_n - optimum(alpha, beta, c) == pytest.approx(bias, abs=1e-3)


def test_a_drifting_grid_moves_the_exponent_of_parabolas_and_not_that_of_curves():
    offs = np.linspace(0, -np.log(3), 5)
    budgets = [points(0.465, 0.155, c, width=8, off=off) for c, off in zip(BUDGETS, offs, strict=True)]
    shape = curves.fit_shape(budgets, None)
    log_c, true = np.log(BUDGETS), 0.155 / (0.465 + 0.155)
    slope = np.polyfit(log_c, [curves.curve(at, shape.alpha, shape.beta).log_n for at in budgets], 1)[0]
    plain = np.polyfit(log_c, [parabola(at.log_n, at.loss).log_n for at in budgets], 1)[0]
    assert slope == pytest.approx(true, abs=1e-7) and plain - true == pytest.approx(-0.0236, abs=1e-4)


def test_where_the_losses_do_not_decide_the_shape_is_the_published_one_and_its_range_the_priors():
    three = [points(0.6, 0.6, c, width=2, sizes=3) for c in BUDGETS]
    for noise in (None, 10.0):
        shape = curves.fit_shape(three, noise)
        assert (shape.alpha, shape.beta) == pytest.approx((0.37, 0.37), rel=0.01) and shape.scatter is None
        spread = 1.96 * curves.WIDTH
        np.testing.assert_allclose(np.log(shape.ranges) - np.log(0.37), [[-spread, spread]] * 2, atol=0.15)
    assert shape.weights.sum() == pytest.approx(1)


def test_the_shapes_that_could_have_been_narrow_with_the_noise():
    budgets = [points(0.34, 0.28, c, width=8) for c in BUDGETS]
    widths = [np.ptp(np.log(curves.fit_shape(budgets, noise).ranges[0])) for noise in (0.05, 0.005, 0.0005)]
    assert widths[0] > 1.5 * widths[1] > 6 * widths[2]


def test_what_losses_allow_has_weights_however_small_their_noise():
    """With losses that no curve fits and next to no noise, the search may end beside the best shape."""
    rng = np.random.default_rng(0)
    u = np.log(1e7) + np.linspace(-1.5, 1.5, 4)
    points = [
        curves.Points(u + i, 3 - 0.1 * i + 0.1 * (u - u.mean()) ** 2 + 0.3 * rng.standard_normal(4)) for i in range(2)
    ]
    shape = curves.fit_shape(points, 1e-9)
    assert np.isfinite(shape.weights).all() and shape.weights.sum() == pytest.approx(1)


@pytest.mark.parametrize(("width", "sizes", "count"), [(2, 4, 0.1), (4, 7, 0.9), (16, 15, 1.95)])
def test_the_shape_takes_as_many_degrees_of_freedom_as_the_losses_decide(width, sizes, count):
    """They are 2 less the trace of the prior's precision times the posterior's covariance."""
    sd, rng = 0.005, np.random.default_rng(0)
    budgets = [points(0.34, 0.28, c, width=width, sizes=sizes) for c in BUDGETS]
    budgets = [curves.Points(at.log_n, at.loss + sd * rng.standard_normal(sizes)) for at in budgets]
    shape = curves.fit_shape(budgets, sd)

    def square_sum(q):
        return sum((curves.curve(at, *np.exp(q)).residuals ** 2).sum() for at in budgets) / sd**2

    best, h = np.log([shape.alpha, shape.beta]), 0.02
    steps = h * np.eye(2)
    hessian = np.array(
        [
            [
                square_sum(best + a + b)
                - square_sum(best + a - b)
                - square_sum(best - a + b)
                + square_sum(best - a - b)
                for a in steps
            ]
            for b in steps
        ]
    ) / (4 * h**2)
    effective = 2 - np.trace(np.linalg.inv(hessian / 2 + np.eye(2) / curves.WIDTH**2)) / curves.WIDTH**2
    assert shape.decided.sum() == pytest.approx(effective, abs=0.1)
    assert effective == pytest.approx(count, abs=0.1)
    divisor, dof = shape.spare(20)
    assert divisor == pytest.approx(20 - shape.decided.sum()) and divisor <= dof <= 20


def test_degrees_of_freedom_match_the_moments_of_simulated_residuals():
    """Linear regression of which one coefficient has a prior: mean and variance of its residual sum of squares."""
    rng, h = np.random.default_rng(0), np.array([0.7, 0.2])
    divisor, dof = curves._spare(4, h)
    parts = rng.standard_normal((200_000, 4)) ** 2
    square_sums = parts[:, 2:].sum(1) + parts[:, :2] @ (1 - h)  # under the prior, residuals along an axis shrink so
    assert square_sums.mean() == pytest.approx(divisor, rel=0.01)
    assert 2 * square_sums.mean() ** 2 / square_sums.var() == pytest.approx(dof, rel=0.02)


def test_a_noise_that_losses_leave_wholly_still_has_degrees_of_freedom():
    """With a noise of next to nothing both numbers of the shape are decided, by one spare size or by two."""
    for budgets, sizes in ((2, 4), (1, 5), (1, 4)):
        u = np.log(2.0) * np.arange(sizes)
        points = [curves.Points(u + i, 3 + 0.1 * (u - 1.3 - 0.4 * i) ** 2 + 0.01 * (u > 1)) for i in range(budgets)]
        for noise in (1e-3, 1e-6, 1e-9):
            shape = curves.fit_shape(points, noise)
            assert 0 < shape.dof <= budgets * (sizes - 3) * (1 + 1e-12)
