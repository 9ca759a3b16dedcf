"""The page: it stands alone, escapes what it shows, and says what a sweep lacks."""

import html
import re
from dataclasses import replace

import numpy as np
import pytest
from support.report_page import page_of
from support.simulated_sweep import REPORT_TRUTHS, complete, moved, select, simulated, tilted

from diffusionlm.scaling.laws import diagnostics
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.report import document, interactive, page, plots
from diffusionlm.scaling.report.content import to_json
from diffusionlm.scaling.report.sentences import summary


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    """The page as it is written without published laws, whose sources are addresses, and the content of report.json."""
    directory, words = tmp_path_factory.mktemp("report"), {"title": "A sweep & <its> laws", "convention": "C = 6 N D."}
    pictures = {path.name: path.read_bytes() for path in report[0].glob("*.png")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "render", lambda *args: pictures)  # drawn once
        patch.setattr(interactive, "available", lambda: False)
        content = document.write(complete(), directory, **words, incomplete=2)
    return (directory / "report.html").read_text(), content


def test_it_stands_alone(written):
    text, content = written
    assert "A sweep &amp; &lt;its&gt; laws" in text and "<its>" not in text
    # The letters of a picture spell any word of four by chance.
    words = re.sub(r"<meta[^>]*>|(?<=data:image/png;base64,)[A-Za-z0-9+/=]+", "", text)
    assert "<script" not in text and "http" not in words
    assert text.count("data:image/png;base64,") == words.count("data:image/png;base64,") == 5
    assert not re.search(r'(src|href)="(?!data:|#warnings")', text)
    assert "width=device-width" in text and "prefers-color-scheme: dark" in text
    assert (
        text.index('"verdict"')
        < text.index("<figure>")
        < text.rindex("</figure>")
        < text.index("What this shows")
        < text.index("<h2>Warnings")
        < text.index("<h2>Optima")
    )
    for line in content["warnings"]:
        assert line in html.unescape(text)
    for tag in ("section", "table", "tr", "td", "th", "div", "figure", "ul", "p"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_whatever_it_shows_is_escaped():
    analysis = replace(analyse(complete()[:2], full=False), warnings=('<b>"bold"</b>',))
    content = {
        "title": "<i>",
        "cells": 2,
        "verdict": "a < b",
        "context": {"<u>": "'&'"},
        "next_cells": [],
        "about": "<s>",
    }
    text = page.render(analysis, content, {}, [])
    for raw in ("<i>", "<b>", "<u>", "<s>", "'&'"):
        assert raw not in text
    for shown in ("<i>", '<b>"bold"</b>', "a < b", "<u>", "'&'"):
        assert shown in html.unescape(text)


def test_without_repeated_seeds_there_are_no_intervals():
    content, text = page_of([r for r in complete() if r.seed == 0])
    assert content["noise"] == {"mdm": None, "arm": None}
    assert sum("no intervals" in line for line in content["warnings"]) == 2
    optimum = content["optima"][0]
    assert optimum["params"]["low"] is None and optimum["params"]["interval"] == "unknown"
    assert content["predictions"]["mdm"]["loss"]["value"] > 3
    text = re.sub(r"(?s)<style.*?</style>|brackets", "", text)
    assert text.count("<tr>") > 20 and "[" not in text
    assert "There are no intervals, because the noise is unknown; so nothing here says how sure any number is." in text


def test_without_a_noise_nothing_is_said_in_the_words_of_one():
    sure = ["off the variance.", "with 95% intervals", "brackets hold", "weighted by the variance"]
    picture = {"isoflop.png": b""}
    _, text = page_of([r for r in complete() if r.seed == 0], full=True, pictures=picture)
    assert not [words for words in sure if words in text]
    assert "would say most about that loss" in text
    assert "by no more than they scatter, which is no test" in text and "nothing here tests" not in text
    _, text = page_of(complete(), full=True, pictures=picture)
    assert [words for words in sure if words in text] == sure


def test_a_p_value_that_no_tail_supports_is_not_printed():
    printed = [diagnostics.p_words(p) for p in (0.0, 5.4e-279, 2e-6, 0.163)]
    assert printed == ["p < 1e-6"] * 2 + ["p = 2e-06", "p = 0.16"]
    assert diagnostics.p_number(0) == "< 1e-6" and diagnostics.p_number(0.5) == "0.5"


def test_a_budget_with_two_sizes_is_named_and_left_out():
    results = complete()
    sizes = sorted({r.params for r in select(results)})
    results = [r for r in results if not (r in select(results) and r.params in sizes[2:])]
    content, _ = page_of(results)
    assert (
        "mdm at 5e+13 FLOPs (sizes finished: 2): a curve needs 3 sizes, so there is no optimum" in content["warnings"]
    )
    assert "mdm: the laws go through 3 of 4 budgets" in content["warnings"]
    assert [o["in_laws"] for o in content["optima"] if o["objective"] == "mdm"] == [True, True, True, False]


@pytest.mark.parametrize(("slope", "side"), [pytest.param(0.5, "smaller", marks=pytest.mark.slow), (-0.5, "larger")])
def test_without_a_law_it_shows_the_verdict_and_the_cells_to_run(slope, side):
    content, text = page_of(tilted(complete(seed=2), slope), full=True)
    assert f"so run {side} ones" in content["verdict"] and content["verdict"] in text
    cells = [cell for cell in content["next_cells"] if cell["objective"] == "mdm"]
    assert [cell["budget"] for cell in cells] == sorted({r.budget for r in complete()})
    sizes = sorted({r.params for r in select(complete())})
    beyond = sizes[0] / 1.8 if side == "smaller" else sizes[-1] * 1.8  # one spacing
    assert cells[-1]["params"] == pytest.approx(beyond, rel=1e-3)
    outermost = cells[0 if side == "smaller" else -1]  # other budgets' cells may be at sizes that the sweep has
    assert outermost["nearest_preset"].startswith(f"{side} than ") and outermost["loss_reduction"] is None


def test_a_next_cell_outside_of_the_sizes_is_named_as_such(written):
    cells = written[1]["next_cells"]
    for objective in REPORT_TRUTHS:
        sizes = [r.params for r in complete() if r.objective == objective]
        for cell in [cell for cell in cells if cell["objective"] == objective]:
            side = "smaller than " if cell["params"] < 0.99 * min(sizes) else ""
            side = "larger than " if cell["params"] > 1.01 * max(sizes) else side
            assert cell["nearest_preset"].startswith(side + "n")
    assert any(" than " in cell["nearest_preset"] for cell in cells)


def test_cells_that_settle_nothing_are_not_named():
    analysis = analyse(complete(seed=2))
    content, text = to_json(analysis), " ".join(summary(analysis))
    assert {cell["objective"] for cell in content["next_cells"]} == {"mdm", "arm"} and "None of the cand" not in text
    shares = [max(cell["loss_reduction"], cell["params_reduction"]) for cell in content["next_cells"]]
    assert min(shares) >= 0.005  # nothing is shown as 0%
    fits = {}
    for name, fit in analysis.objectives.items():
        few = [replace(c, loss_reduction=0.004, params_reduction=c.params_reduction / 50) for c in fit.candidates]
        fits[name] = replace(fit, candidates=tuple(few))
    analysis = replace(analysis, objectives=fits)
    for cell in to_json(analysis)["next_cells"]:
        assert all(purpose.startswith("N*") for purpose in cell["best_for"]) and cell["params_reduction"] >= 0.005
    assert " ".join(summary(analysis)).count("None of the candidates for the next cell settles that loss") == 2


@pytest.mark.slow
def test_it_says_which_pictures_are_not_there():
    results = [r for r in tilted(complete(), 0.5) if r.objective == "mdm"]
    pictures = plots.render(analyse(results, full=False))
    assert "laws.png" not in pictures and "isoflop.png" in pictures
    _, text = page_of(results, pictures=pictures)
    assert "No plot of the laws" in text and text.count("<figure>") == len(pictures)


def test_an_arm_is_evaluated_exactly(written):
    assert written[0].count("exact for this text") == 4


def test_a_law_that_one_budget_bends_is_named_and_has_a_wide_interval():
    clean = analyse(complete(seed=2), full=False)
    assert not any("leave the power law" in line for line in clean.warnings)
    results = moved(complete(seed=2), 0.1, lambda r: r.objective == "mdm" and r.budget == 1.6e12)
    content, text = page_of(results)
    [line] = [line for line in content["warnings"] if "the optima leave the power law of L*" in line]
    assert line.startswith("mdm: ")
    exponent = content["laws"]["mdm"]["loss"]["exponent"]
    assert exponent["high"] - exponent["low"] > 3 * clean.objectives["mdm"].laws["loss"].exponent.width
    assert exponent["low"] < REPORT_TRUTHS["mdm"].loss[1] < exponent["high"]
    table = text[text.index("The laws without one budget") :].split("</section>")[0]
    assert "without 5e+13" in table and table.count("<tr>") == 7


@pytest.mark.parametrize("differ", [True, False])
def test_no_one_number_is_the_gap_where_exponents_differ(differ):
    equal = REPORT_TRUTHS | {"mdm": replace(REPORT_TRUTHS["mdm"], loss=(4.6, REPORT_TRUTHS["arm"].loss[1]))}
    results = simulated(seed=2, truths=REPORT_TRUTHS if differ else equal)
    content, text = page_of(results)
    [gap] = content["gaps"]
    assert (gap["equal_exponents_p"] < 0.05) == differ == (gap["common"] is None)
    assert any("is not one number" in line for line in content["warnings"]) == differ
    largest = max(row["extrapolated_by"] for rows in ("at_budgets", "at_own_budgets") for row in gap[rows])
    sentence = f"taken to be parallel, with a law extrapolated by up to {largest:.3g} times in compute.</p>"
    assert largest > 1 and (sentence in text) != differ
    assert ("No one number is the gap" in text) == differ


def test_the_gap_is_given_at_the_budgets_of_both_and_says_how_far_a_law_is_extrapolated(written):
    [gap] = written[1]["gaps"]
    text = html.unescape(written[0])
    for name, other, rows in (("ARM", "MDM", gap["at_budgets"]), ("MDM", "ARM", gap["at_own_budgets"])):
        assert len(rows) == 4
        for row in rows:
            assert f"{row['budget']:.3g} of {name}" in text
            if row["extrapolated_by"] > 1:
                assert f"law of {other}, {row['extrapolated_by']:.3g} times" in text
    assert max(row["extrapolated_by"] for row in gap["at_own_budgets"]) > 5


def test_a_gap_is_known_at_a_single_optimum():
    content, text = page_of([r for r in complete() if r.objective == "arm" or r.budget == 5e13])
    [gap] = content["gaps"]
    assert gap["at_budgets"] == [] and gap["common"] is None and len(gap["at_own_budgets"]) == 1
    truth = 5 * (4.6 * 5**-0.06 / 3.95) ** (1 / 0.062)
    assert gap["at_own_budgets"][0]["gap"]["low"] < truth < gap["at_own_budgets"][0]["gap"]["high"]
    assert any("is only known at one optimum of mdm" in line for line in content["warnings"])
    assert "There is no falling loss law of MDM" in text


def test_a_bend_of_the_losses_is_stated_and_not_denied():
    content, text = page_of(complete(seed=2))
    assert text.count("cannot be told from a slightly different exponent") == 2 and "bends upwards" not in text
    assert not any("hindcast" in line for line in content["warnings"])
    bent = [
        replace(r, loss=r.loss + 0.02 * np.log(r.budget / 9e12) ** 2) if r.objective == "arm" else r for r in complete()
    ]
    content, text = page_of(bent)
    assert text.count("cannot be told from a slightly different exponent") == 1
    assert "The law of ARM's loss is not a straight line in logarithms" in text and "bends upwards" in text
    assert "of the straight law is too optimistic" in text
    assert content["predictions"]["arm"]["hindcast"]["value"] < -0.02  # too low, which three budgets cannot exclude


@pytest.mark.slow
def test_an_undetermined_approach_1_is_a_row():
    _, text = page_of([replace(r, curve=()) for r in complete()], full=True)
    assert text.count("Approach 1 (envelope)</td><td>not determined</td>") == 2
