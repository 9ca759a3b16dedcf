"""Fits of IsoFLOP sweeps against closed forms, scipy and simulations with known truth."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import design, envelope, fit, misfit, optima, parametric, power_laws, uncertainty
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.simulation import Cell, Truth, coverage, grid_of, make_grid, simulate, truths_of
from diffusionlm.scaling.sweep.commands import get
from diffusionlm.scaling.sweep.results import load

RESULTS = Path(__file__).parents[3] / "docs" / "results" / "isoflop_cpu" / "results.json"
TRUTHS = {
    "mdm": Truth((3e5, 0.60), (4.6, -0.060), curvature=0.08, noise=0.01),
    "arm": Truth((6e5, 0.62), (3.95, -0.060), curvature=0.07, noise=0.006),
}


def sweep(seed=0, noise=None, truths=TRUTHS, **grid):
    if noise is not None:
        truths = {name: replace(truth, noise=noise) for name, truth in truths.items()}
    return simulate(make_grid(truths, **grid), truths, np.random.default_rng(seed))


@pytest.fixture
def points():
    rng = np.random.default_rng(1)
    log_n = np.log(2e5) + np.array([-1.2, -0.5, -0.5, 0.1, 0.7, 1.3])
    return log_n, 4.2 + 0.09 * (log_n - np.log(2.3e5)) ** 2 + 0.01 * rng.standard_normal(6)


def test_a_parabola_through_three_points_is_the_lagrange_polynomial():
    x, y = np.array([1.0, 2.0, 4.0]), np.array([3.0, 1.0, 2.0])
    made = fit.parabola(x, y)
    # By hand: divided differences -2 and 1/2, then (1/2 + 2) / 3 = 5/6: y = 3 - 2 (x - 1) + 5/6 (x - 1) (x - 2).
    assert made.log_n == pytest.approx(1.5 + 2 / (2 * 5 / 6))
    assert made.loss == pytest.approx(3 - 2 * 1.7 + 5 / 6 * 1.7 * 0.7)
    np.testing.assert_allclose(made(x), y)
    np.testing.assert_allclose(made.residuals, 0, atol=1e-12)


def test_a_parabola_agrees_with_scipy(points):
    log_n, loss = points
    made = fit.parabola(log_n, loss)

    def vertex_form(x, x0, y0, c):
        return y0 + c * (x - x0) ** 2

    sigma = np.full(6, 0.01)
    found, covariance = optimize.curve_fit(
        vertex_form, log_n, loss, (log_n.mean(), 4.2, 0.1), sigma, absolute_sigma=True, ftol=1e-15, xtol=1e-15
    )
    np.testing.assert_allclose([made.log_n, made.loss, made.coefficients[2]], found, rtol=1e-6)
    np.testing.assert_allclose(np.array(made.variances()) * 0.01**2, np.diag(covariance)[:2], rtol=1e-4)


def test_fieller_is_where_the_slope_is_significant(points):
    made = fit.parabola(*points)
    for dof, confidence in ((4, 0.95), (8, 0.8)):
        ends = fit.fieller(made, 0.01**2, dof, confidence)
        for end in ends:
            u = end - made.centre
            gradient = np.array([0, 1, 2 * u])
            slope = gradient @ made.coefficients
            t = slope / (0.01 * np.sqrt(gradient @ made.unscaled @ gradient))
            assert abs(t) == pytest.approx(stats.t.ppf(0.5 + confidence / 2, dof))
        assert ends[0] < made.log_n < ends[1]
    assert fit.fieller(made, 0.5**2, 4) == (-np.inf, np.inf)


def test_the_bootstrap_of_log_n_is_fieller_and_that_of_a_value_is_students_t(points):
    log_n, loss = points
    made = fit.parabola(log_n, loss)
    noise = uncertainty.Noise(0.02, dof=4, cells=2, pooled=False)
    drawn = uncertainty.Bootstrap({"mdm": noise}, 400_000, 0).coefficients("mdm", [made], (0.0, 0))[:, 0]
    found = uncertainty.estimate(made.log_n, made.centre + fit.vertex(drawn)[0])
    exact = fit.fieller(made, noise.sd**2, noise.dof)
    # The quantile of 400,000 draws is off by about 1% of the width.
    np.testing.assert_allclose([found.low, found.high], exact, atol=0.02 * (exact[1] - exact[0]))
    at = uncertainty.estimate(made.coefficients[0], drawn[:, 0])
    half = stats.t.ppf(0.975, 4) * noise.sd * np.sqrt(made.unscaled[0, 0])
    np.testing.assert_allclose([at.high - at.value, at.value - at.low], half, rtol=0.02)


def test_an_insignificant_curvature_leaves_the_optimum_open(points):
    made = fit.parabola(*points)
    noise = uncertainty.Noise(0.3, dof=4, cells=2, pooled=False)
    drawn = uncertainty.Bootstrap({"mdm": noise}, 4000, 0).coefficients("mdm", [made], (0.0, 0))[:, 0]
    found = uncertainty.estimate(made.log_n, made.centre + fit.vertex(drawn)[0], np.exp)
    assert (found.low, found.high) == (-np.inf, np.inf)
    assert not found.bounded


def test_draws_without_a_minimum_lie_beyond_both_ends_unless_there_is_one():
    draws = np.concatenate([np.linspace(0, 1, 961), np.full(40, np.nan)])
    found = uncertainty.estimate(0.5, draws)
    assert (found.low, found.high) == (-np.inf, np.inf)  # 4% on either side
    found = uncertainty.estimate(0.5, draws, has_minimum=True)
    assert (found.low, found.high) == pytest.approx((0.025, 0.975), abs=0.002)
    few = uncertainty.estimate(0.5, draws[:981])
    assert few.bounded and few.low < 0.01 and few.high > 0.99  # 2% of NaN take the place of as many draws


def test_a_power_law_agrees_with_scipy():
    log_c = np.log([1.6e12, 5e12, 1.6e13, 5e13])
    log_y = 0.6 * log_c - 5 + np.array([0.02, -0.01, 0.03, -0.02])
    plain = fit.power_law(log_c, log_y)
    reference = stats.linregress(log_c, log_y)
    assert plain.exponent == pytest.approx(reference.slope)
    assert plain.log_prefactor == pytest.approx(reference.intercept)
    variances = np.array([1.0, 4.0, 2.0, 9.0]) * 1e-4
    weighted = fit.power_law(log_c, log_y, variances)
    found, covariance = optimize.curve_fit(
        lambda x, level, slope: level + slope * (x - log_c.mean()), log_c, log_y, (20, 0.5), np.sqrt(variances), True
    )
    np.testing.assert_allclose([weighted.level, weighted.exponent], found, rtol=1e-6)
    np.testing.assert_allclose(weighted.weights**2 @ variances, np.diag(covariance), rtol=1e-5)


def test_correlated_points_are_whitened():
    rng = np.random.default_rng(0)
    log_c, log_y = np.linspace(27, 32, 5), rng.standard_normal(5)
    root = rng.standard_normal((5, 5))
    made = fit.power_law(log_c, log_y, root @ root.T)
    design_matrix = np.vander(log_c - log_c.mean(), 2, increasing=True)
    found, square_sum, *_ = np.linalg.lstsq(np.linalg.solve(root, design_matrix), np.linalg.solve(root, log_y))
    np.testing.assert_allclose([made.level, made.exponent], found)
    assert made.chi_square == pytest.approx(square_sum[0])


def test_noise_is_pooled_over_repeated_cells_of_an_objective():
    results = sweep()
    noise = uncertainty.seed_noise(results)
    for name in TRUTHS:
        cells = [runs for key, runs in uncertainty.by_cell(results).items() if key[0] == name and len(runs) > 1]
        assert [len(runs) for runs in cells] == [3, 3]
        variances = [np.var([run.loss for run in runs], ddof=1) for runs in cells]
        assert noise[name].sd == pytest.approx(np.sqrt(np.mean(variances)))
        assert (noise[name].dof, noise[name].cells, noise[name].pooled) == (4, 2, False)


def test_noise_is_borrowed_or_unknown_where_repeats_are_too_few():
    results = sweep()
    lean = [r for r in results if r.objective == "mdm" or r.seed == 0]
    noise = uncertainty.seed_noise(lean)
    assert noise["arm"].pooled and not noise["mdm"].pooled
    assert noise["arm"].sd == noise["mdm"].sd
    one_cell = [r for r in results if r.seed == 0 or (r.objective == "mdm" and r.budget == 5e12)]
    assert uncertainty.seed_noise(one_cell) == {"mdm": None, "arm": None}


def test_without_noise_the_laws_gap_and_prediction_are_exact():
    found = analyse(sweep(noise=0.0), full=False)
    for name, truth in TRUTHS.items():
        fitted = found.objectives[name]
        assert fitted.laws["params"].exponent.value == pytest.approx(
            truth.params[1], abs=1e-4
        )  # whole tokens and sizes
        assert fitted.laws["tokens"].exponent.value == pytest.approx(1 - truth.params[1], abs=1e-4)
        assert fitted.laws["loss"].exponent.value == pytest.approx(truth.loss[1], abs=1e-6)
        ahead = fitted.prediction
        assert ahead.budget == pytest.approx(5e13 * (5e13 / 1.6e12) ** (1 / 3))
        assert ahead.loss.value == pytest.approx(np.exp(truth.log_at("loss", ahead.budget)))
        assert ahead.bent_loss.value == pytest.approx(ahead.loss.value)
        assert ahead.hindcast.value == pytest.approx(0, abs=1e-6)
        assert fitted.noise is None and ahead.loss.low is None
    gap = found.gaps[0]
    factor = (4.6 / 3.95) ** (1 / 0.06)
    assert gap.common.value == pytest.approx(factor, rel=1e-4)
    assert [e.value for _, e, _ in gap.at_budgets] == pytest.approx([factor] * 4, rel=1e-4)
    assert [inside for *_, inside in gap.at_budgets] == [True, False, False, False]  # 31 times between the budgets
    assert [e.value for _, e in gap.at_own] == pytest.approx([factor] * 4, rel=1e-4)
    needed = np.array([c for c, _ in gap.at_own]) / factor  # what the reference needs, which has run 1.6e12 and more
    np.testing.assert_allclose(gap.beyond[1], np.maximum(1.6e12 / needed, 1), rtol=1e-4)
    spent = np.array([c for c, *_ in gap.at_budgets]) * factor
    np.testing.assert_allclose(gap.beyond[0], np.maximum(spent / 5e13, 1), rtol=1e-4)
    middle = np.sqrt(1.6e12 * 5e13)
    assert gap.size_ratio_law.value == pytest.approx(0.5 * (middle / 1e13) ** -0.02, rel=1e-3)


def test_a_law_without_a_budget_is_that_of_a_sweep_without_it():
    results = sweep()
    for name, fitted in analyse(results, full=False).objectives.items():
        for key, law in fitted.laws.items():
            assert [c for c, _ in law.without] == list(law.budgets)
            for c, exponent in law.without:
                fewer = [r for r in results if r.objective == name and r.budget != c]
                rows = [row for row in fitted.budgets if row.budget != c]
                again = analyse(fewer, full=False).objectives[name].laws[key]
                assert exponent.value == pytest.approx(again.exponent.value, rel=1e-6) and len(rows) == 3
                assert (exponent.low, exponent.high) != (law.exponent.low, law.exponent.high)
                moved = not law.exponent.low <= exponent.value <= law.exponent.high
                assert moved == (c in dict(law.hangs_on))


def test_an_optimum_is_determined_if_its_interval_ends_within_a_spacing_of_the_grid():
    row = analyse(sweep(), full=False).objectives["mdm"].budgets[0]
    sizes = sorted({run.params for run in row.runs})
    assert row.usable and row.spacing == pytest.approx(np.log(1.8), abs=1e-3)
    low, high = sizes[0] / 1.8, sizes[-1] * 1.8
    for ends, usable in (
        ((1.01 * low, 0.99 * high), True),
        ((0.99 * low, high / 2), False),
        ((2 * low, 1.01 * high), False),
    ):
        assert replace(row, params=uncertainty.Estimate(row.params.value, *ends)).usable == usable
    assert replace(row, params=uncertainty.Estimate(row.params.value)).usable  # with unknown noise all are


def test_noise_common_to_all_masks_widens_losses_and_nothing_else():
    results = [r for r in sweep() if r.objective == "mdm"]
    draws = 0.1 * np.random.default_rng(0).standard_normal(8)
    draws -= draws.mean()
    noisy = [replace(r, loss_per_draw=tuple(r.loss + draws), loss_stderr=0.03) for r in results]
    plain, shifted = (analyse(of, full=False).objectives["mdm"] for of in (results, noisy))
    stderr = draws.std(ddof=1) / np.sqrt(8)
    assert shifted.common_error == pytest.approx(stderr)
    for before, after in zip(plain.budgets, shifted.budgets, strict=True):
        np.testing.assert_allclose([after.params.low, after.params.high], [before.params.low, before.params.high])
        # Almost all of the width is now the common shift's.
        assert after.loss.high - after.loss.low == pytest.approx(2 * stats.t.ppf(0.975, 7) * stderr, rel=0.1)
        assert after.paired.stderr == pytest.approx(0, abs=1e-12)


def test_the_error_of_paired_differences():
    rng = np.random.default_rng(0)
    runs = [r for r in sweep() if r.objective == "mdm" and r.budget == 5e13]
    common, own = 0.2 * rng.standard_normal(16), 0.01 * rng.standard_normal((5, 16))
    runs = [
        replace(r, loss_per_draw=tuple(r.loss + common + mine), loss_stderr=0.05)
        for r, mine in zip(runs, own, strict=True)
    ]
    found = uncertainty.paired_error(runs)
    pairs = [stats.sem(own[i] - own[j]) for i in range(5) for j in range(i)]
    assert found.stderr == pytest.approx(max(pairs))
    assert found.stderr_unpaired > 10 * found.stderr
    assert found.effect == pytest.approx(max(r.loss for r in runs) - min(r.loss for r in runs))
    assert found.small == (max(pairs) < 0.1 * found.effect)
    assert uncertainty.paired_error([replace(r, loss_per_draw=r.loss_per_draw[:1]) for r in runs]) is None


def test_lack_of_fit_is_the_classic_f_test():
    runs = [r for r in sweep() if r.objective == "mdm" and r.budget == 5e12]
    x, y = np.log([r.params for r in runs]), np.array([r.loss for r in runs])
    noise = uncertainty.Noise(0.004, dof=4, cells=2, pooled=False)
    found = misfit.parabola_lack_of_fit(fit.parabola(x, y), x, noise)
    residual = np.sum((y - np.polyval(np.polyfit(x - x.mean(), y, 2), x - x.mean())) ** 2)
    pure = sum(np.sum((y[x == size] - y[x == size].mean()) ** 2) for size in np.unique(x))
    ratio = (residual - pure) / (5 - 3) / 0.004**2
    assert found.p == pytest.approx(stats.f.sf(ratio, 2, 4))
    assert found.sd == pytest.approx(0.004 * np.sqrt(max(ratio - 1, 0)))
    assert misfit.parabola_lack_of_fit(fit.parabola(x[:3], y[:3]), x[:3], noise) is None


def test_lack_of_fit_keeps_its_level_and_sees_a_wrong_curve():
    p_values = []
    for seed in range(150):
        for fitted in analyse(sweep(seed), draws=10, full=False).objectives.values():
            p_values += [row.lack_of_fit.p for row in fitted.budgets]
    # Uniform under the parabola; the budgets of a sweep share a noise estimate, so 300 are independent.
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 300))
    bent = []
    for r in sweep():
        z = np.log(r.params) - TRUTHS[r.objective].log_at("params", r.budget)
        bent.append(replace(r, loss=r.loss + 0.05 * z**3))
    found = analyse(bent, draws=100, full=False)
    assert all(fitted.asymmetry.p < 0.05 for fitted in found.objectives.values())
    assert any("not symmetric" in line for line in found.warnings)


def test_the_bias_of_an_asymmetric_curve_is_what_a_cubic_takes_back():
    log_n = [np.log(3e5) + np.array([-1.3, -0.6, 0.1, 0.6, 1.2]), np.log(9e5) + np.array([-1.1, -0.5, 0.0, 0.7, 1.4])]
    truth = [np.log(3e5), np.log(9e5)]
    loss = [4 + 0.08 * (x - x0) ** 2 + 0.02 * (x - x0) ** 3 for x, x0 in zip(log_n, truth, strict=True)]
    fits = [fit.parabola(x, y) for x, y in zip(log_n, loss, strict=True)]
    found = misfit.asymmetry(fits, log_n, loss, None)
    assert found.cubic.value == pytest.approx(0.02)
    for made, x0, shift, of_loss in zip(fits, truth, found.shift_log_n, found.shift_loss, strict=True):
        assert abs(made.log_n - x0) > 0.02
        assert made.log_n + shift == pytest.approx(x0)
        assert made.loss + of_loss == pytest.approx(4)


SURFACE = {"e": 2.0, "a": 20.0, "b": 150.0, "alpha": 0.25, "beta": 0.30}


def surface(n, d):
    return SURFACE["e"] + SURFACE["a"] / n ** SURFACE["alpha"] + SURFACE["b"] / d ** SURFACE["beta"]


def on_surface(noise, seed=0):
    truths = {"mdm": Truth((3e5, 0.545), (4.6, -0.06), 0.08, 0.0)}
    rng = np.random.default_rng(seed)
    cells = simulate(make_grid(truths, sizes=6), truths, rng)
    return [replace(r, loss=float(surface(r.params, r.tokens) + noise * rng.standard_normal())) for r in cells]


def test_the_parametric_fit_finds_exponents_and_losses_of_its_own_surface():
    found = parametric.fit(on_surface(0.0))
    assert found.params_exponent == pytest.approx(0.30 / 0.55, abs=1e-4)
    assert found.params_exponent + found.tokens_exponent == pytest.approx(1)
    for c in (1.6e12, 1.6e14):
        best = optimize.minimize_scalar(
            lambda log_n, c=c: surface(np.exp(log_n), c / 6 / np.exp(log_n)), bounds=(8, 18), method="bounded"
        )
        n, d, loss = found.optimum(c)
        assert np.log(n) == pytest.approx(best.x, abs=1e-3)
        assert loss == pytest.approx(best.fun, abs=1e-5)
        assert 6 * n * d == pytest.approx(c, rel=1e-4)


def test_the_parametric_fit_agrees_with_scipys_huber_least_squares():
    results = on_surface(0.01)
    found = parametric.fit(results, noise_sd=0.01, refits=5)
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
    assert found.objective <= other.cost / 1e-6 * (1 + 1e-6)  # scipy's cost is the same sum of Huber losses
    assert found.params_exponent == pytest.approx(other.x[4] / (other.x[3] + other.x[4]), abs=1e-3)
    assert 0 < found.stderr[0] < 0.05
    assert found.params_exponent == pytest.approx(0.30 / 0.55, abs=4 * found.stderr[0])
    assert found.optimum(1.6e14)[2] == pytest.approx(3.47, abs=0.03)


def test_the_gradient_of_the_parametric_objective():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 12))
    q, target = np.array([0.1, -0.2, 0.5, -1.0, -1.3]), 1.2 + 0.001 * rng.standard_normal(12)
    scale = np.linalg.norm(parametric._huber(q, x, y, target)[1])
    error = optimize.check_grad(*(lambda q, i=i: parametric._huber(q, x, y, target)[i] for i in (0, 1)), q)
    assert error < 1e-4 * scale


def test_the_envelope_of_noiseless_curves_has_the_exponents_of_their_law():
    sizes = np.geomspace(3e4, 3e6, 15)
    c = np.geomspace(1e11, 5e13, 400)
    truth = TRUTHS["mdm"]
    curves = []
    for n in sizes:
        offset = np.log(n) - np.log(truth.params[0]) - truth.params[1] * np.log(c / 1e13)
        loss = truth.loss[0] * (c / 1e13) ** truth.loss[1] + truth.curvature * offset**2
        curves.append((n, list(zip(c, loss, strict=True))))
    found = envelope.envelope(curves, 1.6e12, 5e13)
    assert found.params_law.exponent == pytest.approx(truth.params[1], abs=0.03)  # sizes come in steps of 1.4
    assert found.loss_law.exponent == pytest.approx(truth.loss[1], abs=0.001)
    assert envelope.envelope(curves[:2], 1.6e12, 5e13) is None


def test_smoothing_keeps_straight_lines():
    x = np.sort(np.random.default_rng(0).uniform(28, 32, 80))
    at = np.linspace(x[0], x[-1], 30)
    np.testing.assert_allclose(envelope.smooth(x, 3 - 0.2 * x, at), 3 - 0.2 * at, atol=1e-6)


def test_what_a_candidate_teaches_is_what_a_refit_with_it_shows():
    fitted = analyse(sweep()).objectives["mdm"]
    rows, ahead = list(fitted.budgets), fitted.prediction.budget

    def variance(rows, key):
        weights = fit.power_law(np.log([r.budget for r in rows]), [0.0] * 4, [r.variances()[key] for r in rows]).weights
        at = np.array([1, np.log(ahead) - np.mean(np.log([r.budget for r in rows]))]) @ weights
        return at**2 @ [r.variances()[key] for r in rows]

    for candidate in [c for c in fitted.candidates if c.kind != "next budget"][::9]:
        extended = []
        for row in rows:
            if row.budget == candidate.budget:
                # A run exactly on the parabola moves no coefficient, so only variances change.
                x = np.log(candidate.params)
                extra = replace(row.runs[0], params=candidate.params, loss=float(row.parabola(x)))
                more = fit.parabola([*row.log_n, x], [*row.losses, extra.loss])
                np.testing.assert_allclose([more.log_n, more.loss], [row.parabola.log_n, row.parabola.loss])
                row = optima.optimum("mdm", row.budget, [*row.runs, extra], more, None, None)
            extended.append(row)
        for key, reduction in (("loss", candidate.loss_reduction), ("params", candidate.params_reduction)):
            assert 1 - variance(extended, key) / variance(rows, key) == pytest.approx(reduction)


def test_a_candidate_at_the_next_budget_is_a_bayesian_update():
    fitted = analyse(sweep()).objectives["arm"]
    rows, ahead = list(fitted.budgets), fitted.prediction.budget
    before = design._variances([design._design(row) for row in rows], rows, ahead)
    curvature = np.mean([row.parabola.coefficients[2] for row in rows])
    for candidate in [c for c in fitted.candidates if c.kind == "next budget"]:
        offset = np.log(candidate.params / fitted.prediction.params.value)
        gradient = np.array([fitted.prediction.loss.value, -2 * curvature * offset])
        after = np.linalg.inv(np.diag(1 / before) + np.outer(gradient, gradient))  # information adds
        np.testing.assert_allclose(
            1 - np.diag(after) / before, [candidate.loss_reduction, candidate.params_reduction], atol=1e-9
        )
    assert fitted.candidates[0].loss_reduction == max(c.loss_reduction for c in fitted.candidates)


def test_a_law_needs_two_usable_optima():
    assert power_laws.laws([], None) == {}
    results = [r for r in sweep() if r.objective == "mdm" and r.budget == 5e13]
    found = analyse(results, full=False)
    assert found.objectives["mdm"].laws == {} and found.objectives["mdm"].prediction is None
    assert found.next_budget is None
    with pytest.raises(UserError, match="no finished cell"):
        analyse([replace(r, loss=float("nan")) for r in results])


def test_the_grid_of_a_sweep_can_be_simulated():
    results = sweep()
    again = simulate(grid_of(results), TRUTHS, np.random.default_rng(0))
    assert [r.params for r in again] == [r.params for r in results]


def test_what_a_sweep_was_found_to_have_is_what_it_was_made_with():
    for name, found in truths_of(analyse(sweep(noise=1e-6), full=False)).items():
        truth = TRUTHS[name]
        assert [*found.params, *found.loss] == pytest.approx([*truth.params, *truth.loss], rel=1e-3)
        assert (found.curvature, found.noise) == (pytest.approx(truth.curvature, rel=1e-2), pytest.approx(1e-6, rel=1))
    assert truths_of(analyse(sweep(noise=0.0), full=False)) == {}


def test_laws_with_one_exponent_are_called_different_once_in_twenty():
    p = [analyse(sweep(seed=seed), draws=1000, full=False).gaps[0].equal_p for seed in range(300)]
    # Four standard errors of a share of 300 are 5%; the test is a little lax (Behrens and Fisher).
    assert 0.005 < np.mean(np.array(p) < 0.05) < 0.1 and 0.35 < np.mean(np.array(p) < 0.5) < 0.6


def test_one_run_is_as_uncertain_as_the_law_and_a_seed_together():
    for fitted in analyse(sweep(), full=False).objectives.values():
        law, run = ((e.high - e.low) / 2 for e in (fitted.prediction.loss, fitted.prediction.loss_of_run))
        seed = stats.t.ppf(0.975, fitted.noise.dof) * fitted.noise.sd
        assert run == pytest.approx(np.hypot(law, seed), rel=0.15) and run > law


def test_the_bias_of_an_exponent_is_what_shifted_optima_would_change_it_by():
    results = sweep(sizes=6)
    middle = np.mean(np.log([r.params for r in results]))
    bent = [replace(r, loss=r.loss + 0.003 * (np.log(r.params) - middle) ** 3) for r in results]
    for fitted in analyse(bent, full=False).objectives.values():
        rows = fitted.budgets
        log_c = np.log([row.budget for row in rows])
        for key, law in fitted.laws.items():
            moved = {
                "params": [row.logs["params"] + row.shift_log_n for row in rows],
                "tokens": [row.logs["tokens"] - row.shift_log_n for row in rows],
                "loss": [np.log(np.exp(row.logs["loss"]) + row.shift_loss) for row in rows],
            }[key]
            again = fit.power_law(log_c, moved, [row.variances()[key] for row in rows])
            assert abs(law.shift_exponent) > 1e-5
            assert law.shift_exponent == pytest.approx(again.exponent - law.exponent.value, rel=0.05)


SETTINGS = {  # noise of mdm and arm, curvature, sizes, repeated cells in each of the two smallest budgets
    "usual": (0.01, 0.01, 0.08, 5, 1),
    "quiet": (0.005, 0.005, 0.08, 6, 2),
    "loud": (0.02, 0.02, 0.06, 5, 1),
    "unequal": (0.02, 0.006, 0.08, 6, 1),
}
CLAIMED = [f"{o} {q}" for o in TRUTHS for q in ("params", "loss", "tokens")]
CLAIMED += [f"{o} {q} exponent" for o in TRUTHS for q in ("params", "loss", "tokens")]
DERIVED = [f"{o} predicted {q}" for o in TRUTHS for q in ("params", "loss", "tokens")] + ["gap", "size ratio"]


def simulated_coverage(setting, replicates):
    of_mdm, of_arm, curvature, sizes, repeated = SETTINGS[setting]
    truths = {
        name: replace(truth, curvature=curvature, noise=noise)
        for (name, truth), noise in zip(TRUTHS.items(), (of_mdm, of_arm), strict=True)
    }
    found = coverage(make_grid(truths, sizes=sizes, repeated=repeated), truths, replicates, seed=5)
    print(setting, {key: round(share, 4) for key, (share, _) in found.items()})
    return {key: share for key, (share, _) in found.items()}


def coverage_on_isoflop_cpu(replicates):
    """On the cells that are registered, with the laws, curvature and noise that the real sweep was found to have."""
    planned = get("isoflop_cpu").select()
    grid = [Cell(cell.objective, cell.budget, cell.params, cell.seed) for cell in planned]
    truths = truths_of(analyse(load(RESULTS), full=False))
    assert truths["mdm"].noise > 5 * truths["arm"].noise
    found = coverage(grid, truths, replicates, seed=5)
    print("isoflop_cpu", {key: round(share, 4) for key, (share, _) in found.items()})
    return {key: share for key, (share, _) in found.items()}


def test_intervals_cover_on_the_grid_of_isoflop_cpu():
    found = coverage_on_isoflop_cpu(400)
    # Four standard errors of a share of 400, 4.4%, as there are a dozen shares. Optima are four to a sweep and partly
    # independent, so this is lax.
    for key in CLAIMED:
        assert found[key] == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 400)), key


def require_92_to_98_percent(found):
    for key in CLAIMED:
        assert 0.92 <= found[key] <= 0.98, key
    for key in DERIVED:  # two noise estimates in one interval make it a little too wide (Behrens and Fisher)
        assert 0.92 <= found[key] <= 0.99, key


@pytest.mark.slow
def test_intervals_cover_92_to_98_percent_on_the_grid_of_isoflop_cpu():
    require_92_to_98_percent(coverage_on_isoflop_cpu(3000))


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_intervals_cover_92_to_98_percent(setting):
    require_92_to_98_percent(simulated_coverage(setting, 3000))
