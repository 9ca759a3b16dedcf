"""The elements of the plots: styles, points with intervals, ticks and legends."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffusionlm.scaling.laws.bootstrap import Estimate
from diffusionlm.scaling.laws.shares import ROAD
from diffusionlm.scaling.report.formatting import short
from diffusionlm.scaling.sweep.results import CellResult, of_others

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


class Style(NamedTuple):
    """The look of an objective, which can be told apart without colours."""

    colour: str
    marker: str
    line: Any  # as matplotlib takes it
    filled: bool


STYLES = (  # Okabe and Ito's blue and vermilion first, which differ in lightness
    Style("#0072B2", "o", "-", True),
    Style("#D55E00", "s", "--", False),
    Style("#009E73", "^", "-.", True),
    Style("#CC79A7", "D", ":", False),
    Style("#E69F00", "v", (0, (5, 1, 1, 1, 1, 1)), True),
    Style("#56B4E9", "P", (0, (1, 1)), False),
    Style("black", "*", "-", True),
)
MARKERS = "osD^vP*X<>"  # of budgets
GREY = "#555555"
PANEL = 5.6  # inches, of which axis labels take about one
LEGEND = 4.6  # inches


def bar(
    axes: "Axes",
    x: float,
    y: float,
    estimate: Estimate,
    limits: tuple[float, float],
    colour: str,
    *,
    horizontal: bool = False,
) -> None:
    """Draw an interval with caps around (x, y), cut at limits where an arrow shows that it continues."""
    if estimate.interval is None:
        return
    for end, limit, side in zip(estimate.interval, limits, (-1, 1), strict=True):
        continues = side * (end - limit) > 0
        end = limit if continues else end
        along, start = ((end, y) if horizontal else (x, end)), (x, y)
        style = "-|>" if continues else "|-|, widthA=0, widthB=0.3"
        arrow = {"arrowstyle": style, "color": colour, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", along, start, arrowprops=arrow, zorder=5)


def points(
    axes: "Axes",
    c: Sequence[float],
    estimates: Sequence[Estimate],
    style: Style,
    label: str,
    limits: Sequence[tuple[float, float]] | None = None,
) -> None:
    """Draw estimates over C with their intervals; bars are cut at the limits of each, where a marker shows that."""
    values = np.array([e.value for e in estimates])
    limits = limits or [(0.0, np.inf)] * len(estimates)
    # An unbounded interval has no bar.
    intervals = [e.interval if e.interval and e.bounded else (np.nan, np.nan) for e in estimates]
    ends = [(max(e[0], low), min(e[1], high)) for e, (low, high) in zip(intervals, limits, strict=True)]
    reach = np.abs(np.array(ends, float).reshape(-1, 2).T - values)
    axes.errorbar(
        c,
        values,
        reach if np.isfinite(reach).any() else None,
        fmt=style.marker,
        color=style.colour,
        markerfacecolor=style.colour if style.filled else "white",
        capsize=4,
        markersize=7,
        label=label,
    )
    for x, interval, (low, high) in zip(c, intervals, limits, strict=True):
        if interval[0] < low:
            axes.plot(x, low, "v", color=style.colour, markersize=7)
        if interval[1] > high:
            axes.plot(x, high, "^", color=style.colour, markersize=7)


def band(axes: "Axes", x: np.ndarray, estimates: Sequence[Estimate], style: Style) -> None:
    """Fill the intervals of estimates, if the noise is known."""
    intervals = [e.interval for e in estimates if e.interval]
    if len(intervals) == len(estimates):
        low, high = np.array(intervals).T
        axes.fill_between(x, low, high, color=style.colour, alpha=0.18, linewidth=0)


def style_of(objective: str, objectives: Iterable[str]) -> Style:
    """Return the style of an objective; MDM, ARM and the best road look the same in every report."""
    if objective == ROAD:
        return STYLES[-1]
    others = [name for name in objectives if name not in ("mdm", "arm")]
    return STYLES[("mdm", "arm", *others).index(objective) % (len(STYLES) - 1)]


def panels(figure: "Figure", count: int, height: float, **options: Any) -> "list[Axes]":
    """Return a panel for each objective, at most three in a row of so many inches."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure.set_size_inches(PANEL * columns, height * rows)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for unused in axes.flat[count:]:
        unused.remove()
    return list(axes.flat[:count])


def budget_style(budgets: Sequence[float], budget: float) -> tuple[Any, str]:
    """Return the colour and the marker of a budget."""
    from matplotlib import colormaps

    i = list(budgets).index(budget)
    shade = 0.05 + 0.67 * i / max(len(budgets) - 1, 1)  # evenly spaced in lightness, visible on white and on black
    return colormaps["viridis"](shade), MARKERS[i % len(MARKERS)]


def flops(c: float) -> str:
    """Return a compute as TeX."""
    mantissa, exponent = f"{c:.1e}".split("e")
    return rf"${mantissa.removesuffix('.0')} \times 10^{{{int(exponent)}}}$"


def few_ticks(axis: "Axis") -> None:
    """Label 1, 2 and 5 of each decade, since a panel often spans little more than one; fewer where labels touch."""
    from matplotlib import ticker

    decades = float(np.ptp(np.log10(axis.get_view_interval())))
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(ticker.NullFormatter())


def budget_ticks(axis: "Axis", budgets: Sequence[float]) -> None:
    """Label budgets, except those that are too close to the one before for both to be read."""
    from matplotlib import ticker

    # Four labels and the space between them fill a panel of three in a row, which may be wider than the budgets.
    apart = max(np.ptp(np.log(budgets)), np.ptp(np.log(axis.get_view_interval()))) / 4.5
    shown: list[float] = []
    for budget in sorted(budgets):
        if not shown or np.log(budget / shown[-1]) >= apart:
            shown.append(budget)
    axis.set_major_locator(ticker.FixedLocator(shown))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: flops(value)))
    axis.set_minor_locator(ticker.NullLocator())


def loss_label(runs: Iterable[CellResult]) -> str:
    """Return the label of an axis of losses; only own cells are known to be scored on held-out text."""
    return "loss (nats per token)" if of_others(runs) else "held-out loss (nats per token)"


def legend_below(figure: "Figure", axes: "Axes", columns: int) -> None:
    """Draw the legend of one panel below the figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), fontsize=9)


def legend_under(axes: "Axes", handles: Sequence, labels: Sequence[str], title: str | None = None) -> None:
    """Draw a legend under its panel, where it covers nothing, in as many columns as are no wider than a panel."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}
    words = {"title": title, "fontsize": 9, "title_fontsize": 9}
    for columns in (3, 2, 1):
        legend = axes.legend(handles, labels, ncols=columns, **place, **words)
        # A wider one would take its width from the panel, for which nothing might be left.
        if legend.get_window_extent().width <= LEGEND * axes.figure.dpi:
            return


def plain_ticks(axis: "Axis") -> None:
    """Label a logarithmic axis that spans less than a decade with plain numbers."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.MaxNLocator(6))
    axis.set_major_formatter(ticker.FormatStrFormatter("%.3g"))
    axis.set_minor_locator(ticker.NullLocator())
