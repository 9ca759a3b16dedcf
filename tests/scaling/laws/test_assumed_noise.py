"""The noise that is measured, given or taken from residuals, and what the analysis says with each."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.simulated_sweep import moved, select, simulated

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import parametric
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.assumed_noise import check_noise, noises, residual_noise


def without_seeds(noise=0.01, seed=0):
    return [run for run in simulated(seed, noise=noise) if run.seed == 0]


def test_a_given_noise_replaces_that_of_the_seeds_and_is_not_in_doubt():
    [noise] = {noises(simulated(), 0.02)[name] for name in ("mdm", "arm")}
    assert noise.sd == 0.02 and noise.source == "given"
    analysis = analyse(without_seeds(), noise=0.01, full=False)
    for fit in analysis.objectives.values():
        optimum = fit.budgets[0].optimum
        half = np.log(optimum.loss.high / optimum.loss.low) / 2
        # Normal, not Student's t: the interval of the loss by the delta method.
        expected = stats.norm.ppf(0.975) * 0.01 * np.sqrt(optimum.parabola.variances()[1]) / optimum.loss.value
        assert half == pytest.approx(expected, rel=0.05)


def test_a_parabola_is_tested_against_a_given_noise():
    sizes = sorted({run.params for run in select(simulated())})
    wrong = moved(without_seeds(0.002), 0.1, lambda r: r in select(without_seeds(0.002)) and r.params == sizes[1])
    known = [row for row in analyse(wrong, noise=0.002, full=False).objectives["mdm"].budgets if row.budget == 5e13]
    assert known[0].optimum.lack_of_fit.p < 1e-6
    unknown = [row for row in analyse(wrong, full=False).objectives["mdm"].budgets if row.budget == 5e13]
    assert unknown[0].optimum.lack_of_fit.p is None


def test_residuals_of_parabolas_estimate_the_noise_without_misfit():
    estimates = [residual_noise([r for r in without_seeds(0.01, seed) if r.objective == "mdm"]) for seed in range(40)]
    dof = estimates[0].dof
    assert all(e.source == "residuals" for e in estimates)
    total = sum(e.sd**2 for e in estimates) * dof / 0.01**2
    assert 0.001 < stats.chi2.cdf(total, 40 * dof) < 0.999


def test_residuals_of_the_surface_are_the_noise_where_there_are_no_budgets():
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(np.log(1e7), np.log(1e9), 60)), np.exp(rng.uniform(np.log(1e9), np.log(1e11), 60))
    losses = 1.7 + 400 / n**0.34 + 410 / d**0.28 + 0.01 * rng.standard_normal(60)
    run = simulated()[0]
    runs = [
        replace(run, budget=np.nan, params=round(a), tokens=round(b), flops=6 * a * b, loss=y)
        for a, b, y in zip(n, d, losses, strict=True)
    ]
    noise = residual_noise(runs)
    assert noise.dof == 55 and 0.007 < noise.sd < 0.013
    fit = analyse(runs).objectives[run.objective]
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
    assert "how certain those of MDM and ARM are is unknown" in unknown.verdict
    assert all(law.exponent.interval is None for fit in unknown.objectives.values() for law in fit.laws.values())
    scatter = analyse(runs, noise="residuals", full=False)
    assert "rest on the scatter about the curves" in scatter.verdict
    assert sum("contains misfit as well as noise" in line for line in scatter.warnings) == 2
    tests = [row.optimum.lack_of_fit for fit in scatter.objectives.values() for row in fit.budgets if row.optimum]
    assert all(test.p is None for test in tests if test)
    assert "unknown" not in analyse(runs, noise=0.01, full=False).verdict


def test_runs_of_one_seed_are_no_repeats():
    same = [replace(run, seed=0) for run in simulated()]
    assert noises(same) == {"mdm": None, "arm": None}
    assert all(noises(simulated()).values())
