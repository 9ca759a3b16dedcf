"""Simulated sweeps: do the intervals contain the truth?"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.simulated_sweep import TRUTHS, simulated

from diffusionlm.scaling.commands import get
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.simulation import Cell, coverage, grid_of, make_grid, simulate, truths_of
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
    shares = coverage(make_grid(truths, sizes=sizes, repeated=repeated), truths, replicates, seed=5)
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


@pytest.mark.slow
def test_intervals_cover_on_the_grid_of_isoflop_cpu():
    shares = coverage_on_isoflop_cpu(400)
    # Four standard errors of a share of 400, 4.4%, as there are a dozen shares. Optima are four to a sweep and partly
    # independent, so this is lax.
    for key in CLAIMED:
        assert shares[key] == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 400)), key


def require_92_to_98_percent(shares):
    for key in CLAIMED:
        assert 0.92 <= shares[key] <= 0.98, key
    for key in DERIVED:  # two noise estimates in one interval make it a little too wide (Behrens and Fisher)
        assert 0.92 <= shares[key] <= 0.99, key


@pytest.mark.slow
def test_intervals_cover_92_to_98_percent_on_the_grid_of_isoflop_cpu():
    require_92_to_98_percent(coverage_on_isoflop_cpu(3000))


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_intervals_cover_92_to_98_percent(setting):
    require_92_to_98_percent(simulated_coverage(setting, 3000))
