"""The report of roads: tables, sentences, pictures and numbers."""

import csv
import html
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.report_page import page_of
from support.simulated_roads import BUDGETS, ODDS, SHARES, roads, with_twins
from support.simulated_sweep import complete

from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.report import document, road_plots
from diffusionlm.scaling.report.road_sentences import about_roads
from diffusionlm.scaling.sweep import results


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("roads")
    content = document.write(with_twins(), directory, title="Roads", convention="C = 6 N D.")
    return directory, content, html.unescape((directory / "report.html").read_text())


def table(text, title):
    """Return the rows of a table of the page as lists of cells."""
    section = text[text.index(f"<h2>{title}</h2>") :].split("</section>")[0]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in section.split("<tr>")]
    return [row for row in rows if row]


@pytest.mark.slow
def test_the_page_shows_the_best_share_and_what_it_gains(written):
    _, content, text = written
    rows = table(text, "The best autoregressive share")
    assert [row["budget"] for row in content["roads"]["budgets"]] == list(BUDGETS)
    for cells, row in zip(rows, content["roads"]["budgets"], strict=True):
        share = row["share"]
        assert cells[1].startswith(f"{100 * share['value']:.0f}% [{100 * share['low']:.0f}%, ")
        assert row["in_laws"] and cells[1][:-1] in content["verdict"]
        assert set(row["loss_minus"]) == {"mdm", "arm"}
        assert row["loss_minus"]["mdm"]["high"] < 0 < row["loss_minus"]["arm"]["low"]
        [gap] = [gap for gap in content["gaps"] if gap["objective"] == "road"]
        factor = {at["budget"]: at["gap"]["value"] for at in gap["at_own_budgets"]}[row["budget"]]
        assert cells[7].startswith(f"{factor:.3g}"[:3])
    assert "The odds of the best share change as C to the power" in text and "share grows with compute." in text
    assert 0.1 < content["roads"]["laws"]["share"]["exponent"]["value"] < 0.3


def test_a_share_whose_exponent_may_be_of_either_sign_is_not_said_to_move():
    analysis = analyse(with_twins(seed=1, odds=(ODDS[0], 0.0)), draws=500, full=False)
    exponent = analysis.roads.laws["share"].exponent
    assert not exponent.excludes(0)
    [sentence] = [line for line in about_roads(analysis.roads) if "odds of the best share change" in line]
    assert sentence.endswith(", so nothing shows that the share moves with compute.")


@pytest.mark.slow
def test_the_page_shows_each_share_and_the_skill_that_is_kept(written):
    _, content, text = written
    rows = table(text, "Each share, and the autoregressive skill that is kept")
    known = [at for row in content["roads"]["budgets"] for at in row["shares"]]
    assert len(rows) == len(known) == len(BUDGETS) * len(SHARES)
    arm = {row["budget"]: row["loss"]["value"] for row in content["optima"] if row["objective"] == "arm"}
    for cells, at in zip(rows, known, strict=True):
        assert cells[5:8] == [f"{at['best_loss']:.4g}", f"{at['autoregressive_loss']:.4g}", "3.6"]
        assert cells[8].startswith(f"{arm[float(cells[0])]:.3g}"[:3])
    assert "had an exact autoregressive loss of 3.6 when attention opened, which rose to" in text


@pytest.mark.slow
def test_the_files_hold_the_roads(written):
    directory, content, _ = written
    assert (directory / "shares.png").read_bytes().startswith(b"\x89PNG")
    assert results.load(directory / "results.json") == with_twins()
    with (directory / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm_share"] for row in rows} == {"0.0", *map(str, SHARES)}
    assert {row["autoregressive_loss"] for row in rows if row["objective"] == "mdm"} == {""}
    assert json.loads((directory / "report.json").read_text()) == content


def test_a_sweep_without_roads_has_none_of_it(tmp_path):
    content, text = page_of(complete())
    assert "roads" not in content and "autoregressive share" not in text
    assert not road_plots.draw_shares(Figure(), analyse(complete(), draws=200, full=False))


def test_the_picture_has_every_measurement_and_the_objectives_from_scratch_in_view():
    figure = Figure()
    analysis = analyse(with_twins(), draws=500, full=False)
    assert road_plots.draw_shares(figure, analysis)
    assert len(figure.axes) == 2 * len(BUDGETS)
    for axes, fit in zip(figure.axes, analysis.roads.budgets, strict=False):
        low, high = axes.get_ylim()
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert all(low < run.loss < high for run in fit.runs)
        assert {"best share", "L* of MDM, from scratch", "L* of ARM, from scratch"} <= set(labels)
        for line in axes.get_lines():
            if "from scratch" in str(line.get_label()):
                assert low < line.get_ydata()[0] < high


def test_a_best_share_beyond_the_shares_gets_no_star():
    figure = Figure()
    road_plots.draw_shares(figure, analyse(roads(odds=(60.0, 0.0)), draws=500, full=False))
    labels = [text.get_text() for axes in figure.axes[:3] for text in axes.get_legend().get_texts()]
    assert not any("best share" in label for label in labels) and "at the best size" in labels


def test_roads_without_exact_losses_or_repeats_are_reported():
    bare = [r for r in with_twins() if r.seed == 0]
    content, text = page_of([results.CellResult(**{**vars(r), "autoregressive_loss": None}) for r in bare])
    assert "had an exact autoregressive loss" not in text and "[" not in content["roads"]["budgets"][0]["share"]
    assert np.isfinite(content["roads"]["budgets"][0]["share"]["value"])
    assert content["roads"]["budgets"][0]["share"]["interval"] == "unknown"
