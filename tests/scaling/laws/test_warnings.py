"""Warnings: everything that is missing or not to be trusted is named."""

from dataclasses import replace

import numpy as np
import pytest
from support.simulated_sweep import complete, loose, moved, opening_downwards, select, tilted

from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.diagnostics import p_words
from diffusionlm.scaling.laws.warnings import predictions


def warned(results, text):
    return [line for line in analyse(results, draws=500, full=False).warnings if text in line]


def test_an_optimum_at_the_edge_or_outside_of_the_grid_is_named():
    assert not warned(complete(), "interval of the grid") and not warned(complete(), "outside the grid")
    results = complete(off_centre=1.4)
    lines = warned(results, "in the last interval of the grid")
    assert [(line.split(" at ")[0], line.count("(N* = ")) for line in lines] == [("mdm", 4), ("arm", 4)]
    outside = analyse(complete(off_centre=2.6), draws=500, full=False)
    lines = [line for line in outside.warnings if "outside the grid; it is in no law; the " in line]
    assert sum(line.count("(N* = ") for line in lines) == 8
    assert outside.objectives["mdm"].laws == {}


def test_curves_that_open_downwards_have_no_optimum():
    results = opening_downwards(complete())
    [line] = warned(results, "mdm at 5e+13 FLOPs: the curve has no minimum")
    best = min((r for r in results if r in select(results)), key=lambda r: r.loss)
    assert (
        "smallest size is the best" if best.params == min(r.params for r in select(results)) else "run larger"
    ) in line


def test_the_gravest_warnings_come_first():
    analysis = analyse([replace(r, flops=1.1 * r.flops) for r in tilted(complete(), 0.5)], draws=500)
    lines = list(analysis.warnings)
    assert lines[0].startswith("mdm: no power laws") and "miss their budget" in lines[-1]
    assert (
        "outside the grid" in lines[1] and lines.index(lines[1]) < [i for i, x in enumerate(lines) if "no gap" in x][0]
    )


def test_seeds_that_disagree_are_named():
    results = complete(repeated=2)
    assert not warned(results, "disagree")
    victim = next(r for r in results if r.seed == 2)
    results = [replace(r, loss=r.loss + 0.1) if r is victim else r for r in results]
    assert len(warned(results, "disagree")) == 1
    loud = [replace(r, loss=r.loss + (0.2 if r.seed == 1 else 0)) for r in results]
    assert warned(loud, "more than a quarter")


def test_repeated_data_lost_cells_and_missed_budgets_are_named():
    results = complete()
    assert warned(
        [replace(r, unique_tokens=r.tokens // 2) if r.budget == 5e13 else r for r in results], "10 of 48 cells"
    )
    assert not warned(results, "data repeat")
    lost = [replace(r, loss=float("nan")) if r is results[3] else r for r in results]
    assert warned(lost, f"{results[3].id} is left out: its evaluation is not finite")
    assert warned([replace(r, flops=1.1 * r.flops) for r in results], "miss their budget by up to 10.0%")


def test_an_evaluation_that_is_too_noisy_is_named():
    rng = np.random.default_rng(0)
    noisy = [
        replace(r, loss_per_draw=tuple(r.loss + 0.2 * rng.standard_normal(8)), loss_stderr=0.07)
        if r.objective == "mdm"
        else r
        for r in complete()
    ]
    [line] = warned(noisy, "evaluate with more draws")
    budgets = sorted({r.budget for r in noisy})
    assert line.startswith("mdm at ") and all(f"{budget:.3g}" in line for budget in budgets)
    assert line.count("nats, where they differ by") == len(budgets) == 4
    unknown = [replace(r, loss_per_draw=()) for r in complete()]
    assert warned(unknown, "lack common noise draws") == [  # nothing is random for the ARM
        "mdm at 1.6e+12, 5e+12, 1.6e+13 and 5e+13 FLOPs: cells lack common noise draws, so the evaluation error of "
        "their differences is unknown"
    ]


def test_a_rejected_curve_that_is_in_the_laws_is_named():
    clean = complete(seed=2)
    assert not warned(clean, "the curve is rejected")
    victim = next(
        r for r in select(clean, budget=1.6e12)[1:] if len([run for run in clean if run.params == r.params]) == 1
    )
    results = moved(clean, -0.06, lambda r: r is victim)
    [line] = warned(results, "the curve is rejected")
    assert "mdm at 1.6e+12 FLOPs" in line
    assert warned(results, "mdm: the losses scatter about the curves by")  # which widens all of its intervals
    verdict = analyse(results, draws=500, full=False).verdict
    assert "; doubt those of MDM: at 1 budget the curve is rejected" in verdict


@pytest.mark.slow
def test_an_approach_3_that_contradicts_the_prediction_is_named():
    fit = analyse(complete(seed=2)).objectives["arm"]
    inside, outside = fit.prediction.loss.value, fit.prediction.loss.high + 0.01
    for loss, count in ((inside, 0), (outside, 1)):
        surface = replace(fit.parametric, e=fit.parametric.e + loss - fit.parametric.optimum(fit.prediction.budget)[2])
        lines = list(predictions(replace(fit, parametric=surface)))
        assert sum("Approach 3 predicts" in line for line in lines) == count


def test_the_louder_objective_is_named_and_unrepeated_budgets_are():
    loud = moved(complete(seed=2), 0.1, lambda r: r.objective == "arm" and r.seed == 1)
    [line] = warned(loud, "scatter")[-1:]
    assert line.startswith("seeds of arm scatter")
    assert len(warned(complete(), "no cell of the 2 largest budgets is repeated")) == 2
    more = [replace(r, seed=1, loss=r.loss + 0.004) for r in select(complete())[2:3]]
    [line] = warned([*complete(), *more], "no cell of the 2 largest budgets is repeated")
    assert line.startswith("arm: ")


def test_an_optimum_that_is_bounded_far_outside_of_the_grid_is_in_no_law():
    analysis = analyse(loose(), full=False)
    fit = analysis.objectives["mdm"]
    [optimum] = [
        row.optimum for row in fit.budgets if row.optimum and row.optimum.params.bounded and not row.optimum.determined
    ]
    assert optimum.inside and optimum.budget not in fit.laws["loss"].budgets
    [line] = [x for x in analysis.warnings if f"{optimum.budget:.3g} FLOPs" in x and "is not determined" in x]
    assert "more than a spacing beyond the grid" in line and f"[{optimum.params.low:.3g}, " in line


def test_a_best_size_at_an_end_of_the_grid_is_a_warning_and_a_doubt():
    assert not warned(complete(seed=2), "size is the best that was measured")
    results = complete(off_centre=1.8)
    lines = warned(results, "size is the best that was measured")
    assert lines and all("smallest" in line or "largest" in line for line in lines)
    verdict = analyse(results, draws=500, full=False).verdict
    assert "the optimum is in the last interval of the grid" in verdict
    assert "the best measured size is at an end of the grid" in verdict


def test_what_holds_for_both_n_and_d_is_one_warning():
    """D* is C / (6 N*), so its law misfits where that of N* does, with the same p value."""
    apart = complete(seed=2)
    shifts = {budget: 0.5 * (-1) ** i for i, budget in enumerate(sorted({r.budget for r in apart}))}
    apart = [
        replace(r, params=round(r.params * np.exp(shifts[r.budget])), tokens=round(r.tokens / np.exp(shifts[r.budget])))
        for r in apart
    ]
    analysis = analyse(apart, draws=500, full=False)
    for name, fit in analysis.objectives.items():
        assert fit.laws["tokens"].lack_of_fit.p == pytest.approx(fit.laws["params"].lack_of_fit.p, rel=1e-2, abs=1e-9)
        of = [line for line in analysis.warnings if line.startswith(f"{name}: the optima leave the power law of")]
        assert sum("of N*" in line for line in of) == 1 and not any("of D*" in line for line in of)


def test_a_missing_gap_of_a_single_objective_is_the_least_grave():
    lines = analyse([run for run in complete(seed=2) if run.objective == "arm"], draws=500, full=False).warnings
    [place] = [i for i, line in enumerate(lines) if "only the objective arm has runs" in line]
    assert not any("p <" in line or "p =" in line for line in lines[place:])


def test_a_p_value_below_a_millionth_is_a_bound():
    assert [p_words(p) for p in (0.0, 5.4e-279, 1e-6, 0.0123, 1.0)] == [
        *["p < 1e-6"] * 2,
        "p = 1e-06",
        "p = 0.012",
        "p = 1",
    ]
