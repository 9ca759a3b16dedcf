"""Optima, and which of them the laws may use."""

from dataclasses import replace

import numpy as np
import pytest
from support.simulated_sweep import fit_runs, runs_on, simulated

from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.bootstrap import Estimate
from diffusionlm.scaling.laws.optima import QUANTITIES, fit_budget


def test_an_optimum_is_determined_if_its_interval_ends_within_a_spacing_of_the_grid():
    row = analyse(simulated(), full=False).objectives["mdm"].budgets[0]
    sizes = sorted({run.params for run in row.runs})
    optimum = row.optimum
    assert row.usable and optimum.spacing == pytest.approx(np.log(1.8), abs=1e-3)
    low, high = sizes[0] / 1.8, sizes[-1] * 1.8
    for ends, usable in (
        ((1.01 * low, 0.99 * high), True),
        ((0.99 * low, high / 2), False),
        ((2 * low, 1.01 * high), False),
    ):
        assert replace(optimum, params=Estimate(optimum.params.value, *ends)).usable == usable
    assert replace(optimum, params=Estimate(optimum.params.value)).usable  # with unknown noise all are


@pytest.mark.parametrize("overspent", [1.0, 1.1])
def test_the_optimum_of_an_exact_parabola_is_its_vertex(overspent):
    """N* and L* are the vertex, and D* = C / (6 N*) whether or not the runs spent exactly their budget."""
    runs = runs_on(lambda x: 2.5 + 0.08 * (x - 12.9) ** 2, overspent=overspent)
    fitted = fit_runs(runs)
    optimum = fitted.optimum
    assert optimum.params.value == pytest.approx(np.exp(12.9))
    assert optimum.tokens.value == pytest.approx(1e15 / 6 / np.exp(12.9))
    assert optimum.loss.value == pytest.approx(2.5)
    assert [optimum.logs[key] for key in QUANTITIES] == pytest.approx([12.9, np.log(1e15 / 6) - 12.9, np.log(2.5)])
    assert optimum.draws == {} and optimum.params.interval is None and optimum.usable and fitted.usable
    assert (fitted.sizes, fitted.budget, fitted.objective) == (5, 1e15, runs[0].objective)
    np.testing.assert_allclose(fitted.log_n, [12.0, 12.6, 13.1, 13.7, 14.0])
    np.testing.assert_allclose(optimum.losses, [run.loss for run in runs])
    assert optimum.spacing == pytest.approx(0.55)  # the median of 0.6, 0.5, 0.6 and 0.3


def test_the_tokens_of_three_sizes_are_a_parabola_through_them():
    """log D is curved in log N if the cost of a token is not a multiple of N (attention, embeddings)."""

    def log_d(x):
        return 20.0 - 0.9 * (x - 13) - 0.05 * (x - 13) ** 2

    runs = runs_on(lambda x: 2.5 + 0.08 * (x - 12.9) ** 2, log_n=(12.0, 13.1, 14.0))
    runs = [replace(run, tokens=np.exp(log_d(np.log(run.params)))) for run in runs]
    assert fit_runs(runs).optimum.logs["tokens"] == pytest.approx(log_d(12.9), abs=1e-9)


def test_a_parabola_without_a_minimum_or_of_two_sizes_has_no_optimum():
    fitted = fit_runs(runs_on(lambda x: 2.5 - 0.08 * (x - 12.9) ** 2))
    assert fitted.parabola is not None and fitted.optimum is None and not fitted.usable
    assert fit_budget(runs_on(lambda x: 2.5)[:2], None, None, None, None).optimum is None


@pytest.mark.parametrize(
    ("best", "inside", "at_edge"),
    [(11.9, False, True), (12.1, True, True), (12.7, True, False), (13.6, True, False), (13.8, True, True)],
)
def test_an_optimum_is_inside_the_grid_and_off_its_last_intervals(best, inside, at_edge):
    optimum = fit_runs(runs_on(lambda x: 2.5 + 0.08 * (x - best) ** 2)).optimum
    assert (optimum.inside, optimum.at_edge, optimum.usable) == (inside, at_edge, inside)


def test_an_optimum_beyond_the_largest_size_is_outside():
    optimum = fit_runs(runs_on(lambda x: 2.5 + 0.08 * (x - 14.1) ** 2)).optimum
    assert not optimum.inside and optimum.at_edge and not optimum.usable


def test_draws_of_an_optimum_are_the_vertices_of_the_drawn_parabolas():
    """A draw that opens downwards has no minimum, and one with a negative loss there has no logarithm."""
    runs = runs_on(lambda x: 2.5 + 0.08 * (x - 12.9) ** 2)
    centre = np.mean([12.0, 12.6, 13.1, 13.7, 14.0])
    vertices = [(12.9, 2.5, 0.08), (13.0, 2.4, 0.05), (12.8, -0.1, 0.08), (12.8, 2.5, -0.08)]
    drawn = np.array([[y + c * (x - centre) ** 2, -2 * c * (x - centre), c] for x, y, c in vertices])
    optimum = fit_runs(runs, drawn).optimum
    log_d = np.log(1e15 / 6)
    np.testing.assert_allclose(optimum.draws["params"], [12.9, 13.0, 12.8, np.nan])
    np.testing.assert_allclose(optimum.draws["tokens"], [log_d - 12.9, log_d - 13.0, log_d - 12.8, np.nan])
    np.testing.assert_allclose(optimum.draws["loss"], [np.log(2.5), np.log(2.4), np.nan, np.nan])
    assert optimum.params.interval is not None


def test_the_variances_of_the_logarithms_are_those_of_many_fits():
    """To first order in the noise: the delta method against refitted parabolas."""
    rng = np.random.default_rng(0)
    sd, draws = 1e-4, 20_000
    runs = runs_on(lambda x: 2.5 + 0.08 * (x - 12.9) ** 2)
    fitted = fit_runs(runs)
    losses = fitted.optimum.losses + sd * rng.standard_normal((draws, len(runs)))
    design = np.vander(fitted.log_n - fitted.parabola.centre, 3, increasing=True)
    optimum = fit_runs(runs, losses @ np.linalg.pinv(design).T).optimum
    for key, variance in optimum.variances().items():
        assert optimum.draws[key].var() / sd**2 == pytest.approx(variance, rel=5 * np.sqrt(2 / draws)), key


def test_runs_far_from_the_best_size_are_in_no_curve_and_shown_as_distant():
    """Two of nine sizes are more than ten times smaller than the best; of four sizes none is left out."""
    log_n = np.log(1e6) + np.log(3) * np.arange(-4, 5)
    runs = runs_on(lambda x: 2.5 + 0.08 * (x - np.log(1e6)) ** 2, log_n=tuple(log_n))
    [row] = analyse(runs, full=False).objectives[runs[0].objective].budgets
    assert [run.params for run in row.distant] == pytest.approx([1e6 / 81, 1e6 / 27, 27e6, 81e6])
    assert len(row.runs) == 5 and {*row.runs, *row.distant} == set(runs)
    [few] = analyse(runs[::2][:4], full=False).objectives[runs[0].objective].budgets
    assert few.distant == () and len(few.runs) == 4
