"""The verdict, in one sentence."""

from dataclasses import replace

import numpy as np
import pytest
from support.scaling_points import grid
from support.simulated_sweep import REPORT_TRUTHS, complete, moved, select, simulated, tilted

from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.sweep import point_groups, points


def test_laws_without_doubts():
    clean = complete(seed=2)  # in seed 0, noise alone puts the optima of arm off their law
    assert analyse(clean, draws=500, full=False).verdict == (
        "This sweep gives scaling laws for MDM (from 4 budgets) and ARM (from 4 budgets)."
    )


@pytest.mark.parametrize(("slope", "which", "side"), [(0.5, "smallest", "smaller"), (-0.5, "largest", "larger")])
def test_it_says_what_is_known_and_what_to_run(slope, which, side):
    assert analyse(tilted(complete(seed=2), slope), draws=500, full=False).verdict == (
        "This sweep gives scaling laws for ARM (from 4 budgets); it gives none for MDM: at 4 budgets the "
        f"{which} size is the best, so run {side} ones."
    )


def test_a_row_in_bits_is_no_reason_for_more_seeds():
    results = [run for run in complete(seed=2) if run.seed == 0 and run.objective == "arm"]
    row = select(results, "arm", 1.6e12)[2]
    wrong = moved(results, row.loss * (1 / np.log(2) - 1), lambda run: run is row)
    lines = [line for line in analyse(wrong, draws=10, full=False).warnings if "arm at 1.6e+12 FLOPs" in line]
    assert any("suspected cells hide the optimum, so repeat them, or leave them out" in line for line in lines)
    assert not any("more seeds" in line or "the noise" in line for line in lines)


def test_a_suspected_row_is_named():
    budgets, sizes = np.repeat([1e18, 1e19, 1e20, 1e21], 7), np.tile(np.geomspace(0.3, 3.3, 7), 4)
    n = np.round(0.1 * budgets**0.5 * sizes)
    d = np.round(budgets / 6 / n)
    loss = 1.69 + 406 / n**0.34 + 410 / d**0.28 + 0.003 * np.random.default_rng(0).standard_normal(28)
    loss[0] /= np.log(2)
    table = {"objective": ["arm"] * 28, "budget": budgets, "params": n, "tokens": d, "loss": loss}
    [group] = point_groups.groups(points.read(table))
    analysis = analyse(group.results, draws=10, full=False)
    [line] = [line for line in analysis.warnings if "this cell is suspected" in line]
    assert line.startswith("arm at 1e+18 FLOPs, N = 30,000,000 (record 0): this cell is suspected")
    own = [replace(run, loss_stderr=0.0) for run in group.results]
    [line] = [line for line in analyse(own, draws=10, full=False).warnings if "this cell is suspected" in line]
    assert line.startswith("arm at 1e+18 FLOPs, N = 30,000,000: this cell is suspected")


def test_several_doubts_are_in_brackets_and_one_is_not():
    several = analyse(complete(off_centre=1.8), draws=500, full=False).verdict
    start = several.index("doubt those of ARM (")
    doubts = several[start + len("doubt those of ARM (") : several.index(")", start)].split("; ")
    assert len(doubts) >= 2 and all(doubt.startswith(("at ", "the best ")) for doubt in doubts)
    two = [r for r in simulated(seed=2, truths=REPORT_TRUTHS) if r.objective == "arm" or r.budget < 1e13]
    assert "doubt those of MDM: nothing shows whether" in analyse(two, draws=500, full=False).verdict


def test_points_of_others_are_no_sweep():
    clean = [replace(run, loss_stderr=np.nan) for run in complete(seed=2)]
    verdict = analyse(clean, draws=500, full=False).verdict
    assert verdict == "These points give scaling laws for MDM (from 4 budgets) and ARM (from 4 budgets)."
    verdict = analyse(tilted(clean, 0.5), draws=500, full=False).verdict
    assert "These points give scaling laws for ARM (from 4 budgets); they give none for MDM: at 4 budgets" in verdict
    [arm] = [analyse([r for r in clean if r.budget == 5e12 and r.objective == "arm"], draws=9, full=False).verdict]
    assert arm.startswith("These points give no scaling law for ARM: ")


@pytest.mark.parametrize("loss", [2.7, 3.0, 3.3, 4.1])
def test_losses_that_are_all_equal_point_to_no_size(loss):
    """As where a column of the wrong quantity was read; rounding gives some of these curves a minimum."""
    analysis = analyse([replace(run, loss=loss) for run in grid(3, 5)], draws=10)
    assert analysis.verdict == (
        "This sweep gives no scaling law for ARM: at 3 budgets all losses are equal, so see that each run has its own."
    )
    assert analysis.objectives["arm"].candidates == ()
    assert not any("run smaller" in line or "differ by" in line for line in analysis.warnings)


def test_one_optimum_is_no_law():
    one = [run for run in complete(seed=2) if run.budget == 5e12 and run.objective == "arm"]
    assert analyse(one, draws=10, full=False).verdict == (
        "This sweep gives no scaling law for ARM: only 1 budget has an optimum, and a law needs two."
    )


def test_a_law_through_two_budgets_is_in_doubt():
    results = simulated(seed=2, truths=REPORT_TRUTHS)
    few = [r for r in results if r.objective == "arm" or r.budget < 1e13]
    assert "; doubt those of MDM: nothing shows whether the laws, through two budgets, are straight lines" in (
        analyse(few, draws=500, full=False).verdict
    )
    assert "straight lines" not in analyse(results, draws=500, full=False).verdict
