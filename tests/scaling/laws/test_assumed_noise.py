"""The noise that is measured, given or taken from residuals, and what the analysis says with each."""

from dataclasses import replace

import numpy as np
import pytest
from support.simulated_sweep import moved, select, simulated

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import parametric
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.noise import check_noise, seed_noise


def without_seeds(noise=0.01, seed=0):
    return [run for run in simulated(seed, noise=noise) if run.seed == 0]


def test_a_given_noise_replaces_that_of_the_seeds_and_is_not_in_doubt():
    for fit in analyse(simulated(), noise=0.02, full=False).objectives.values():
        assert fit.noise.sd == 0.02 and fit.noise.source == "given" and fit.noise.dof > 1e5


def test_a_parabola_is_tested_against_a_given_noise():
    sizes = sorted({run.params for run in select(simulated())})
    wrong = moved(without_seeds(0.002), 0.1, lambda r: r in select(without_seeds(0.002)) and r.params == sizes[1])
    known = [row for row in analyse(wrong, noise=0.002, full=False).objectives["mdm"].budgets if row.budget == 5e13]
    assert known[0].optimum.lack_of_fit.p < 1e-6
    unknown = [row for row in analyse(wrong, full=False).objectives["mdm"].budgets if row.budget == 5e13]
    assert unknown[0].optimum.lack_of_fit.p is None


def test_residuals_of_the_surface_are_the_noise_where_there_are_no_budgets():
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(np.log(1e7), np.log(1e9), 60)), np.exp(rng.uniform(np.log(1e9), np.log(1e11), 60))
    losses = 1.7 + 400 / n**0.34 + 410 / d**0.28 + 0.01 * rng.standard_normal(60)
    run = simulated()[0]
    runs = [
        replace(run, budget=np.nan, params=round(a), tokens=round(b), flops=6 * a * b, loss=y)
        for a, b, y in zip(n, d, losses, strict=True)
    ]
    fit = analyse(runs, noise="residuals").objectives[run.objective]
    assert fit.noise.source == "residuals" and fit.noise.dof == 55 and 0.007 < fit.noise.sd < 0.013
    assert fit.budgets == () and fit.laws == {} and fit.parametric.alpha == pytest.approx(0.34, abs=0.1)


def test_a_noise_larger_than_the_losses_determines_no_surface():
    runs = [run for run in without_seeds() if run.objective == "arm"]
    law = parametric.fit(runs, noise_sd=20.0, refits=3)
    assert np.isfinite(law.stderr).all() and not law.determined


@pytest.mark.parametrize("noise", [0, -1, "0", "nan", "residual", float("inf"), [1]])
def test_a_wrong_noise_is_one_line(noise):
    with pytest.raises(UserError, match="must be the standard deviation of the loss"):
        check_noise(noise)
    assert check_noise("0.005") == 0.005 and check_noise("residuals") == "residuals" and check_noise(None) is None


def test_without_noise_nothing_sounds_sure_and_residuals_are_called_so():
    runs = without_seeds()
    unknown = analyse(runs, full=False)
    assert "nothing says how well they are known" in unknown.verdict
    assert all(law.exponent.interval is None for fit in unknown.objectives.values() for law in fit.laws.values())
    scatter = analyse(runs, noise="residuals", full=False)
    assert "rest on the scatter about the curves" in scatter.verdict
    assert sum("contains misfit as well as noise" in line for line in scatter.warnings) == 2
    tests = [row.optimum.lack_of_fit for fit in scatter.objectives.values() for row in fit.budgets if row.optimum]
    assert all(test.p is None for test in tests if test)
    assert "unknown" not in analyse(runs, noise=0.01, full=False).verdict


def test_runs_of_one_seed_are_no_repeats():
    same = [replace(run, seed=0) for run in simulated()]
    assert seed_noise(same) == {"mdm": None, "arm": None}
    assert all(seed_noise(simulated()).values())
