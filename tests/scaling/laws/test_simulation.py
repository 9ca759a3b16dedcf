"""Simulated sweeps: do the intervals contain the truth?"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from support.simulated_sweep import TRUTHS, simulated

from diffusionlm.scaling.commands import get
from diffusionlm.scaling.laws import curves
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.simulation import Cell, Truth, coverage, grid_of, make_grid, simulate, truths_of
from diffusionlm.scaling.sweep.results import load

RESULTS = Path(__file__).parents[3] / "docs" / "results" / "isoflop_cpu" / "results.json"


def test_the_grid_of_a_sweep_can_be_simulated():
    results = simulated()
    again = simulate(grid_of(results), TRUTHS, np.random.default_rng(0))
    assert [r.params for r in again] == [r.params for r in results]


def test_what_a_sweep_was_found_to_have_is_what_it_was_made_with():
    for name, estimated in truths_of(analyse(simulated(noise=1e-6), full=False)).items():
        truth = TRUTHS[name]
        assert [*estimated.params, *estimated.loss] == pytest.approx([*truth.params, *truth.loss], rel=1e-3)
        assert (estimated.curvature, estimated.noise) == (
            pytest.approx(truth.curvature, rel=1e-2),
            pytest.approx(1e-6, rel=1),
        )
    assert truths_of(analyse(simulated(noise=0.0), full=False)) == {}


BUDGETS = tuple(np.geomspace(1e13, 1e16, 60).tolist())
SETTINGS = {  # noise of mdm and arm, curvature, sizes, repeated cells in each of the two smallest budgets
    "usual": (0.01, 0.01, 0.08, 5, 1),
    "quiet": (0.005, 0.005, 0.08, 6, 2),
    "loud": (0.02, 0.02, 0.06, 5, 1),
    "unequal": (0.02, 0.006, 0.08, 6, 1),
}
QUANTITIES = ("params", "loss", "tokens")
OPTIMA = [f"{o} {q}" for o in TRUTHS for q in QUANTITIES]
PLACES = ("exponent", "at the largest budget", "ten times beyond")
LAWS = [f"{o} {q} {place}" for o in TRUTHS for q in QUANTITIES for place in PLACES]
DERIVED = [f"{o} predicted {q}" for o in TRUTHS for q in QUANTITIES] + ["gap", "size ratio"]


def setting_of(name):
    of_mdm, of_arm, curvature, sizes, repeated = SETTINGS[name]
    truths = {
        name: replace(truth, curvature=curvature, noise=noise)
        for (name, truth), noise in zip(TRUTHS.items(), (of_mdm, of_arm), strict=True)
    }
    return make_grid(truths, sizes=sizes, repeated=repeated), truths


def simulated_coverage(setting, replicates):
    shares = coverage(*setting_of(setting), replicates, seed=5)
    print(setting, {key: round(share, 4) for key, (share, _) in shares.items()})
    return {key: share for key, (share, _) in shares.items()}


def coverage_on_isoflop_cpu(replicates):
    """On the cells that are registered, with the laws, curvature and noise that the real sweep was shares to have."""
    planned = get("isoflop_cpu").select()
    grid = [Cell(cell.objective, cell.budget, cell.params, cell.seed) for cell in planned]
    truths = truths_of(analyse(load(RESULTS), full=False))
    assert truths["mdm"].noise > 5 * truths["arm"].noise
    shares = coverage(grid, truths, replicates, seed=5)
    print("isoflop_cpu", {key: round(share, 4) for key, (share, _) in shares.items()})
    return {key: share for key, (share, _) in shares.items()}


def test_a_truth_with_misfit_is_simulated_as_it_says():
    """Without noise a budget's losses are a curve of that shape about an optimum that is off its law."""
    truth = replace(TRUTHS["arm"], noise=0.0, shape=(0.5, 0.2), scatter=(0.3, 0.05))
    grid = make_grid({"arm": truth}, BUDGETS, sizes=9, spacing=1.5, off_centre=0.0, drift=3.0)
    results = simulate(grid, {"arm": truth}, np.random.default_rng(0))
    off = []
    for budget in BUDGETS:
        runs = [run for run in results if run.budget == budget]
        points = curves.Points(np.log([run.params for run in runs]), np.array([run.loss for run in runs]))
        fitted = curves.curve(points, 0.5, 0.2)
        assert np.abs(fitted.residuals).max() < 1e-9 and fitted.curvature == pytest.approx(truth.curvature, rel=1e-6)
        off.append((fitted.log_n - truth.log_at("params", budget), np.log(fitted.loss) - truth.log_at("loss", budget)))
    sizes = [np.mean(np.log([cell.params for cell in grid if cell.budget == c])) for c in (BUDGETS[0], BUDGETS[-1])]
    drift = sizes[1] - sizes[0] - truth.params[1] * np.log(BUDGETS[-1] / BUDGETS[0])
    assert drift == pytest.approx(-np.log(3), abs=0.01)
    assert np.std(off, axis=0) == pytest.approx(truth.scatter, rel=0.35)


def require_what_was_promised(shares):
    """At least 92% everywhere, and at most 99% of the optima; a share of 300 is off by 1%.

    Optima do not scatter about their laws here. Of four budgets nothing can tell, and intervals that hold for any
    scatter hold more often without one, so those of laws have no upper end (`test_intervals_hold_with_misfit` has it).
    """
    for key in OPTIMA:
        assert 0.92 <= shares[key] <= 0.99, key
    for key in LAWS + DERIVED:
        assert 0.92 <= shares[key], key


@pytest.mark.slow
def test_intervals_hold_on_the_grid_of_isoflop_cpu():
    require_what_was_promised(coverage_on_isoflop_cpu(300))


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_intervals_hold_without_misfit(setting):
    require_what_was_promised(simulated_coverage(setting, 300))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["usual", "loud"])
def test_intervals_of_laws_are_no_wider_than_few_budgets_make_them(setting):
    """As Student's t with the two degrees of freedom that four budgets leave; widths of 60 sweeps are off by 10%."""
    (grid, truths), rng, values, widths = setting_of(setting), np.random.default_rng(5), {}, {}
    for seed in range(60):
        analysis = analyse(simulate(grid, truths, rng), draws=1000, seed=seed, full=False)
        for name, fit in analysis.objectives.items():
            for key, law in fit.laws.items():
                values.setdefault((name, key), []).append(law.exponent.value)
                widths.setdefault((name, key), []).append(law.exponent.width)
    for key in values:
        ratio = float(np.median(widths[key])) / (2 * stats.norm.ppf(0.975) * np.std(values[key]))
        assert 1 < ratio < 1.3 * stats.t.ppf(0.975, 2) / stats.norm.ppf(0.975), (key, ratio)


@pytest.mark.slow
@pytest.mark.parametrize(("half_width", "sizes", "drift"), [(2.0, 7, 1.0), (16.0, 9, 1.0), (8.0, 9, 3.0)])
def test_intervals_hold_with_misfit(half_width, sizes, drift):
    """In 92 to 98% with both kinds, on a narrow, a wide and a drifting grid, as `scaling_coverage.py` measures it."""
    truth = Truth((6e5, 0.60), (3.95, -0.06), 0.07, 0.003, shape=(0.465, 0.155), scatter=(0.1, 0.005))
    budgets, spacing = (1e13, 3e13, 1e14, 3e14, 1e15, 3e15), half_width ** (2 / (sizes - 1))
    grid = make_grid({"arm": truth}, budgets, sizes, spacing, off_centre=0.0, repeated=2, drift=drift)
    shares = coverage(grid, {"arm": truth}, 250, draws=1000)
    for quantity, place in product(QUANTITIES, PLACES):
        assert 0.92 <= shares[f"arm {quantity} {place}"][0] <= 0.98, (quantity, place)


@pytest.mark.slow
def test_narrow_grids_hold_n_as_often_as_the_prior_of_their_shape_says():
    """In 92 to 98% of shapes drawn from it. Near its middle, as Chinchilla's is, they hold in up to 100%."""
    rng, hits = np.random.default_rng(0), []
    for seed in range(150):
        alpha, beta = np.exp(curves.TYPICAL + curves.WIDTH * rng.standard_normal(2))
        truths = {"arm": Truth((6e5, 0.60), (3.95, -0.06), 0.07, 0.003, shape=(alpha, beta))}
        grid = make_grid(truths, (1e13, 3e13, 1e14), 7, 2 ** (1 / 3), off_centre=0.0, repeated=2)
        hits.append(coverage(grid, truths, 1, draws=1000, seed=seed)["arm params"][0])
    assert 0.92 <= np.mean(hits) <= 0.98
