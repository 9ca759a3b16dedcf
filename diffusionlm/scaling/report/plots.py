"""The pictures of a report, as PNG files in memory: readable in grey, in colours that colour-blind readers can tell."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusionlm.scaling.laws.analysis import Analysis
from diffusionlm.scaling.laws.envelope import Envelope
from diffusionlm.scaling.laws.gap import distance, quoted
from diffusionlm.scaling.laws.noise import by_cell
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.optima import BudgetFit, Optimum
from diffusionlm.scaling.laws.power_laws import Law
from diffusionlm.scaling.laws.published import PublishedLaw
from diffusionlm.scaling.report.formatting import short
from diffusionlm.scaling.report.plot_elements import (
    GREY,
    PANEL,
    Style,
    band,
    bar,
    budget_style,
    budget_ticks,
    few_ticks,
    flops,
    legend_below,
    legend_under,
    loss_label,
    panels,
    plain_ticks,
    points,
    style_of,
)
from diffusionlm.scaling.report.road_plots import draw_shares
from diffusionlm.scaling.report.surface_plots import distant, draw_surface, unfitted

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Overlays = Sequence[PublishedLaw]
HANGING: Mapping[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 1.0}  # a law that is not quoted
# What the standard deviation is of, by the source of a noise.
SPREAD = {"seeds": "seed sd", "given": "given sd", "residuals": "sd about curves", "curves": "sd about curves"}
OVERLAY_LINES = ("-", "--", "-.", ":")


def render(analysis: Analysis, overlays: Overlays = ()) -> dict[str, bytes]:
    """Return the pictures for which the analysis has something to show, by file name."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    pictures = {}
    with rc_context({"font.size": 11, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True}):
        for name, draw in PICTURES.items():
            figure = Figure(layout="constrained")
            if draw(figure, analysis, overlays):
                file = io.BytesIO()
                figure.savefig(file, format="png", dpi=140)
                pictures[name] = file.getvalue()
    return pictures


def draw_isoflop(figure: "Figure", analysis: Analysis, overlays: Overlays) -> bool:
    """Draw the loss over N with a curve and an optimum for each budget, in a panel for each objective."""
    fits = [fit for fit in analysis.objectives.values() if fit.budgets]
    if not fits:
        return False
    budgets = sorted({row.budget for fit in fits for row in fit.budgets})
    for i, (axes, fit) in enumerate(zip(panels(figure, len(fits), 5.4), fits, strict=True)):
        for row in fit.budgets:
            _measured(axes, row, *budget_style(budgets, row.budget))
        axes.set(title=fit.objective.upper(), xscale="log", xlabel="model size N (parameters)")
        unfitted(axes, fit, analysis.left_out)
        far = distant(fit)
        ends = np.array([*(_grid_ends(row) for row in fit.budgets), *((r.params / 1.2, r.params * 1.2) for r in far)])
        axes.set_xlim(ends[:, 0].min(), ends[:, 1].max())
        axes.set_ylim(axes.get_ylim())  # of points and curves: no interval stretches a panel
        shown = [row.optimum for row in fit.budgets if row.optimum and row.optimum.inside]
        for optimum in shown:
            _star(axes, optimum)
        few_ticks(axes.xaxis)
        for usable, fill, label in ((True, "black", "optimum"), (False, "white", "optimum in no law")):
            if any(optimum.usable == usable for optimum in shown):
                axes.plot([], [], "*", color="black", markerfacecolor=fill, markersize=11, label=label)
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: "optimum" in labels[i])  # budgets first
        legend_under(axes, [handles[i] for i in order], [labels[i] for i in order], title="budget (FLOPs)")
        if i % 3 == 0:
            axes.set_ylabel(loss_label(fit.runs))
    return True


def _measured(axes: "Axes", row: BudgetFit, colour: str, marker: str) -> None:
    """Draw the mean losses of a budget, the spread of their seeds, and the curve."""
    cells = by_cell(row.runs)
    sizes = [params for _, _, params in cells]
    means = [float(np.mean([run.loss for run in runs])) for runs in cells.values()]
    spread = [float(np.std([r.loss for r in runs], ddof=1)) if len(runs) > 1 else np.nan for runs in cells.values()]
    axes.errorbar(sizes, means, spread, fmt=marker, color=colour, capsize=3, markersize=6, label=flops(row.budget))
    if row.curve:
        step = 0.1 * np.ptp(row.log_n)
        x = np.linspace(row.log_n.min() - step, row.log_n.max() + step, 200)
        axes.plot(np.exp(x), row.curve(x), color=colour, linewidth=1.4)


def _star(axes: "Axes", optimum: Optimum) -> None:
    """Draw an optimum as a star with its intervals: filled, or hollow with grey bars if it is in no law."""
    colour = "black" if optimum.usable else GREY
    params, loss = optimum.params.value, optimum.loss.value
    bar(axes, params, loss, optimum.params, axes.get_xlim(), colour, horizontal=True)
    bar(axes, params, loss, optimum.loss, axes.get_ylim(), colour)
    fill, edge = ("black", "white") if optimum.usable else ("white", "black")
    axes.plot(params, loss, "*", markersize=12, markerfacecolor=fill, markeredgecolor=edge, zorder=6)


def _grid_ends(row: BudgetFit, key: str = "params") -> tuple[float, float]:
    """Return the range of the runs of a budget, with one spacing more at each end, of N or (with "tokens") of D."""
    values = [getattr(run, key) for run in row.runs]
    step = np.exp(np.median(np.diff(np.unique(row.log_n)))) if row.sizes > 1 else 2.0
    return min(values) / step, max(values) * step


def draw_laws(figure: "Figure", analysis: Analysis, overlays: Overlays) -> bool:
    """Draw N*, D* and L* over C with the bands of the laws, and the slopes of published laws."""
    fits = list(analysis.objectives.values())
    if not any(row.usable for fit in fits for row in fit.budgets):
        return False
    figure.set_size_inches(13.5, 4.8)
    budgets = sorted({row.budget for fit in fits for row in fit.budgets})
    ahead = analysis.next_budget if any(fit.prediction for fit in fits) else None
    grid = np.geomspace(budgets[0] / 1.3, (ahead or budgets[-1]) * 1.3, 100)
    labels = {"params": "N* (parameters)", "tokens": "D* (tokens)", "loss": "L* (nats per token)"}
    shown = figure.subplots(1, 3)
    for axes, (key, label) in zip(shown, labels.items(), strict=True):
        for fit in fits:
            _law(axes, fit, key, grid, style_of(fit.objective, analysis.objectives))
        for law, line in zip(overlays, np.resize(OVERLAY_LINES, len(overlays)), strict=True):
            _slope(axes, law, key, grid, fits, line)
        if ahead:
            axes.axvline(ahead, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)))
        axes.set(xscale="log", yscale="log", xlabel="compute C (FLOPs)", ylabel=label)
        budget_ticks(axes.xaxis, budgets)
        plain_ticks(axes.yaxis) if key == "loss" else few_ticks(axes.yaxis)
    if ahead:
        shown[0].annotate(
            "next ", (ahead, 0.02), xycoords=("data", "axes fraction"), ha="right", color=GREY, fontsize=9
        )
    legend_below(figure, shown[0], columns=4)
    return True


def _law(axes: "Axes", fit: ObjectiveFit, key: str, grid: np.ndarray, style: Style) -> None:
    """Draw the optima of one objective and the law through them with its band."""
    name = fit.objective.upper()
    inside = [(row, row.optimum) for row in fit.budgets if row.optimum and row.optimum.inside]
    usable = [(row, optimum) for row, optimum in inside if optimum.usable]
    if usable:
        limits = None if key == "loss" else [_grid_ends(row, key) for row, _ in usable]
        budgets = [row.budget for row, _ in usable]
        points(axes, budgets, [getattr(optimum, key) for _, optimum in usable], style, name, limits)
    if others := [optimum for _, optimum in inside if not optimum.usable]:
        values = [getattr(optimum, key).value for optimum in others]
        label = f"{name}, optimum in no law"
        axes.plot([optimum.budget for optimum in others], values, "x", color=style.colour, markersize=8, label=label)
    if fit.hanging:
        axes.plot(grid, [fit.laws[key].at(c).value for c in grid], **HANGING, label=f"{name}: hangs on suspected cells")
    elif fit.laws:
        estimates = [fit.laws[key].at(c) for c in grid]
        axes.plot(grid, [e.value for e in estimates], color=style.colour, linestyle=style.line)
        band(axes, grid, estimates, style)
    else:
        axes.plot([], [], " ", label=f"no law of {fit.objective}")


def _slope(
    axes: "Axes", law: PublishedLaw, key: str, grid: np.ndarray, fits: Sequence[ObjectiveFit], line: str
) -> None:
    """Draw a published law, moved through the middle of the optima of its objective, or of any if that has none."""
    inside = law.fitted_range and law.fitted_range[0] <= grid[-1] and law.fitted_range[1] >= grid[0]
    if law.params(grid[0]) is None or (key == "loss" and (law.loss(grid[0]) is None or not inside)):
        return  # far from where it was fitted, a law of the loss says nothing
    usable = [row.optimum for fit in fits for row in fit.budgets if row.optimum and row.optimum.usable]
    optima = [optimum for optimum in usable if optimum.objective == law.objective] or usable
    middle = np.exp(np.mean([np.log(optimum.budget) for optimum in optima]))
    level = np.exp(np.mean([np.log(getattr(optimum, key).value) for optimum in optima])) / getattr(law, key)(middle)
    values = [level * getattr(law, key)(c) for c in grid]
    title = f"{law.title}: slope only" + ("" if inside else ", extrapolated")
    axes.plot(grid, values, color=GREY, linestyle=line, linewidth=1.2, label=title, zorder=1)


def draw_gap(figure: "Figure", analysis: Analysis, overlays: Overlays) -> bool:
    """Draw the compute gap over the compute of the reference, and the ratio of optimal sizes."""
    gaps = quoted(analysis.gaps, analysis.objectives)
    if not gaps:
        return False
    figure.set_size_inches(11, 4.8)
    left, right = figure.subplots(1, 2)
    for gap in gaps:
        style = style_of(gap.objective, analysis.objectives)
        title = f"{gap.objective.upper()} over {gap.reference.upper()}"
        if gap.law:
            _distance(left, gap.law, gap.reference_law, style, title)
        needed = [c / e.value for c, e in gap.at_own]
        points(left, needed, [e for _, e in gap.at_own], style, f"optima of {gap.objective.upper()}")
        if gap.common and gap.parallel:
            label = f"{title}, one exponent: {gap.common.value:.3g}"
            left.axhline(gap.common.value, color=GREY, linestyle=":", label=label)
        points(right, [c for c, _ in gap.size_ratio], [e for _, e in gap.size_ratio], style, title)
    reference, budgets = gaps[0].reference.upper(), gaps[0].reference_law.budgets
    for axes, more in ((left, [c / e.value for gap in gaps for c, e in gap.at_own]), (right, [])):
        axes.set_xscale("log")
        budget_ticks(axes.xaxis, [*budgets, *more])
    left.axvspan(budgets[0], budgets[-1], color=GREY, alpha=0.1, linewidth=0)
    left.set(xlabel=f"compute C of {reference} (FLOPs)", ylabel="times C for the same loss", yscale="log")
    few_ticks(left.yaxis)
    right.axhline(1, color=GREY, linewidth=0.8)
    right.set(xlabel="compute C (FLOPs)", ylabel="ratio of optimal sizes N*")
    right.set_xlim(budgets[0] / 1.3, budgets[-1] * 1.3)
    for axes in (left, right):
        if axes.get_legend_handles_labels()[1]:
            legend_under(axes, *axes.get_legend_handles_labels())
    return True


def _distance(axes: "Axes", law: Law, reference: Law, style: Style, title: str) -> None:
    """Draw the distance of two laws with its band: solid inside the budgets of both, dashed elsewhere."""
    grid = np.geomspace(reference.budgets[0], reference.budgets[-1], 60)
    estimates = [distance(law, reference, c) for c in grid]
    values = np.array([e.value for e in estimates])
    inside = (values * grid >= law.budgets[0]) & (values * grid <= law.budgets[-1])
    if inside.any():
        axes.plot(grid, np.where(inside, values, np.nan), color=style.colour, linewidth=2.4, label=title)
    if not inside.all():
        axes.plot(grid, values, color=style.colour, linestyle=(0, (2, 2)), label=f"{title}, extrapolated")
    band(axes, grid, estimates, style)


def draw_residuals(figure: "Figure", analysis: Analysis, overlays: Overlays) -> bool:
    """Draw measured minus fitted losses over N / N*: a pattern is misfit, scatter is noise."""
    fits = [fit for fit in analysis.objectives.values() if fit.budgets]
    if not any(row.optimum for fit in fits for row in fit.budgets):
        return False
    budgets = sorted({row.budget for fit in fits for row in fit.budgets})
    shown = panels(figure, len(fits), 3.8, sharey=True)
    for axes, fit in zip(shown, fits, strict=True):
        _residuals(axes, fit, budgets)
    for budget in sorted({row.budget for fit in fits for row in fit.budgets if row.optimum}):
        colour, marker = budget_style(budgets, budget)
        shown[0].plot([], [], marker, color=colour, label=flops(budget))
    for axes in shown[::3]:
        axes.set_ylabel("residual (nats per token)")
    legend_below(figure, shown[0], columns=8)
    return True


def _residuals(axes: "Axes", fit: ObjectiveFit, budgets: Sequence[float]) -> None:
    """Draw the residuals of one objective."""
    if fit.noise:
        axes.axhspan(-2 * fit.noise.sd, 2 * fit.noise.sd, color=GREY, alpha=0.15, linewidth=0)
    axes.axhline(0, color=GREY, linewidth=0.8)
    optima = [row.optimum for row in fit.budgets if row.optimum]
    for optimum in optima:
        colour, marker = budget_style(budgets, optimum.budget)
        sizes = np.exp(optimum.log_n) / optimum.params.value
        axes.plot(sizes, optimum.curve.residuals, marker, color=colour)
    # The noise is in the title, where it covers no point.
    noise = f": {SPREAD[fit.noise.source]} {fit.noise.sd:.2g} nats, grey is two" if fit.noise else ""
    axes.set(title=fit.objective.upper() + noise, xscale="log", xlabel="N / N*")
    if optima:
        few_ticks(axes.xaxis)
    else:
        axes.set_xticks([], [])
        axes.minorticks_off()
    missing = [flops(row.budget) for row in fit.budgets if not row.optimum]
    if missing:
        text = f"no minimum at {', '.join(missing)} FLOPs"
        axes.text(0.02, 0.04, text, transform=axes.transAxes, fontsize=9, color=GREY)


def draw_envelope(figure: "Figure", analysis: Analysis, overlays: Overlays) -> bool:
    """Draw the training curves, green to violet by size, and their envelope."""
    fits = [(fit, fit.envelope) for fit in analysis.objectives.values() if fit.envelope]
    if not fits:
        return False
    from matplotlib import colormaps

    figure.set_size_inches(PANEL * len(fits), 4.4)
    for axes, (fit, envelope) in zip(figure.subplots(1, len(fits), squeeze=False)[0], fits, strict=True):
        sizes = sorted({n for n, *_ in envelope.curves})
        for n, c, loss in envelope.curves:
            shade = 0.72 * (1 - sizes.index(n) / max(len(sizes) - 1, 1))
            axes.plot(c, loss, color=colormaps["viridis"](shade), linewidth=0.8, alpha=0.8)
        used = envelope.used
        label = "points of the laws" if envelope.params_law else "of too few sizes for a law"
        axes.plot(*_in_pieces(envelope), color="black", linewidth=1, label="envelope")
        if used.any():
            axes.plot(envelope.c[used], envelope.loss[used], "k.", markersize=6, label=label)
        title = f"{fit.objective.upper()}: N from {short(sizes[0])} (green) to {short(sizes[-1])} (violet)"
        axes.set(title=title, xscale="log", yscale="log", xlabel="compute C (FLOPs)")
        axes.title.set_fontsize(11)
        budget_ticks(axes.xaxis, [row.budget for row in fit.budgets])
        axes.set_xlim(fit.budgets[0].budget / 1.05, fit.budgets[-1].budget * 1.05)
        plain_ticks(axes.yaxis)
        axes.legend(fontsize=9)
    figure.axes[0].set_ylabel("training loss (nats per token)")
    return True


def _in_pieces(envelope: Envelope) -> tuple[np.ndarray, np.ndarray]:
    """Return C and the loss of the envelope, with a gap wherever it rises because a curve has ended."""
    ends = {c[-1] for _, c, _ in envelope.curves}
    rises = np.flatnonzero(np.diff(envelope.loss) > 0)
    gaps = [i + 1 for i in rises if envelope.c[i] in ends]
    return np.insert(envelope.c, gaps, np.nan), np.insert(envelope.loss, gaps, np.nan)


PICTURES: Mapping[str, Callable[["Figure", Analysis, Overlays], bool]] = {
    "shares.png": lambda figure, analysis, overlays: draw_shares(figure, analysis),
    "isoflop.png": draw_isoflop,
    "surface.png": lambda figure, analysis, overlays: draw_surface(figure, analysis),
    "laws.png": draw_laws,
    "gap.png": draw_gap,
    "residuals.png": draw_residuals,
    "envelope.png": draw_envelope,
}
"""The pictures of a report: each function draws one, or returns False if the analysis has nothing to show there."""
