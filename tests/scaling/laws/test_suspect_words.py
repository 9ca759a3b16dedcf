"""What a report says of suspected cells: by how much they are off, which rows they are, and what to run."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats
from support.scaling_points import grid

from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.noise import given_noise
from diffusionlm.scaling.laws.objective import _suspects_first
from diffusionlm.scaling.laws.suspect_words import hiding
from diffusionlm.scaling.laws.suspects import Outliers, outliers
from diffusionlm.scaling.report.content import to_json
from diffusionlm.scaling.report.sentences import summary
from diffusionlm.scaling.report.tables import tables
from diffusionlm.scaling.sweep.results import load

RESULTS = Path(__file__).parents[3] / "docs" / "results" / "isoflop_cpu" / "results.json"


def raised(cells, *places, by=0.5):
    """Return the cells with the losses of some raised."""
    return [replace(cell, loss=cell.loss + by * (i in places)) for i, cell in enumerate(cells)]


def arm_of(cells, full=False):
    analysis = analyse(cells, noise=0.002, draws=200, full=full)
    return analysis, analysis.objectives["arm"]


@pytest.mark.parametrize("budgets", [True, False])
def test_too_many_cells_that_are_far_off_are_said_once_and_none_is_named(budgets):
    cells = raised(grid(3, 5), 0, 3, 6, 11, 14, by=1.0)
    if not budgets:
        cells = [replace(cell, budget=math.nan) for cell in cells]
    analysis, fit = arm_of(cells)
    assert fit.suspects == () and fit.unnamed == 5  # more than a fifth of 15
    look = "curves, and leave out the budget or the sizes" if budgets else "runs, and leave out those"
    what = (
        "so many cells are far off the surface, about 5 of 15, that it is the surface that does not fit and none of "
        f"them is named, so look at the {look} that differ"
    )
    assert [line for line in analysis.warnings if "none of them is named" in line] == [f"arm: {what}"]
    assert analysis.verdict.count(what) == 1 and "suspected" not in analysis.verdict
    assert to_json(analysis)["unnamed_outliers"] == {"arm": 5}


def test_laws_of_a_surface_that_does_not_fit_are_in_doubt():
    analysis = analyse(raised(grid(3, 5), 0, 3, 6, 11, 14, by=1.0), draws=10, full=False)
    assert analysis.objectives["arm"].laws and analysis.objectives["arm"].unnamed == 5
    assert "; doubt those of ARM (so many cells are far off the surface, about 5 of 15, that" in analysis.verdict


def test_one_cell_that_hides_all_optima_is_the_reason_that_there_are_no_laws():
    cells = raised(grid(4, 7), 10, by=1.0)
    analysis, fit = arm_of(cells)
    assert not fit.laws and len(fit.hidden) == 4 and fit.without_suspects.laws
    where = f"N = {cells[10].params:.3g} at {cells[10].budget:.3g} FLOPs"
    assert analysis.verdict.endswith(
        f" no scaling law for ARM: the suspected cell {where} hides the optima of 4 budgets, as the scatter that all "
        "are judged by contains its error: repeat it, or leave it out."
    )
    exponent = fit.without_suspects.laws["params"].exponent.value
    [line] = [line for line in analysis.warnings if "this cell is suspected" in line]
    assert line.endswith(f"; there are laws without the suspected cells only, with an exponent of N* of {exponent:.3g}")
    [line] = [line for line in analysis.warnings if "at other budgets" in line]
    others = sorted({cell.budget for cell in cells} - {cells[10].budget})
    assert line.startswith("arm at {:.3g}, {:.3g} and {:.3g} FLOPs: ".format(*others))
    two, fit = arm_of(raised(cells, 24, by=-1.0))
    assert not fit.laws and "the suspected cells N = " in two.verdict and "hide the optima of 4 budgets" in two.verdict


def test_a_cell_of_a_budget_with_no_optimum_is_named_where_it_hides_others():
    """Its budget is in no law with or without it, but its error is in the scatter of all."""
    _, fit = arm_of(raised(grid(4, 7), 10, by=1.0))
    other = replace(fit.suspects[0], budget=5e17, params=123)
    fit = replace(fit, suspects=(other,))
    assert fit.hidden and not fit.in_laws(other)
    assert hiding(fit).startswith("the suspected cell N = 123 at 5e+17 FLOPs hides the optima of 4 budgets, ")
    [candidate] = _suspects_first(fit, None)
    assert (candidate.kind, candidate.params, candidate.budget) == ("suspected cell", 123, 5e17)


@pytest.mark.parametrize("seed", range(3))
def test_a_cell_that_was_taken_out_in_vain_is_none_of_too_many(seed):
    """Four of 21 are wrong, less than a fifth."""
    cells = grid(3, 7, seed, 0.003)
    result = outliers(raised(cells, 1, 2, 3, 4, by=0.05))
    assert result.unnamed == 0
    assert {suspect.params for suspect in result.suspects} <= {cells[i].params for i in (1, 2, 3, 4)}


@pytest.mark.parametrize("seed", [0, 1, 10])
def test_cells_that_were_taken_out_in_vain_are_judged_at_the_level_of_all_cells(seed):
    """In the last sweep a clean one of those has p = 0.03 by itself, which is nothing among 21 cells in five steps."""
    cells = grid(3, 7, seed, 0.003)
    result = outliers(raised(cells, 1, 2, 3, 4, by=0.05))
    assert {suspect.params for suspect in result.suspects} == {cells[i].params for i in (1, 2, 3, 4)}


@pytest.mark.parametrize("seed", range(3))
def test_repeated_data_bend_the_surface_at_a_corner_where_no_run_went_wrong(seed):
    """Tokens are worth less from the second epoch on (2305.16264, Eq. 5, with R* = 15.4); the curves are smooth."""
    cells, unique = grid(4, 7, seed, 0.0005), 1e10

    def worth(tokens):
        return min(tokens, unique) + 15.4 * unique * (1 - math.exp(-max(tokens / unique - 1, 0) / 15.4))

    losses = [cell.loss + 410.7 * (worth(cell.tokens) ** -0.28 - cell.tokens**-0.28) for cell in cells]
    repeated = [replace(cell, loss=loss) for cell, loss in zip(cells, losses, strict=True)]
    assert outliers(repeated, given_noise(0.0005)) == outliers(cells, given_noise(0.0005)) == Outliers()


def test_which_size_is_the_best_of_losses_that_are_wrong_is_no_advice():
    analysis, fit = arm_of(raised(grid(4, 7), 0, 3, 6, 8, 13, 14, 18, 27, by=0.7), full=True)
    assert not fit.laws and fit.unnamed > 5 and fit.candidates == ()
    assert not any(
        "so run smaller ones" in text or "larger ones" in text for text in (analysis.verdict, *analysis.warnings)
    )


def test_eight_equal_errors_among_many_cells_are_named_though_the_worst_seem_to_be_noise():
    """No four of them in a row are far off while the others are part of the scatter."""
    cells = grid(8, 8, noise=0.01)
    wrong = (3, 10, 17, 28, 34, 45, 52, 59)
    named = {(suspect.budget, suspect.params) for suspect in outliers(raised(cells, *wrong, by=1.0)).suspects}
    assert named == {(cells[i].budget, cells[i].params) for i in wrong}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [6, 7, 8, 10])
def test_up_to_a_third_of_the_cells_are_counted_though_they_hide_each_other(wrong):
    """The places and errors of wrong cells are drawn; their number is right to two in most sweeps."""
    counts = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cells = grid(4, 7, seed, 0.004)
        for place in rng.choice(28, wrong, replace=False):
            cells = raised(cells, place, by=rng.choice([-0.5, 0.6, 0.9]))
        assert outliers(cells).suspects == ()
        counts.append(outliers(cells).unnamed)
    assert sum(abs(count - wrong) <= 2 for count in counts) >= 16 and counts.count(0) <= 2


@pytest.mark.parametrize("sd", [0.0, 0.0005, 0.02])
def test_a_surface_that_fits_has_no_such_warning(sd):
    assert [outliers(grid(4, 7, seed, sd), given_noise(0.002)).unnamed for seed in range(3)] == [0] * 3


def test_by_how_much_a_cell_is_off_has_the_prediction_interval_of_least_squares():
    """Student's t of the residuals of the others, and the variance of the surface there by `curve_fit`."""
    cells = raised(grid(4, 7), 9)
    [suspect] = outliers(cells, given_noise(0.002)).suspects
    others = cells[:9] + cells[10:]

    def surface(at, e, log_a, log_b, alpha, beta):
        return e + np.exp(log_a - alpha * (at[0] - 18)) + np.exp(log_b - beta * (at[1] - 21))

    def place(runs):
        return np.log([[run.params for run in runs], [run.tokens for run in runs]])

    start = 1.69, np.log(406.4) - 0.34 * 18, np.log(410.7) - 0.28 * 21, 0.34, 0.28
    loss = np.array([run.loss for run in others])
    best, covariance = optimize.curve_fit(surface, place(others), loss, start, xtol=1e-12, ftol=1e-12)
    variance = ((loss - surface(place(others), *best)) ** 2).sum() / (len(others) - 5)
    steps = 1e-6 * np.eye(5)
    at = place([cells[9]])[:, 0]
    gradient = np.array([(surface(at, *(best + h)) - surface(at, *(best - h))) / 2e-6 for h in steps])
    off = cells[9].loss - surface(at, *best)
    half = stats.t.ppf(0.975, len(others) - 5) * np.sqrt(variance + gradient @ covariance @ gradient)
    assert [suspect.off.value, *suspect.off.interval] == pytest.approx([off, off - half, off + half], abs=1e-5)
    assert half > 1e-3
    [line] = [line for line in arm_of(cells)[0].warnings if "is suspected" in line]
    assert f"it is {off:+.3g} [{off - half:+.3g}, {off + half:+.3g}] nats off the surface" in line


@pytest.mark.slow
def test_the_interval_of_what_a_cell_is_off_holds():
    """It contains what the wrong cell was moved by in 95% of grids."""
    held = []
    for seed in range(120):
        cells = raised(grid(4, 7, seed, 0.01), 16, by=0.3)
        [off] = [s.off for s in outliers(cells, given_noise(0.01)).suspects if s.params == cells[16].params]
        held.append(off.low <= 0.3 <= off.high)
    low, high = stats.binom.ppf([0.001, 0.999], 120, 0.95)
    assert low <= sum(held) <= high


@pytest.mark.parametrize(("count", "rows"), [(1, "points.csv line 9"), (3, "points.csv lines 9, 10 and 11")])
def test_all_rows_of_a_suspected_cell_are_named(count, rows):
    assert f"N = 84,705,894 ({rows}): this cell is suspected" in " ".join(repeated(count))


def test_of_many_rows_of_a_suspected_cell_three_are_named():
    assert "(points.csv lines 9, 10, 11 and 2 more): this cell is suspected" in " ".join(repeated(5))
    others = [replace(run, id=f"{'ab'[i % 2]}.csv line {i}") for i, run in enumerate(rows_of(2))]
    assert "(b.csv line 9 and a.csv line 10): this cell is suspected" in " ".join(arm_of(others)[0].warnings)


def rows_of(count):
    """Return points of which one is far off, and has several rows."""
    cells = raised(grid(4, 7), 9)
    cells[9:10] = [replace(cells[9], seed=seed) for seed in range(count)]
    return [replace(run, id=f"points.csv line {i}", loss_stderr=math.nan) for i, run in enumerate(cells)]


def repeated(count):
    return [line for line in arm_of(rows_of(count))[0].warnings if "is suspected" in line]


def test_where_a_suspected_cell_hides_optima_it_is_to_be_repeated_and_nothing_else():
    cells = raised(grid(2, 7), 3)
    analysis, fit = arm_of(cells, full=True)
    assert not fit.laws and fit.hidden == {1e18, 3e19}
    assert [(run.budget, run.params, run.kind) for run in fit.candidates] == [(1e18, cells[3].params, "suspected cell")]
    [cell] = to_json(analysis)["next_cells"]
    assert (cell["best_for"], cell["params"]) == (["whether it went wrong"], cells[3].params)


def test_a_budget_that_no_suspected_cell_hides_keeps_its_own_next_run():
    """Of the largest budget only the small sizes were run, so it wants larger ones; the others hide behind a cell."""
    cells = [cell for i, cell in enumerate(grid(3, 9)) if i not in range(22, 27)]
    analysis, fit = arm_of(raised(cells, 4), full=True)
    assert fit.hidden == {cells[0].budget, cells[9].budget} and cells[-1].budget not in fit.hidden
    [suspected, larger] = fit.candidates
    assert (suspected.kind, suspected.params) == ("suspected cell", cells[4].params)
    assert (larger.kind, larger.budget) == ("new size", cells[-1].budget) and larger.params > cells[-1].params
    assert [cell["best_for"] for cell in to_json(analysis)["next_cells"]] == [
        ["whether it went wrong"],
        ["an optimum at this budget"],
    ]


def test_laws_that_hang_on_a_cell_rank_no_run():
    cells = raised(grid(4, 7), 0)
    analysis, fit = arm_of(cells, full=True)
    assert fit.hanging and [(run.kind, run.params) for run in fit.candidates] == [("suspected cell", cells[0].params)]
    assert not any("would most reduce" in sentence for sentence in summary(analysis))
    [row] = tables(analysis, to_json(analysis) | {"context": {}}, [])["next_cells"].rows
    assert row[1] == "whether it went wrong" and row[6:8] == ["", ""]


def test_a_suspected_cell_of_no_law_is_not_to_be_repeated_for_one():
    """The second is a hundred times larger than the best size, so it is in no curve."""
    cells = raised(grid(4, 7), 0)
    best = cells[3]
    far = replace(best, params=100 * best.params, tokens=best.tokens // 100, loss=best.loss + 5.0)
    _, fit = arm_of([*cells, far], full=True)
    assert fit.hanging and {suspect.params for suspect in fit.suspects} == {cells[0].params, far.params}
    [candidate] = fit.candidates
    assert (candidate.kind, candidate.params) == ("suspected cell", cells[0].params)
    # In units of the next budget, which is larger than the largest by the mean ratio of the budgets.
    assert candidate.relative_cost == pytest.approx(1e18 / (3e19 * 30 ** (1 / 3)))


def test_a_gap_that_is_not_shown_has_no_warning():
    results = load(RESULTS)
    wrong = [
        replace(r, loss=r.loss + (r.objective == "arm" and (r.budget, r.params) == (5e13, 2213440))) for r in results
    ]
    for runs, hanging in ((results, False), (wrong, True)):
        analysis = analyse(runs, draws=300, full=False)
        assert analysis.gaps and analysis.objectives["arm"].hanging == hanging
        assert any(line.startswith("the gap between mdm and arm") for line in analysis.warnings) != hanging
