"""What is to be said of several budgets is said once."""

from support.simulated_sweep import complete, moved

from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.budget_words import Note, merged


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
