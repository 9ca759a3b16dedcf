"""The report: what it writes, that the page stands alone, and what it says of sweeps that lack something."""

import csv
import html
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from support.tiny_sweep import tiny_sweep

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import checks, envelope, parametric
from diffusionlm.scaling.laws import published as laws
from diffusionlm.scaling.laws.simulation import Truth, make_grid, simulate
from diffusionlm.scaling.laws.uncertainty import Estimate
from diffusionlm.scaling.report import document as report
from diffusionlm.scaling.report import plots

TRUTHS = {
    "mdm": Truth((3e5, 0.60), (4.6, -0.060), curvature=0.08, noise=0.005),
    "arm": Truth((6e5, 0.62), (3.95, -0.062), curvature=0.07, noise=0.005),
}
WORDS = {"title": "A sweep & <its> laws", "convention": "N counts non-embedding parameters, C = 6 N D."}


def sweep(seed=0, **grid):
    rng = np.random.default_rng(seed)
    masks = 0.02 * rng.standard_normal(8)
    results = []
    for result in simulate(make_grid(TRUTHS, **grid), TRUTHS, rng):
        c = np.geomspace(result.budget / 100, result.budget, 40)
        curve = tuple((float(x), float(result.loss * (x / result.budget) ** -0.06)) for x in c)
        if result.objective == "mdm":
            draws = tuple((result.loss + masks + 0.001 * rng.standard_normal(8)).tolist())
            result = replace(result, loss_per_draw=draws, loss_stderr=0.007)
        results.append(replace(result, curve=curve))
    return results


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sweep") / "report"
    content = report.write(sweep(), directory, **WORDS, overlay=("smdm_mdm", "quokka"), incomplete=2)
    return directory, content


def test_all_files_are_there_and_nothing_else(written):
    directory, _ = written
    pictures = {"isoflop.png", "laws.png", "gap.png", "residuals.png", "envelope.png"}
    tables = {"report.html", "report.json", "results.json", "cells.csv", "optima.csv"}
    assert {path.name for path in directory.iterdir()} == pictures | tables
    for name in pictures:
        assert (directory / name).read_bytes().startswith(b"\x89PNG")


def test_the_page_stands_alone(written):
    directory, content = written
    text = (directory / "report.html").read_text()
    assert "A sweep &amp; &lt;its&gt; laws" in text and "<its>" not in text
    assert "<script" not in text and "http" not in re.sub(r"<meta[^>]*>", "", text)
    assert text.count("data:image/png;base64,") == 5
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "width=device-width" in text and "prefers-color-scheme: dark" in text
    assert (
        text.index('"verdict"')
        < text.index("Warnings")
        < text.index("What this shows")
        < text.index("Optima")
        < text.index("<figure>")
    )
    for line in content["warnings"]:
        assert html.escape(line) in text
    for tag in ("section", "table", "tr", "td", "th", "div", "figure", "ul", "p"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_the_json_is_strict_and_what_was_returned(written):
    directory, content = written
    text = (directory / "report.json").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse) == content
    assert content["cells"] == 48 and content["incomplete"] == 2
    assert set(content["laws"]) == {"mdm", "arm"} and set(content["laws"]["mdm"]) == {"params", "tokens", "loss"}
    exponent = content["laws"]["mdm"]["loss"]["exponent"]
    assert exponent["low"] < exponent["value"] < exponent["high"] and exponent["interval"] == "95%"
    assert content["predictions"]["arm"]["loss"]["value"] < content["optima"][3]["loss"]["value"]
    assert {pair["small"] for pair in content["paired_errors"]} == {True}
    assert content["cross_checks"]["arm"]["parametric"]["params_exponent"] == pytest.approx(0.62, abs=0.1)
    assert {cell["objective"] for cell in content["next_cells"]} == {"mdm", "arm"}
    assert list(content["overlay"]) == ["smdm_mdm", "quokka"]


def test_the_tables_hold_all_cells_and_optima(written):
    directory, content = written
    with (directory / "cells.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in cells] == [result.loss for result in sweep()]
    assert max(abs(float(row["loss"]) - float(row["fitted_loss"])) for row in cells) < 0.03
    with (directory / "optima.csv").open() as file:
        optima = list(csv.DictReader(file))
    assert len(optima) == 8
    for row, other in zip(optima, content["optima"], strict=True):
        assert float(row["params_low"]) == other["params"]["low"]


def test_the_same_results_give_the_same_report(written, tmp_path):
    again = report.write(sweep(), tmp_path, **WORDS, overlay=("smdm_mdm", "quokka"), incomplete=2)
    assert again == written[1]


def test_a_later_report_replaces_an_earlier_one(written, tmp_path):
    report.write(sweep(), tmp_path, **WORDS)
    assert (tmp_path / "gap.png").exists()
    content = report.write([r for r in sweep() if r.objective == "mdm"], tmp_path, **WORDS)
    assert not (tmp_path / "gap.png").exists()  # one objective has none
    assert content["gaps"] == [] and any("only the objective mdm" in line for line in content["warnings"])


def test_without_repeated_seeds_there_are_no_intervals(tmp_path):
    content = report.write([r for r in sweep() if r.seed == 0], tmp_path, **WORDS)
    assert content["noise"] == {"mdm": None, "arm": None}
    assert sum("no intervals" in line for line in content["warnings"]) == 2
    optimum = content["optima"][0]
    assert optimum["params"]["low"] is None and optimum["params"]["interval"] == "unknown"
    assert content["predictions"]["mdm"]["loss"]["value"] > 3
    assert "[" not in re.sub(r"(?s)<style.*?</style>|brackets", "", (tmp_path / "report.html").read_text())


def test_a_budget_with_two_sizes_is_named_and_left_out(tmp_path):
    results = sweep()
    sizes = sorted({r.params for r in results if r.objective == "mdm" and r.budget == 5e13})
    results = [r for r in results if not (r.objective == "mdm" and r.budget == 5e13 and r.params in sizes[2:])]
    content = report.write(results, tmp_path, **WORDS)
    assert "mdm at 5e+13 FLOPs: sizes finished: 2, and a parabola needs 3; it has no optimum" in content["warnings"]
    assert "mdm: the laws go through 3 of 4 budgets" in content["warnings"]
    assert [o["in_laws"] for o in content["optima"] if o["objective"] == "mdm"] == [True, True, True, False]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_sweep_that_has_only_begun_is_reported(tmp_path, count):
    content = report.write(sweep()[:count], tmp_path, **WORDS, incomplete=48 - count)
    assert content["laws"] == {"mdm": {}} and content["predictions"] == {"mdm": None}
    assert any("no power laws" in line for line in content["warnings"])
    assert (tmp_path / "report.html").exists() and (tmp_path / "isoflop.png").exists()


def of(results, objective="mdm", budget=5e13):
    return [r for r in results if r.objective == objective and r.budget == budget]


def warned(results, text):
    return [line for line in report.analyse(results, draws=500, full=False).warnings if text in line]


def test_an_optimum_at_the_edge_or_outside_of_the_grid_is_named():
    assert not warned(sweep(), "interval of the grid") and not warned(sweep(), "outside the grid")
    results = sweep(off_centre=1.4)
    assert len(warned(results, "in the last interval of the grid")) == 8
    outside = report.analyse(sweep(off_centre=2.6), draws=500, full=False)
    assert sum("outside the grid; it is in no law; the " in line for line in outside.warnings) == 8
    assert outside.objectives["mdm"].laws == {}


def test_curves_that_open_downwards_have_no_optimum():
    results = [replace(r, loss=9 - r.loss) if r in of(sweep()) else r for r in sweep()]
    [line] = warned(results, "mdm at 5e+13 FLOPs: the parabola opens downwards")
    best = min((r for r in results if r in of(results)), key=lambda r: r.loss)
    assert ("smallest size is the best" if best.params == min(r.params for r in of(results)) else "run larger") in line


def tilted(results, slope):
    """The same, with losses that rise (or fall) with the size so much that the optimum leaves the grid."""
    return [replace(r, loss=r.loss + slope * np.log(r.params / 3e5)) if r.objective == "mdm" else r for r in results]


@pytest.mark.parametrize(("slope", "which", "side"), [(0.5, "smallest", "smaller"), (-0.5, "largest", "larger")])
def test_the_verdict_says_what_is_known_and_what_to_run(slope, which, side, tmp_path):
    clean = sweep(seed=2)  # in seed 0, noise alone puts the optima of arm off their law
    assert report.analyse(clean, draws=500, full=False).verdict == (
        "This sweep determines the laws of mdm from 4 budgets and of arm from 4 budgets."
    )
    content = report.write(tilted(clean, slope), tmp_path, **WORDS)
    assert content["verdict"] == (
        "This sweep determines the laws of arm from 4 budgets; none of mdm: at 4 budgets the "
        f"{which} size is the best, so run {side} ones."
    )
    assert content["verdict"] in (tmp_path / "report.html").read_text()
    cells = [cell for cell in content["next_cells"] if cell["objective"] == "mdm"]
    assert [cell["budget"] for cell in cells] == sorted({r.budget for r in sweep()})
    sizes = sorted({r.params for r in of(sweep())})
    beyond = sizes[0] / 1.8 if side == "smaller" else sizes[-1] * 1.8  # one spacing
    assert cells[-1]["params"] == pytest.approx(beyond, rel=1e-3)
    outermost = cells[0 if side == "smaller" else -1]  # other budgets' cells may be at sizes that the sweep has
    assert outermost["nearest_preset"].startswith(f"{side} than ") and outermost["loss_reduction"] is None


def test_the_gravest_warnings_come_first():
    analysis = report.analyse([replace(r, flops=1.1 * r.flops) for r in tilted(sweep(), 0.5)], draws=500)
    lines = list(analysis.warnings)
    assert lines[0].startswith("mdm: no power laws") and "miss their budget" in lines[-1]
    assert (
        "outside the grid" in lines[1] and lines.index(lines[1]) < [i for i, x in enumerate(lines) if "no gap" in x][0]
    )


def drawn(make, results, overlays=()):
    """The figure that one of the makers of pictures draws."""
    from matplotlib.figure import Figure

    figure = Figure()
    return figure, make(figure, report.analyse(results, full=False), overlays)


def labels_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def undetermined(results):
    """MDM with optima inside the grid that the noise leaves open."""
    rng = np.random.default_rng(1)
    means = {budget: np.mean([r.loss for r in of(results, budget=budget)]) for budget in {r.budget for r in results}}
    return [
        replace(r, loss=means[r.budget] + 0.1 * (r.loss - means[r.budget]) + 0.02 * rng.standard_normal())
        if r.objective == "mdm"
        else r
        for r in results
    ]


def test_a_rejected_optimum_is_a_hollow_star_and_one_outside_none():
    figure, _ = drawn(plots._isoflop, undetermined(sweep()))
    assert "optimum in no law" in labels_of(figure.axes[0]) and "optimum" not in labels_of(figure.axes[0])
    assert labels_of(figure.axes[1])[-1] == "optimum"
    figure, _ = drawn(plots._isoflop, tilted(sweep(), 0.5))
    assert not any("optimum" in label for label in labels_of(figure.axes[0]))
    sizes = [r.params for r in sweep() if r.objective == "mdm"]
    low, high = figure.axes[0].get_xlim()
    assert min(sizes) / 2 < low and high < 2 * max(sizes)


def test_the_plot_of_laws_names_what_it_lacks_and_overlays_do_not_stretch_it():
    overlays = [laws.get("smdm_mdm"), laws.get("smdm_arm")]
    figure, there = drawn(plots._laws, tilted(sweep(), 0.5), overlays)
    [legend] = figure.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert there and "no law of mdm" in said and any("slope only" in text for text in said)
    found = [r.params for r in sweep() if r.objective == "arm"]
    low, high = figure.axes[0].get_ylim()
    assert min(found) / 5 < low and high < 5 * max(found)
    ticks = figure.axes[0].xaxis.get_major_locator()()
    assert 2 <= len(ticks) <= 6 and not figure.axes[0].xaxis.get_minorticklocs().size
    assert not drawn(plots._laws, tilted(sweep()[:24], 0.5))[1]  # no law at all


def test_the_page_says_which_pictures_are_not_there(tmp_path):
    report.write([r for r in tilted(sweep(), 0.5) if r.objective == "mdm"], tmp_path, **WORDS)
    assert not (tmp_path / "laws.png").exists()
    assert "No plot of the laws" in (tmp_path / "report.html").read_text()


def test_residuals_name_the_budgets_without_a_minimum():
    results = [replace(r, loss=9 - r.loss) if r in of(sweep()) else r for r in sweep()]
    figure, _ = drawn(plots._residuals, results)
    assert [text.get_text() for text in figure.axes[0].texts] == [r"no minimum at $5 \times 10^{13}$ FLOPs"]
    assert not figure.axes[1].texts


def test_the_ends_of_curves_do_not_make_spikes_in_the_envelope():
    c = np.geomspace(1e9, 1e10, 200)
    curves = [(n, list(zip(c, 3 * (c / 1e9) ** -0.05 + 0.01 * i, strict=True))) for i, n in enumerate((1e4, 2e4, 3e4))]
    noisy = [(n, [(x, y - (0.3 if x > 0.97e10 else 0)) for x, y in curve]) for n, curve in curves]
    smooth, spiked = (envelope.envelope(some, 2e9, 1e10) for some in (curves, noisy))
    assert smooth.c[-1] < 1e10 * np.exp(-0.9 * envelope.BANDWIDTH)
    assert np.abs(spiked.loss - smooth.loss).max() < 0.1


def described(tmp_path, tokens):
    """What a page would say of a tiny sweep of which one cell has finished with so many held-out tokens."""
    made = tiny_sweep()
    done = tmp_path / "cells" / made.cells[0].id
    done.mkdir(parents=True)
    (done / "DONE.json").write_text(json.dumps({"eval": {"tokens": tokens, "bytes": 3 * tokens}}))
    identity = {"dataset": "abc", "unique_tokens": 12345}
    return made, *report.describe(made, made.cells, tmp_path, identity, today="2026-11-25")


def test_the_page_says_what_was_measured(tmp_path):
    made, context, warnings = described(tmp_path, 10**9)
    recipe = made.cells[0].recipe
    assert not warnings
    assert context["dataset"] == "sha256 abc" and context["training text"] == "12,345 different tokens"
    assert context["held-out text, scored"] == "1,000,000,000 tokens, 3,000,000,000 bytes of text"
    assert context["date of this report"] == "2026-11-25"
    told = " ".join(context.values())
    for value in (
        recipe.dtype,
        f"{recipe.peak_lr:g}",
        f"{recipe.batch_size} sequences of {recipe.sequence_length} tokens",
    ):
        assert value in told
    content = report.write(sweep(), tmp_path / "report", **WORDS, context=context, warnings=["of the data"])
    text = (tmp_path / "report" / "report.html").read_text()
    assert content["warnings"][0] == "of the data" and "What was measured" in text
    assert content["context"] == context | {"counts": WORDS["convention"]}
    assert all(html.escape(value) in text for value in content["context"].values())


def test_fewer_held_out_records_than_asked_for_are_named(tmp_path):
    recipe = tiny_sweep().cells[0].recipe
    _, _, [line] = described(tmp_path, 3 * (recipe.sequence_length - 1))
    assert f"3 of {recipe.eval_records:,} held-out records" in line


def test_an_arm_is_evaluated_exactly(written):
    assert (written[0] / "report.html").read_text().count("exact for this text") == 4


def test_an_undetermined_exponent_of_approach_3_is_not_printed(written):
    fitted = parametric.fit([r for r in sweep() if r.objective == "arm"])
    assert fitted.determined
    assert replace(fitted, stderr=(0.1, 0.1)).determined
    assert not replace(fitted, stderr=(0.4, 0.1)).determined


def test_seeds_that_disagree_are_named():
    results = sweep(repeated=2)
    assert not warned(results, "disagree")
    victim = next(r for r in results if r.seed == 2)
    results = [replace(r, loss=r.loss + 0.1) if r is victim else r for r in results]
    assert len(warned(results, "disagree")) == 1
    loud = [replace(r, loss=r.loss + (0.2 if r.seed == 1 else 0)) for r in results]
    assert warned(loud, "more than a quarter")


def test_repeated_data_lost_cells_and_missed_budgets_are_named():
    results = sweep()
    assert warned(
        [replace(r, unique_tokens=r.tokens // 2) if r.budget == 5e13 else r for r in results], "10 of 48 cells"
    )
    assert not warned(results, "data repeat")
    lost = [replace(r, loss=float("nan")) if r is results[3] else r for r in results]
    assert warned(lost, f"left out for want of a finite loss: {results[3].id}")
    assert warned([replace(r, flops=1.1 * r.flops) for r in results], "miss their budget by up to 10.0%")


def test_an_evaluation_that_is_too_noisy_is_named():
    rng = np.random.default_rng(0)
    noisy = [
        replace(r, loss_per_draw=tuple(r.loss + 0.2 * rng.standard_normal(8)), loss_stderr=0.07)
        if r.objective == "mdm"
        else r
        for r in sweep()
    ]
    assert len(warned(noisy, "evaluate with more draws")) == 4
    unknown = [replace(r, loss_per_draw=()) for r in sweep()]
    assert len(warned(unknown, "lack common noise draws")) == 4  # nothing is random for the ARM


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no finished cell"):
        report.write([], tmp_path, **WORDS)
    with pytest.raises(UserError, match="unknown published law"):
        report.write(sweep(), tmp_path, **WORDS, overlay=["smdm"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report"):
        report.write(sweep()[:2], tmp_path / "file", **WORDS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plots.render(report.analyse(sweep()[:2]))


def moved(results, by, which):
    """The same, with the loss of some runs moved."""
    return [replace(r, loss=r.loss + by) if which(r) else r for r in results]


def test_a_law_that_hangs_on_one_budget_is_named(tmp_path):
    clean = sweep(seed=2)
    assert not warned(clean, "leaves its interval")
    results = moved(clean, 0.1, lambda r: r.objective == "mdm" and r.budget == 1.6e12)
    content = report.write(results, tmp_path, **WORDS)
    [line] = [line for line in content["warnings"] if "exponent of L* leaves its interval" in line]
    without = content["laws"]["mdm"]["loss"]["without"]
    assert f"{without[0]['exponent']['value']:.4g} without that of 1.6e+12 FLOPs" in line and line.startswith("mdm: ")
    text = (tmp_path / "report.html").read_text()
    table = text[text.index("The laws without one budget") :].split("</section>")[0]
    assert "without 5e+13" in table and "] *</td>" in table and table.count("<tr>") == 7


def test_a_rejected_parabola_that_is_in_the_laws_is_named():
    clean = sweep(seed=2)
    assert not warned(clean, "the parabola is rejected")
    victim = next(r for r in of(clean, budget=1.6e12)[1:] if len([o for o in clean if o.params == r.params]) == 1)
    results = moved(clean, -0.06, lambda r: r is victim)
    [line] = warned(results, "the parabola is rejected")
    assert "mdm at 1.6e+12 FLOPs" in line and f"the run of {victim.params:,} parameters is off by -0.0" in line
    verdict = report.analyse(results, draws=500, full=False).verdict
    assert ", but of mdm at 1 budget the parabola is rejected" in verdict


def loose():
    """A sweep with an optimum that is bounded, but not within a spacing of the grid."""
    truths = {"mdm": replace(TRUTHS["mdm"], noise=0.03)}
    return simulate(make_grid(truths), truths, np.random.default_rng(34))


def test_an_optimum_that_is_bounded_far_outside_of_the_grid_is_in_no_law():
    fitted = report.analyse(loose(), full=False)
    [row] = [row for row in fitted.objectives["mdm"].budgets if row.params.bounded and not row.determined]
    assert row.inside and row.budget not in fitted.objectives["mdm"].laws["loss"].budgets
    [line] = [line for line in fitted.warnings if f"{row.budget:.3g} FLOPs" in line and "is not determined" in line]
    assert "more than a spacing beyond the grid" in line and f"[{row.params.low:.3g}, " in line
    figure, _ = drawn(plots._isoflop, loose())
    low, high = figure.axes[0].get_xlim()
    sizes = [r.params for r in loose()]
    assert low > min(sizes) / 1.81 and high < max(sizes) * 1.81  # its interval stretches nothing


def test_a_law_through_two_budgets_is_in_doubt():
    results = simulate(make_grid(TRUTHS), TRUTHS, np.random.default_rng(2))
    few = [r for r in results if r.objective == "arm" or r.budget < 1e13]
    assert "but of mdm nothing shows whether the laws, through two budgets, are straight lines" in (
        report.analyse(few, draws=500, full=False).verdict
    )
    assert "straight lines" not in report.analyse(results, draws=500, full=False).verdict


def test_no_one_number_is_the_gap_where_exponents_differ(tmp_path):
    equal = TRUTHS | {"mdm": replace(TRUTHS["mdm"], loss=(4.6, TRUTHS["arm"].loss[1]))}
    for truths, differ in ((TRUTHS, True), (equal, False)):
        results = simulate(make_grid(truths), truths, np.random.default_rng(2))
        content = report.write(results, tmp_path, **WORDS)
        [gap] = content["gaps"]
        assert (gap["equal_exponents_p"] < 0.05) == differ == (gap["common"] is None)
        assert any("is not one number" in line for line in content["warnings"]) == differ
        text = (tmp_path / "report.html").read_text()
        widest = max(row["extrapolated_by"] for rows in ("at_budgets", "at_own_budgets") for row in gap[rows])
        told = f"taken to be parallel, with a law extrapolated by up to {widest:.3g} times in compute.</p>"
        assert widest > 1 and (told in text) != differ
        assert ("No one number is the gap" in text) == differ
        figure, _ = drawn(plots._gap, results)
        assert any("one exponent" in label for label in labels_of(figure.axes[0])) != differ


def test_the_gap_is_given_at_the_budgets_of_both_and_says_how_far_a_law_is_extrapolated(written):
    [gap] = written[1]["gaps"]
    text = html.unescape((written[0] / "report.html").read_text())
    for name, other, rows in (("ARM", "MDM", gap["at_budgets"]), ("MDM", "ARM", gap["at_own_budgets"])):
        assert len(rows) == 4
        for row in rows:
            assert f"{row['budget']:.3g} of {name}" in text
            if row["extrapolated_by"] > 1:
                assert f"law of {other}, {row['extrapolated_by']:.3g} times" in text
    assert max(row["extrapolated_by"] for row in gap["at_own_budgets"]) > 5


def test_a_gap_is_known_at_a_single_optimum(tmp_path):
    results = [r for r in sweep() if r.objective == "arm" or r.budget == 5e13]
    content = report.write(results, tmp_path, **WORDS)
    [gap] = content["gaps"]
    assert gap["at_budgets"] == [] and gap["common"] is None and len(gap["at_own_budgets"]) == 1
    truth = 5 * (4.6 * 5**-0.06 / 3.95) ** (1 / 0.062)
    assert gap["at_own_budgets"][0]["gap"]["low"] < truth < gap["at_own_budgets"][0]["gap"]["high"]
    assert any("is only known at one optimum of mdm" in line for line in content["warnings"])
    assert "There is no falling loss law of MDM" in (tmp_path / "report.html").read_text()


def test_a_bend_of_the_losses_is_told_and_not_denied(tmp_path):
    report.write(sweep(seed=2), tmp_path, **WORDS)
    text = (tmp_path / "report.html").read_text()
    assert text.count("cannot be told from a slightly different exponent") == 2 and "bends upwards" not in text
    assert not warned(sweep(seed=2), "hindcast")
    bent = [
        replace(r, loss=r.loss + 0.02 * np.log(r.budget / 9e12) ** 2) if r.objective == "arm" else r for r in sweep()
    ]
    report.write(bent, tmp_path, **WORDS)
    text = (tmp_path / "report.html").read_text()
    assert text.count("cannot be told from a slightly different exponent") == 1
    assert "The law of ARM&#x27;s loss is no straight line in logarithms" in text and "bends upwards" in text
    [line] = warned(bent, "hindcast")
    assert line.startswith("arm: the other budgets predict") and "too low" in line


def test_an_approach_3_that_contradicts_the_prediction_is_named():
    fit = report.analyse(sweep(seed=2)).objectives["arm"]
    inside, outside = fit.prediction.loss.value, fit.prediction.loss.high + 0.01
    for loss, said in ((inside, 0), (outside, 1)):
        surface = replace(fit.parametric, e=fit.parametric.e + loss - fit.parametric.optimum(fit.prediction.budget)[2])
        lines = list(checks._predictions(replace(fit, parametric=surface)))
        assert sum("Approach 3 predicts" in line for line in lines) == said


def test_a_best_size_at_an_end_of_the_grid_is_a_warning_and_a_doubt():
    assert not warned(sweep(seed=2), "size is the best that was measured")
    results = sweep(off_centre=1.8)
    lines = warned(results, "size is the best that was measured")
    assert lines and all("smallest" in line or "largest" in line for line in lines)
    verdict = report.analyse(results, draws=500, full=False).verdict
    assert "the optimum is in the last interval of the grid" in verdict
    assert "the best measured size is at an end of the grid" in verdict


def test_an_undetermined_approach_1_is_a_row(tmp_path):
    report.write([replace(r, curve=()) for r in sweep()], tmp_path, **WORDS)
    text = (tmp_path / "report.html").read_text()
    assert text.count("Approach 1 (envelope)</td><td>not determined</td>") == 2


def test_a_next_cell_outside_of_the_sizes_is_named_as_such(written):
    for objective in TRUTHS:
        sizes = [r.params for r in sweep() if r.objective == objective]
        for cell in [cell for cell in written[1]["next_cells"] if cell["objective"] == objective]:
            side = "smaller than " if cell["params"] < 0.99 * min(sizes) else ""
            side = "larger than " if cell["params"] > 1.01 * max(sizes) else side
            assert cell["nearest_preset"].startswith(side + "n")
    assert any(" than " in cell["nearest_preset"] for cell in written[1]["next_cells"])


def test_the_louder_objective_is_named_and_unrepeated_budgets_are():
    loud = moved(sweep(seed=2), 0.1, lambda r: r.objective == "arm" and r.seed == 1)
    [line] = warned(loud, "scatter")[-1:]
    assert line.startswith("seeds of arm scatter")
    assert len(warned(sweep(), "no cell of the 2 largest budgets is repeated")) == 2
    more = [replace(r, seed=1, loss=r.loss + 0.004) for r in of(sweep())[2:3]]
    [line] = warned([*sweep(), *more], "no cell of the 2 largest budgets is repeated")
    assert line.startswith("arm: ")


def test_legends_cover_nothing_and_name_only_what_is_drawn(written):
    figure, _ = drawn(plots._residuals, sweep())
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert all("seed sd" in axes.get_title() for axes in figure.axes)
    figure, _ = drawn(plots._gap, moved(sweep(), 1.0, lambda r: r.objective == "mdm"))  # a gap beyond all budgets
    left = figure.axes[0]
    for line in left.get_lines():
        if not line.get_label().startswith("_"):
            assert np.isfinite(line.get_ydata()).any(), line.get_label()


@pytest.mark.parametrize("decades", [1, 2.5, 6])
def test_ticks_do_not_touch(decades):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.set(xscale="log", xlim=(1e3, 1e3 * 10**decades))
    plots._few_ticks(axes.xaxis)
    shown = [tick for tick in axes.xaxis.get_major_locator()() if 1e3 <= tick <= 1e3 * 10**decades]
    assert 3 <= len(shown) <= 8


def test_a_bar_is_cut_at_its_limit_with_an_arrow():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    style = {"color": "black", "marker": "o", "fill": True}
    plots._points(axes, [1.0], [Estimate(5.0, 1e-9, 6.0)], style, "", [(2.0, 9.0)])
    assert axes.dataLim.y0 == 2 and [line.get_marker() for line in axes.get_lines()].count("v") == 1
    assert [line.get_marker() for line in axes.get_lines()].count("^") == 0
