"""The plots: they show every optimum as what it is, and stay readable."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.simulated_sweep import (
    REPORT_TRUTHS,
    complete,
    loose,
    moved,
    opening_downwards,
    simulated,
    tilted,
    undetermined,
)

from diffusionlm.scaling.laws import published
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.bootstrap import Estimate
from diffusionlm.scaling.laws.envelope import Envelope
from diffusionlm.scaling.laws.gap import quoted
from diffusionlm.scaling.laws.suspects import Suspect
from diffusionlm.scaling.report import interactive, plot_elements, plots, sentences, surface_plots, tables
from diffusionlm.scaling.report.content import to_json
from diffusionlm.scaling.report.plot_elements import GREY
from diffusionlm.scaling.sweep.points import LeftOut


def drawn(draw, results, overlays=()):
    """Return a figure, and whether there was anything to draw."""
    figure = Figure()
    return figure, draw(figure, analyse(results, full=False), overlays)


def labels_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_an_optimum_in_no_law_is_a_hollow_star_and_one_outside_none():
    figure, _ = drawn(plots.draw_isoflop, undetermined(complete()))
    assert "optimum in no law" in labels_of(figure.axes[0]) and "optimum" not in labels_of(figure.axes[0])
    assert labels_of(figure.axes[1])[-1] == "optimum"
    figure, _ = drawn(plots.draw_isoflop, tilted(complete(), 0.5))
    assert not any("optimum" in label for label in labels_of(figure.axes[0]))
    sizes = [r.params for r in complete() if r.objective == "mdm"]
    low, high = figure.axes[0].get_xlim()
    assert min(sizes) / 2 < low and high < 2 * max(sizes)


def test_an_interval_far_beyond_the_grid_stretches_nothing():
    figure, _ = drawn(plots.draw_isoflop, loose())
    low, high = figure.axes[0].get_xlim()
    sizes = [r.params for r in loose()]
    assert low > min(sizes) / 1.81 and high < max(sizes) * 1.81


def test_the_plot_of_laws_names_what_it_lacks_and_overlays_do_not_stretch_it():
    overlays = [published.get("smdm_mdm"), published.get("smdm_arm")]
    figure, shown = drawn(plots.draw_laws, tilted(complete(), 0.5), overlays)
    [legend] = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert shown and "no law of mdm" in labels and any("slope only" in label for label in labels)
    sizes = [r.params for r in complete() if r.objective == "arm"]
    low, high = figure.axes[0].get_ylim()
    assert min(sizes) / 5 < low and high < 5 * max(sizes)
    ticks = figure.axes[0].xaxis.get_major_locator()()
    assert 2 <= len(ticks) <= 6 and not figure.axes[0].xaxis.get_minorticklocs().size
    assert not drawn(plots.draw_laws, tilted(complete()[:24], 0.5))[1]  # no law at all


def hanging():
    """Return an analysis whose MDM has laws that hang on a suspected cell."""
    analysis = analyse(complete(), full=False)
    fit = analysis.objectives["mdm"]
    assert fit.laws and not fit.hanging
    alone = replace(
        fit, suspects=(Suspect(5e13, 3, 3, Estimate(1.0, 0.9, 1.1), 0.0),), without_suspects=replace(fit, laws={})
    )
    return replace(analysis, objectives={**analysis.objectives, "mdm": alone})


def test_a_law_that_hangs_is_dashed_and_grey_and_has_no_gap():
    figure, analysis = Figure(), hanging()
    assert plots.draw_laws(figure, analysis, ()) and not plots.draw_gap(Figure(), analysis, ())
    for axes in figure.axes:
        [line] = [line for line in axes.get_lines() if line.get_label() == "MDM: hangs on suspected cells"]
        assert line.get_color() == plot_elements.GREY and line.get_linestyle() == "--"
    coloured = [
        line for line in figure.axes[0].get_lines() if line.get_color() == plot_elements.style_of("mdm", []).colour
    ]
    assert coloured and all(len(line.get_xdata()) < 10 for line in coloured)  # optima and their bars alone
    text = interactive.elements(analysis)
    assert text.count("MDM: hangs on suspected cells") >= 3 and "ARM: hangs" not in text


def test_no_sentence_or_table_quotes_a_gap_or_an_exponent_from_a_law_that_hangs():
    analysis = hanging()
    assert analysis.gaps and not quoted(analysis.gaps, analysis.objectives)
    words = " ".join(sentences.summary(analysis))
    assert (
        "The laws of MDM hang on a suspected cell, so none is quoted, nor a gap." in words and "times the" not in words
    )
    assert "law of ARM's loss" in words and "law of MDM's loss" not in words
    rows = tables.tables(analysis, to_json(analysis) | {"context": {}}, [])
    assert not rows["gaps"].rows
    names = {row[0] for name in ("laws", "predictions", "without_one_budget") for row in rows[name].rows}
    assert names == {"MDM (hangs on suspected cells)", "ARM"}


def test_sizes_far_from_the_best_are_plus_signs():
    results = [run for run in complete() if run.objective == "arm"]
    budget = max(run.budget for run in results)
    best = min((run for run in results if run.budget == budget), key=lambda run: run.loss)
    far = [
        replace(best, id="far", params=factor * best.params, loss=best.loss + off)
        for factor, off in ((12, 0.01), (30, 5.0))
    ]
    figure, analysis = Figure(), analyse([*results, *far], full=False)
    assert surface_plots.distant(analysis.objectives["arm"]) == far
    assert plots.draw_isoflop(figure, analysis, ())
    [axes] = figure.axes
    shown, above = [
        line
        for line in axes.get_lines()
        if line.get_marker() in ("+", "^") and line.get_color() == GREY and len(line.get_xdata())
    ]
    assert shown.get_label() == "over 10x from N*" and list(shown.get_xdata()) == [far[0].params]
    assert list(above.get_xdata()) == [far[1].params] and above.get_ydata()[0] < 1  # of the height of the panel
    assert axes.get_xlim()[1] > far[1].params and axes.get_ylim()[1] < best.loss + 4
    assert "far from the best size" in interactive.elements(analysis)


def test_residuals_name_the_budgets_without_a_minimum():
    figure, _ = drawn(plots.draw_residuals, opening_downwards(complete()))
    assert [text.get_text() for text in figure.axes[0].texts] == [r"no minimum at $5 \times 10^{13}$ FLOPs"]
    assert not figure.axes[1].texts


@pytest.mark.parametrize("differ", [True, False])
def test_one_exponent_is_drawn_only_where_exponents_are_equal(differ):
    equal = REPORT_TRUTHS | {"mdm": replace(REPORT_TRUTHS["mdm"], loss=(4.6, REPORT_TRUTHS["arm"].loss[1]))}
    figure, _ = drawn(plots.draw_gap, simulated(seed=2, truths=REPORT_TRUTHS if differ else equal))
    assert any("one exponent" in label for label in labels_of(figure.axes[0])) != differ


def test_legends_cover_nothing_and_name_only_what_is_drawn():
    figure, _ = drawn(plots.draw_residuals, complete())
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert all("seed sd" in axes.get_title() for axes in figure.axes)
    for noise, words in ((0.01, "given sd 0.01"), ("residuals", "sd about curves")):
        figure = Figure()
        plots.draw_residuals(figure, analyse(complete(), full=False, noise=noise), ())
        assert all(words in axes.get_title() for axes in figure.axes)
    figure, _ = drawn(plots.draw_gap, moved(complete(), 1.0, lambda r: r.objective == "mdm"))  # beyond all budgets
    for line in figure.axes[0].get_lines():
        if not line.get_label().startswith("_"):
            assert np.isfinite(line.get_ydata()).any(), line.get_label()


def test_only_own_cells_are_known_to_be_held_out():
    for stderr, label in ((0.0, "held-out loss (nats per token)"), (np.nan, "loss (nats per token)")):
        figure, _ = drawn(plots.draw_isoflop, [replace(run, loss_stderr=stderr) for run in complete()])
        assert figure.axes[0].get_ylabel() == label


def test_panels_keep_their_room_whatever_the_legend_says():
    runs = complete()
    best = min(runs, key=lambda run: run.loss)
    far = replace(best, id="far", params=12 * best.params, loss=best.loss + 0.01)
    left_out = [LeftOut(replace(best, params=1000 * best.params, loss=loss), "flag") for loss in (best.loss, 99.0)]
    analysis = replace(analyse([*runs, far], full=False), left_out=tuple(left_out))
    figure = Figure(layout="constrained")
    assert plots.draw_isoflop(figure, analysis, ())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that no layout was found
        figure.draw_without_rendering()
    width = figure.bbox.width / len(figure.axes)
    for axes in figure.axes:
        assert axes.bbox.width > 0.75 * width and axes.bbox.height > figure.bbox.height / 2
        legend = axes.get_legend().get_window_extent()
        assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1


@pytest.mark.parametrize("decades", [1, 2.5, 6])
def test_ticks_do_not_touch(decades):
    axes = Figure().subplots()
    axes.set(xscale="log", xlim=(1e3, 1e3 * 10**decades))
    plot_elements.few_ticks(axes.xaxis)
    shown = [tick for tick in axes.xaxis.get_major_locator()() if 1e3 <= tick <= 1e3 * 10**decades]
    assert 3 <= len(shown) <= 8


def test_a_bar_is_cut_at_its_limit_with_an_arrow():
    axes = Figure().subplots()
    style = plot_elements.Style("black", "o", "-", True)
    plot_elements.points(axes, [1.0], [Estimate(5.0, 1e-9, 6.0)], style, "", [(2.0, 9.0)])
    assert axes.dataLim.y0 == 2 and [line.get_marker() for line in axes.get_lines()].count("v") == 1
    assert [line.get_marker() for line in axes.get_lines()].count("^") == 0


def test_the_envelope_has_a_gap_where_it_rises_because_a_curve_ended():
    c = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    loss = np.array([5.0, 4.0, 4.5, 4.6, 3.0])  # one rise at the end of a curve, and one that noise makes
    curves = ((1e5, c[:2], loss[:2]), (2e5, c, loss))
    drawn_c, drawn_loss = plots._in_pieces(Envelope(c, loss, c, c > 0, None, None, curves))
    assert np.array_equal(drawn_c, [1, 2, np.nan, 3, 4, 5], equal_nan=True)
    assert np.array_equal(drawn_loss, [5, 4, np.nan, 4.5, 4.6, 3], equal_nan=True)
