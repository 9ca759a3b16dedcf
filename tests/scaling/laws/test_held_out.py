"""Predictions of runs and budgets that were left out."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.simulated_sweep import select, simulated

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import held_out
from diffusionlm.scaling.laws.analysis import analyse


def of_arm(seed=2):
    return [run for run in simulated(seed) if run.objective == "arm"]


def test_the_largest_budget_is_predicted_from_the_others_alone():
    """The prediction is that of an analysis of the smaller budgets, whatever was measured at the largest."""
    runs = of_arm()
    largest = max(run.budget for run in runs)
    law = analyse([run for run in runs if run.budget < largest], full=False).objectives["arm"].laws["params"]
    by_key = {(row.method, row.quantity): row for row in held_out.largest_budget(runs)}
    row = by_key["laws", "params"]
    assert row.predicted.value == pytest.approx(law.at(largest).value) and row.budget == largest
    assert row.measured == pytest.approx(6e5 * (largest / 1e13) ** 0.62, rel=0.2)
    assert row.holds and row.predicted.low < law.at(largest).low and law.at(largest).high < row.predicted.high


def test_runs_of_no_budget_are_in_the_surface_that_predicts_if_they_cost_less():
    runs = of_arm()
    largest = max(run.budget for run in runs)
    others = [replace(run, budget=math.nan, loss=run.loss + 0.3) for run in select(runs, "arm", 5e12)]
    beyond = [replace(run, budget=math.nan, loss=9.0, flops=2 * largest) for run in others]

    def predicted(results):
        rows = held_out.largest_budget(results, noise=0.006)
        return next(row.predicted.value for row in rows if (row.method, row.quantity) == ("surface", "loss"))

    assert abs(predicted(runs + others) - predicted(runs)) > 0.01  # they pull the surface
    assert predicted(runs + others + beyond) == predicted(runs + others)


def test_predictions_of_larger_runs_use_the_degrees_of_freedom_of_the_noise():
    """At the middle of the budgets the law is known better than a run, whose interval is Student's."""
    runs = of_arm()
    fit = analyse(runs, full=False).objectives["arm"]
    assert fit.used_noise.dof == 4 and fit.laws["loss"].lack_of_fit.sd == 0
    c = float(np.exp(fit.laws["loss"].fit.centre))
    run = replace(runs[0], flops=c, budget=math.nan)
    by_method = {row.method: row for row in held_out.larger_runs(runs, [run], draws=40_000)}
    half = stats.t.ppf(0.975, 4) * fit.used_noise.sd
    law = fit.laws["loss"].at(c)
    expected = math.hypot(law.width / 2, half)
    assert by_method["laws"].predicted.width / 2 == pytest.approx(expected, rel=0.1)
    assert by_method["surface"].predicted == fit.surface.loss_of_run(run.params, run.tokens)


def test_the_error_of_a_run_is_not_that_of_the_law():
    """Draws of the same generator would add up or cancel: with another seed the width is the same but for chance."""
    runs, widths = of_arm(), []
    for seed in range(4):
        row = held_out.larger_runs(runs, [replace(runs[0], flops=1e15)], noise=0.006, draws=20_000, seed=seed)[-1]
        law = analyse(runs, noise=0.006, draws=20_000, seed=seed, full=False).objectives["arm"].laws["loss"]
        together = law.log_at(1e15)[1] + law.effects[:, -1]
        alone = np.quantile(np.exp(together), [0.025, 0.975])
        widths.append(row.predicted.width / math.hypot(np.ptp(alone), 2 * stats.norm.ppf(0.975) * 0.006))
    assert widths == pytest.approx([1] * 4, abs=0.05)


def test_runs_of_two_objectives_are_refused_in_one_line():
    with pytest.raises(UserError, match="the runs are of arm, mdm; give those of one objective at a time"):
        held_out.larger_runs(simulated(), of_arm())
    with pytest.raises(UserError, match="of arm, mdm"):
        held_out.larger_runs(of_arm(), simulated())
