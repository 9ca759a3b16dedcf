"""The picture of roads: the bound, and the autoregressive skill that is kept, over the share of each budget."""

from typing import TYPE_CHECKING

import numpy as np
from scipy import special

from diffusionlm.scaling.laws.analysis import Analysis
from diffusionlm.scaling.laws.bootstrap import Estimate
from diffusionlm.scaling.laws.noise import by_cell
from diffusionlm.scaling.laws.road_words import share_ends
from diffusionlm.scaling.laws.shares import ShareFit
from diffusionlm.scaling.report.formatting import short
from diffusionlm.scaling.report.plot_elements import GREY, Style, band, flops, style_of

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARGIN = 0.4  # of the axis of shares beyond the outermost ones, in logits
LINE = Style("black", "*", "-", True)


def draw_shares(figure: "Figure", analysis: Analysis) -> bool:
    """Draw the bound over the share above, and the exact autoregressive loss below, in a column for each budget."""
    if analysis.roads is None:
        return False
    fits = analysis.roads.budgets
    figure.set_size_inches(5 * len(fits), 7.6)
    panels = figure.subplots(2, len(fits), squeeze=False, sharex="col", height_ratios=(3, 2))
    for (above, below), fit in zip(panels.T, fits, strict=True):
        lines = _from_scratch(above, analysis, fit.budget, list(analysis.objectives))
        _bound(above, fit)
        losses = [run.loss for run in (*fit.runs, *fit.distant)] + lines
        margin = 0.06 * float(np.ptp(losses))
        above.set_ylim(
            min(losses) - margin, max(losses) + margin
        )  # a band that leaves the measurements stretches nothing
        _skill(below, fit)
        _from_scratch(below, analysis, fit.budget, ["arm"])
        shares = [at.share for at in fit.shares]
        above.set(xscale="logit", title=f"{flops(fit.budget)} FLOPs")
        above.set_xlim(*special.expit(special.logit([shares[0], shares[-1]]) + np.array([-MARGIN, MARGIN])))
        below.set_xlabel("share of the steps that are autoregressive")
        for axes in (above, below):
            axes.legend(fontsize=8)
        _share_ticks(below, shares)
    panels[0, 0].set_ylabel("bound (nats per token)")
    panels[1, 0].set_ylabel("exact loss as an ARM (nats per token)")
    return True


def _bound(axes: "Axes", fit: ShareFit) -> None:
    """Draw the measured bounds, the surface at its best size, and its minimum."""
    from matplotlib import colormaps

    measured = (*fit.runs, *fit.distant)
    sizes = sorted({run.params for run in measured})
    cells = {(runs[0].arm_share, runs[0].params): runs for runs in by_cell(measured).values()}
    for i, size in enumerate(sizes):
        means = {
            share: float(np.mean([run.loss for run in runs])) for (share, n), runs in sorted(cells.items()) if n == size
        }
        shade = colormaps["viridis"](0.05 + 0.8 * i / max(len(sizes) - 1, 1))
        axes.plot(list(means), list(means.values()), "o", color=shade, markersize=6, label=f"N = {short(size)}")
    if fit.surface is None:
        return
    near = [run.arm_share for run in fit.runs]
    ends = special.logit([min(near), max(near)]) + np.array([-MARGIN, MARGIN])
    grid = special.expit(np.linspace(ends[0], ends[1], 60))
    estimates = [fit.at(share)[1] for share in grid]
    axes.plot(grid, [e.value for e in estimates], color=LINE.colour, linewidth=1.4, label="at the best size")
    band(axes, grid, estimates, LINE)
    if fit.best and fit.best.inside:
        _star(axes, fit.best.share, fit.best.loss.value, fit.best.usable)


def _star(axes: "Axes", share: Estimate, loss: float, usable: bool) -> None:
    """Draw the minimum with the interval of the share: filled, or hollow if it is in no law."""
    if share.interval:
        low, high = np.clip(share_ends(share), 1e-3, 1 - 1e-3)
        axes.plot([low, high], [loss, loss], "|-", color=LINE.colour if usable else GREY, linewidth=1.4)
    fill = "black" if usable else "white"
    label = "best share" if usable else "best share, not determined"
    axes.plot(share.value, loss, "*", color="black", markerfacecolor=fill, markersize=13, zorder=6, label=label)


def _skill(axes: "Axes", fit: ShareFit) -> None:
    """Draw the exact autoregressive loss of the best size of each share, when attention opens and at the end."""
    lines = {
        "when attention opens": ("first_autoregressive_loss", "o-", "#009E73"),
        "at the end": ("autoregressive_loss", "D--", "#CC79A7"),
    }
    for label, (name, form, colour) in lines.items():
        known = [(at.share, value) for at in fit.shares if (value := getattr(at, name)) is not None]
        if known:
            axes.plot(*zip(*known, strict=True), form, color=colour, label=label)


def _from_scratch(axes: "Axes", analysis: Analysis, budget: float, names: list[str]) -> list[float]:
    """Draw the L* of objectives from scratch at a budget as horizontal lines, and return them."""
    drawn = []
    for name in names:
        fit = analysis.objectives.get(name)
        if fit is None or fit.arm_share:
            continue
        for row in fit.budgets:
            if row.budget == budget and row.optimum and row.usable:
                style, label = style_of(name, analysis.objectives), f"L* of {name.upper()}, from scratch"
                drawn.append(row.optimum.loss.value)
                axes.axhline(drawn[-1], color=style.colour, linestyle=style.line, label=label)
    return drawn


def _share_ticks(axes: "Axes", shares: list[float]) -> None:
    from matplotlib import ticker

    axes.xaxis.set_major_locator(ticker.FixedLocator(shares))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
