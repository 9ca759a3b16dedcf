"""What is to be said of several budgets is said once."""

import math
from dataclasses import replace

from support.scaling_points import grid
from support.simulated_sweep import complete, moved

from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.budget_words import Note, merged
from diffusionlm.scaling.report.content import to_json
from diffusionlm.scaling.report.sentences import summary


def test_notes_of_one_text_are_one_line_with_the_numbers_of_each_budget():
    notes = [
        Note(3, 1e16, "look there"),
        Note(1, 1e16, "it is small", "N* = 2"),
        Note(1, 2.5e16, "it is large", "N* = 9"),
        Note(1, 5e16, "it is small", "N* = 3"),
        Note(1, 1e17, "it is small"),
        Note(2, 1e18, "look there"),
    ]
    assert list(merged("arm", notes)) == [
        (3, "arm at 1e+16 FLOPs: look there"),
        (1, "arm at 1e+16 (N* = 2), 5e+16 (N* = 3) and 1e+17 FLOPs: it is small"),
        (1, "arm at 2.5e+16 FLOPs (N* = 9): it is large"),
        (2, "arm at 1e+18 FLOPs: look there"),
    ]


def test_curves_that_are_rejected_are_one_warning_with_what_each_misses():
    clean = complete(seed=2)
    sizes = {c: sorted({r.params for r in clean if r.objective == "arm" and r.budget == c})[1] for c in (1.6e13, 5e13)}
    wrong = moved(clean, 0.06, lambda r: r.objective == "arm" and sizes.get(r.budget) == r.params)
    analysis = analyse(wrong, draws=500, full=False)
    [line] = [line for line in analysis.warnings if line.startswith("arm at") and "the curve is rejected" in line]
    misfits = [row.optimum.lack_of_fit.sd for row in analysis.objectives["arm"].budgets if row.budget in sizes]
    for budget, sd in zip(("1.6e+13", "5e+13 FLOPs"), misfits, strict=True):
        assert f"{budget} ({sd:.3g} nats, p " in line


def test_a_rejected_curve_is_in_no_laws_where_there_are_none():
    cells = grid(2, 7)
    tilted = [replace(cell, loss=cell.loss - cell.params / 1e9) for cell in cells[:7]]
    bent = [replace(cell, loss=cell.loss + 0.05 * (i % 2)) for i, cell in enumerate(cells[7:])]
    analysis = analyse(tilted + bent, noise=0.002, draws=200, full=False)
    assert not analysis.objectives["arm"].laws
    assert not any("the laws use" in line for line in analysis.warnings)
    assert [row["in_laws"] for row in to_json(analysis)["optima"]] == [False, False]


def test_only_what_the_intervals_use_is_said_of_them():
    """Losses that leave their curves by more than the given noise: no line says that intervals rest on that noise."""
    bent = [replace(cell, loss=cell.loss + 0.03 * (i % 2)) for i, cell in enumerate(grid(4, 7))]
    analysis = analyse(bent, noise=0.002, draws=200, full=False)
    assert analysis.objectives["arm"].widened
    text = "\n".join(analysis.warnings)
    assert "all intervals use the scatter" in text and "arm: tests rest on the given noise of 0.002 nats" in text
    assert "intervals and tests rest" not in text and "which no interval contains" not in text
    [sentence] = [line for line in summary(analysis) if line.startswith("Intervals hold")]
    assert "not measured here (of ARM: the larger scatter about the curves), " in sentence
    calm = analyse(grid(4, 7), noise=0.002, draws=200, full=False)
    assert "arm: intervals and tests rest on the given noise of 0.002 nats" in "\n".join(calm.warnings)
    assert str(calm) == "\n".join([calm.verdict, *calm.warnings])


def test_laws_do_not_use_a_rejected_curve_without_an_optimum():
    """At the smallest budget losses rise with the size, and leave any curve; the laws go through the others."""
    cells = [replace(cell, loss=cell.loss + (i < 7) * (0.02 * (i % 2) + 0.2 * i)) for i, cell in enumerate(grid(4, 7))]
    analysis = analyse(cells, noise=0.002, draws=200, full=False)
    fit = analysis.objectives["arm"]
    assert fit.laws and [row.usable for row in fit.budgets] == [False, True, True, True]
    [line] = [line for line in analysis.warnings if "leave the curve" in line]
    assert line.startswith("arm at 1e+18 FLOPs (") and not any("is rejected" in line for line in analysis.warnings)


def test_an_optimum_between_the_last_two_of_four_sizes_is_doubted_and_of_three_not():
    """Three sizes have no other intervals."""
    doubted = []
    for sizes in (3, 4):
        cells = [cell for i, cell in enumerate(grid(3, 7)) if i % 7 in {3: (2, 4, 5), 4: (3, 4, 5, 6)}[sizes]]
        warnings = analyse(cells, noise=0.0005, draws=200, full=False).warnings
        doubted.append(any("in the last interval of the grid; add sizes beyond" in line for line in warnings))
    assert doubted == [False, True]


def test_it_is_not_known_on_what_points_of_others_were_scored():
    """Runs of an own sweep are evaluated with common draws of noise, and where they are not it is said."""
    for stderr, lines in ((0.01, 1), (math.nan, 0)):
        cells = [replace(cell, objective="mdm", loss_stderr=stderr) for cell in grid(3, 5)]
        warnings = analyse(cells, draws=10, full=False).warnings
        assert sum("cells lack common noise draws" in line for line in warnings) == lines
