"""Losses that bend away from their power law are named, with a noise or without."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from support.simulated_sweep import complete

from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.bend import bend
from diffusionlm.scaling.laws.simulation import Truth, make_grid, simulate
from diffusionlm.scaling.laws.warnings import predictions
from diffusionlm.scaling.report.sentences import summary
from diffusionlm.scaling.sweep import point_groups, points

FILE = Path(__file__).parents[2] / "fixtures" / "scaling" / "cs336_synthetic.csv"


@pytest.fixture(scope="module")
def exact():
    """Return the points of the surface 2.69 + 1606.4 / N^0.34 + 3210.7 / D^0.36."""
    [group] = point_groups.groups(points.read(FILE))
    return group.results


def optimum(c):
    """Return L* of that surface at C = 6 N D."""
    n = np.geomspace(1e8, 1e12, 100_001)
    return float((2.69 + 1606.4 / n**0.34 + 3210.7 / (c / (6 * n)) ** 0.36).min())


@pytest.mark.parametrize("noise", [None, "residuals"])
def test_an_irreducible_loss_is_named_and_the_bent_law_is_nearer(exact, noise):
    analysis = analyse(exact, noise=noise, draws=500, full=False)
    [(_, fit)] = analysis.objectives.items()
    truth = optimum(fit.prediction.budget)
    assert fit.prediction.loss.value < truth - 0.1  # the straight law is far too low
    assert abs(fit.prediction.bent_loss.value - truth) < 0.01
    [line] = [line for line in analysis.warnings if "the other budgets predict the L* of the largest" in line]
    assert "0.14 nats too low" in line and "the bent law gives 3.638, the straight one 3.485" in line
    assert ("hindcast [" in line) == bool(noise) and ("more than the scatter" in line) != bool(noise)
    [sentence] = [sentence for sentence in summary(analysis) if "FLOPs, ARM" in sentence]
    assert (
        " nats per token with about " in sentence
        and ", or 3.6" in sentence
        and "if the law bends there as it does between the budgets" in sentence
    )
    assert "doubt those of ARM" in analysis.verdict


@pytest.mark.slow
@pytest.mark.parametrize(("budgets", "sizes", "scatter"), [(3, 3, 0.0), (3, 5, 0.0), (4, 5, 0.005), (6, 5, 0.005)])
def test_straight_laws_are_rarely_named_without_a_noise(budgets, sizes, scatter):
    """Each of two signs is at a level of 5%; of three budgets nobody can tell whether optima scatter."""
    truths = {"arm": Truth((6e5, 0.60), (3.95, -0.06), 0.07, 0.01, scatter=(0.0, scatter))}
    grid = make_grid(truths, tuple(np.geomspace(1e13, 3e14, budgets)), sizes, 2.0, off_centre=0.0, repeated=0)
    shown = 0
    for seed in range(60):
        results = simulate(grid, truths, np.random.default_rng(seed))
        [fit] = analyse(results, draws=10, full=False).objectives.values()
        shown += bend(fit).shown
        assert bend(fit).shown or not any(predictions(fit))
    assert shown <= stats.binom.ppf(0.999, 60, 0.1)


def test_bent_losses_are_named_whatever_the_noise():
    for seed in range(3):
        results = [
            replace(run, loss=run.loss + 0.05 * np.log(run.budget / 9e12) ** 2)
            for run in complete(seed=seed)
            if run.seed == 0 and run.objective == "arm"
        ]
        [fit] = analyse(results, draws=10, full=False).objectives.values()
        assert fit.noise is None and bend(fit).missed
        assert any("too low (hindcast), more than the scatter" in line for line in predictions(fit))


def test_three_budgets_show_what_they_miss_and_two_nothing(exact):
    budgets = sorted({run.budget for run in exact})
    three = [run for run in exact if run.budget in budgets[::4]]
    analysis = analyse(three, draws=10, full=False)
    fit = analysis.objectives["arm"]
    assert bend(fit) == (True, False) and fit.prediction.bent_loss is None
    assert any(", by a law that misses the largest budget by " in sentence for sentence in summary(analysis))
    two = [run for run in exact if run.budget in budgets[:2]]
    assert bend(analyse(two, draws=10, full=False).objectives["arm"]) == (False, False)
