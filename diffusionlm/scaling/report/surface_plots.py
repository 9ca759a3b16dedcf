"""Pictures of runs that belong to no budget, and the marks of runs that no parabola uses."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffusionlm.scaling.laws.analysis import Analysis
from diffusionlm.scaling.laws.objective import FAR, ObjectiveFit
from diffusionlm.scaling.laws.parametric import Parametric
from diffusionlm.scaling.report.formatting import short
from diffusionlm.scaling.report.plot_elements import GREY, few_ticks, legend_under, loss_label, panels
from diffusionlm.scaling.sweep.points import LeftOut
from diffusionlm.scaling.sweep.results import CellResult

DISTANT = f"over {FAR:g}x from N*"

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def unfitted(axes: "Axes", fit: ObjectiveFit, left_out: Sequence[LeftOut]) -> None:
    """Draw the runs of an objective that are in no curve: points of no budget, crosses of what was left out.

    No loss stretches the axis of losses: what lies above it is an arrow at its end.
    """
    loose = [run for run in fit.runs if np.isnan(run.budget)] if fit.budgets else []
    _marks(axes, loose, ".", "no budget")
    _marks(axes, crosses(fit.objective, left_out), "x", "left out")
    _marks(axes, distant(fit), "+", DISTANT)


def crosses(objective: str, left_out: Sequence[LeftOut]) -> list[CellResult]:
    """Return the runs of an objective that were left out and have a loss to show."""
    return [left.run for left in left_out if left.run.objective == objective and np.isfinite(left.run.loss)]


def distant(fit: ObjectiveFit) -> list[CellResult]:
    """Return the runs whose size is too far from the best one of their budget for its curve."""
    return [run for row in fit.budgets for run in row.distant]


def _marks(axes: "Axes", runs: Sequence[CellResult], marker: str, label: str) -> None:
    if not runs:
        return
    limits = axes.get_ylim()
    sizes, losses = (np.array([getattr(run, key) for run in runs], float) for key in ("params", "loss"))
    shown = losses <= limits[1]
    style = {"color": GREY, "linestyle": " ", "markersize": 5}
    axes.plot(sizes[shown], losses[shown], marker=marker, label=label, **style)
    # Inside the frame, which clips them: what lies beside it would take its room from the panel.
    top = np.full((~shown).sum(), 0.985)
    axes.plot(sizes[~shown], top, marker="^", transform=axes.get_xaxis_transform(), **style)
    axes.set_ylim(limits)


def draw_surface(figure: "Figure", analysis: Analysis) -> bool:
    """Draw the loss over N of objectives without budgets, shaded by D, with their parametric law."""
    fits = [fit for fit in analysis.objectives.values() if not fit.budgets]
    if not fits:
        return False
    for i, (axes, fit) in enumerate(zip(panels(figure, len(fits), 5.4), fits, strict=True)):
        _measured(figure, axes, fit)
        unfitted(axes, fit, analysis.left_out)
        axes.set(title=fit.objective.upper(), xscale="log", xlabel="model size N (parameters)")
        few_ticks(axes.xaxis)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            legend_under(axes, handles, labels)
        if i % 3 == 0:
            axes.set_ylabel(loss_label(fit.runs))
    return True


def _measured(figure: "Figure", axes: "Axes", fit: ObjectiveFit) -> None:
    """Draw the runs, and the law at three numbers of tokens and along its optima."""
    from matplotlib import colormaps, colors, ticker

    tokens, sizes = np.array([run.tokens for run in fit.runs]), np.array([run.params for run in fit.runs])
    shades = colors.ListedColormap(colormaps["viridis"](np.linspace(0.05, 0.72, 256)))  # visible on white and on black
    scale = colors.LogNorm(tokens.min(), max(tokens.max(), 1.01 * tokens.min()))
    shown = axes.scatter(sizes, [run.loss for run in fit.runs], c=tokens, cmap=shades, norm=scale, s=22)
    bar = figure.colorbar(shown, ax=axes, label="tokens D")
    bar.ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: short(value)))
    bar.ax.yaxis.set_minor_formatter(ticker.NullFormatter())
    if (law := fit.parametric) is None or not law.determined:
        return
    limits, grid = axes.get_ylim(), np.geomspace(sizes.min(), sizes.max(), 100)
    for count in np.quantile(tokens, [0.1, 0.5, 0.9]):
        axes.plot(grid, law.loss(grid, count), color=shades(scale(count)), linewidth=1.2)
    _optima(axes, law, np.array([run.flops for run in fit.runs]))
    axes.set_ylim(limits)


def _optima(axes: "Axes", law: Parametric, compute: np.ndarray) -> None:
    optima = [law.optimum(c) for c in np.geomspace(compute.min(), compute.max(), 60)]
    axes.plot([n for n, _, _ in optima], [loss for _, _, loss in optima], color="black", label="optimum of the law")
