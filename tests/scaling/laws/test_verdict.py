"""The verdict, in one sentence."""

import numpy as np
import pytest
from support.simulated_sweep import REPORT_TRUTHS, complete, moved, select, simulated, tilted

from diffusionlm.scaling.laws.analysis import analyse


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


def test_a_row_in_bits_is_no_reason_for_more_seeds_alone():
    results = [run for run in complete(seed=2) if run.seed == 0 and run.objective == "arm"]
    row = select(results, "arm", 1.6e12)[2]
    wrong = moved(results, row.loss * (1 / np.log(2) - 1), lambda run: run is row)
    lines = [line for line in analyse(wrong, draws=10, full=False).warnings if "arm at 1.6e+12 FLOPs" in line]
    reason = "the losses do not show which size is the best, so look for a run that went wrong, or run more seeds"
    assert any(reason in line for line in lines) and not any("the noise" in line for line in lines)


def test_a_law_through_two_budgets_is_in_doubt():
    results = simulated(seed=2, truths=REPORT_TRUTHS)
    few = [r for r in results if r.objective == "arm" or r.budget < 1e13]
    assert "; doubt those of MDM: nothing shows whether the laws, through two budgets, are straight lines" in (
        analyse(few, draws=500, full=False).verdict
    )
    assert "straight lines" not in analyse(results, draws=500, full=False).verdict
