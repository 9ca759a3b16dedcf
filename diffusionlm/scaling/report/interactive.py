"""The plots of a report as Bokeh draws them, to be read point by point: in the page itself, without a network."""

import importlib.util
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusionlm.scaling.laws.analysis import Analysis
from diffusionlm.scaling.laws.bootstrap import Estimate
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.optima import QUANTITIES
from diffusionlm.scaling.report.plot_elements import GREY, budget_style, style_of
from diffusionlm.scaling.report.surface_plots import DISTANT, crosses, distant
from diffusionlm.scaling.sweep.results import CellResult

if TYPE_CHECKING:  # Bokeh is an extra
    from bokeh.plotting import figure as Figure  # pyright: ignore[reportMissingImports]

HEIGHT = 440  # pixels
LABELS = {"params": "N* (parameters)", "tokens": "D* (tokens)", "loss": "L* (nats per token)"}
HOVER = [
    ("", "@id"),
    *((label, f"@{key}{{%.3e}}") for label, key in (("N", "params"), ("D", "tokens"), ("C", "flops"))),
    ("loss", "@loss{%.5g}"),
    ("", "@why"),
]


def available() -> bool:
    """Return True where Bokeh is installed."""
    return importlib.util.find_spec("bokeh") is not None


def elements(analysis: Analysis) -> str:
    """Return the plots as HTML with their scripts, Bokeh's own (1.3 MB) among them; "" where Bokeh is not installed.

    Everything is ASCII; Bokeh escapes the texts of the data, so that none can end the script.
    """
    if not available():
        return ""
    fits = list(analysis.objectives.values())
    plots = [_losses(fit, analysis) for fit in fits]
    if any(row.usable for fit in fits for row in fit.budgets):
        plots += [_laws(key, analysis) for key in QUANTITIES]
    return embedded(plots)


def embedded(plots: "Sequence[Figure]") -> str:
    """Return plots, one below the other, as HTML with their scripts and Bokeh's own."""
    from bokeh.embed import components  # pyright: ignore[reportMissingImports]
    from bokeh.layouts import column  # pyright: ignore[reportMissingImports]
    from bokeh.resources import Resources  # pyright: ignore[reportMissingImports]

    script, place = components(column(*plots, sizing_mode="stretch_width"), wrap_script=False)
    library = Resources(mode="inline", components=["bokeh"], log_level="error").js_raw
    code = _ascii("\n".join((*library, script)))
    return f"{place}\n<script>\n{code}\n</script>\n"


def _ascii(code: str) -> str:
    """Return JavaScript whose characters beyond ASCII are escapes, since those of HTML mean nothing in it."""
    return re.sub(
        r"[^\x00-\x7f]",
        lambda match: "".join(f"\\u{unit:04x}" for unit in np.frombuffer(match[0].encode("utf-16-le"), "<u2")),
        code,
    )


def _figure(**options: Any) -> "Figure":
    from bokeh.models import DataRange1d  # pyright: ignore[reportMissingImports]
    from bokeh.plotting import figure  # pyright: ignore[reportMissingImports]

    ranges = {f"{axis}_range": DataRange1d(only_visible=True) for axis in "xy"}  # what is hidden stretches nothing
    tools = "pan,box_zoom,wheel_zoom,reset,save"
    plot = figure(height=HEIGHT, sizing_mode="stretch_width", tools=tools, **ranges, **options)
    plot.toolbar.logo = None
    plot.toolbar.active_scroll = None  # the wheel moves the page until it is chosen
    return plot


def _hover(plot: "Figure", renderers: list[Any], tooltips: list[tuple[str, str]]) -> None:
    from bokeh.models import HoverTool  # pyright: ignore[reportMissingImports]

    numbers: Any = {f"@{name}": "printf" for name in ("params", "tokens", "flops", "loss", "c", "value", "low", "high")}
    plot.add_tools(HoverTool(renderers=renderers, tooltips=tooltips, formatters=numbers))


def _losses(fit: ObjectiveFit, analysis: Analysis) -> "Figure":
    """Draw the runs of one objective over N, each with its row, and the curves."""
    from matplotlib.colors import to_hex

    name = fit.objective.upper()
    plot = _figure(
        title=f"{name}: loss over model size",
        x_axis_type="log",
        x_axis_label="N (parameters)",
        y_axis_label="loss (nats)",
    )
    budgets = sorted({row.budget for other in analysis.objectives.values() for row in other.budgets})
    drawn = []
    for row in fit.budgets:
        colour, label = to_hex(budget_style(budgets, row.budget)[0]), f"{row.budget:.3g}"
        drawn.append(plot.scatter("params", "loss", source=_source(row.runs), size=7, color=colour, legend_label=label))
        if row.curve:
            x = np.linspace(row.log_n.min(), row.log_n.max(), 80)
            plot.line(np.exp(x), row.curve(x), color=colour, legend_label=label)
    loose = [run for run in fit.runs if np.isnan(run.budget)]
    if loose and not fit.budgets:
        colours = _by_tokens(loose)
        source = _source(loose, colour=colours)
        drawn.append(plot.scatter("params", "loss", source=source, size=6, color="colour", legend_label="by tokens"))
    elif loose:
        drawn.append(
            plot.scatter("params", "loss", source=_source(loose), size=5, color=GREY, legend_label="no budget")
        )
    if gone := crosses(fit.objective, analysis.left_out):
        reasons = {left.run.id: left.reason for left in analysis.left_out}
        source = _source(gone, why=[reasons[run.id] for run in gone])
        drawn.append(
            plot.scatter("params", "loss", source=source, marker="x", size=9, color=GREY, legend_label="left out")
        )
    if far := distant(fit):
        source = _source(far, why=[DISTANT] * len(far))
        label = "far from the best size"
        drawn.append(
            plot.scatter("params", "loss", source=source, marker="cross", size=9, color=GREY, legend_label=label)
        )
    optima = [row.optimum for row in fit.budgets if row.usable and row.optimum]
    if optima:
        ends = [o.params.value for o in optima], [o.loss.value for o in optima]
        plot.scatter(*ends, marker="star", size=14, color="black", legend_label="optimum")
    _hover(plot, drawn, HOVER)
    plot.legend.click_policy = "hide"
    plot.add_layout(plot.legend[0], "right")
    return plot


def _by_tokens(runs: Sequence[CellResult]) -> list[str]:
    """Return colours from violet, of the fewest tokens, to green."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    logs = np.log([run.tokens for run in runs])
    shades = 0.05 + 0.67 * (logs - logs.min()) / max(float(np.ptp(logs)), 1e-9)  # visible on white and on black
    return [to_hex(colormaps["viridis"](shade)) for shade in shades]


def _source(runs: Sequence[CellResult], **more: list[str]) -> dict[str, Any]:
    columns = {key: [getattr(run, key) for run in runs] for key in ("id", "params", "tokens", "flops", "loss")}
    return columns | {"why": [""] * len(columns["id"])} | more


def _laws(key: str, analysis: Analysis) -> "Figure":
    """Draw the optima of one quantity over C with their intervals, and the laws."""
    from bokeh.models import PrintfTickFormatter  # pyright: ignore[reportMissingImports]

    plot = _figure(title=f"{LABELS[key]} over compute", x_axis_type="log", y_axis_type="log", x_axis_label="C (FLOPs)")
    plot.yaxis.formatter = PrintfTickFormatter(format="%.3g" if key == "loss" else "%.2e")
    drawn = []
    for fit in analysis.objectives.values():
        colour, name = style_of(fit.objective, analysis.objectives).colour, fit.objective.upper()
        optima = [(row.budget, getattr(row.optimum, key)) for row in fit.budgets if row.usable]
        if not optima:
            continue
        source = _estimates(optima)
        plot.segment("c", "low", "c", "high", source=source, color=colour)
        drawn.append(plot.scatter("c", "value", source=source, size=8, color=colour, legend_label=name))
        if law := fit.laws.get(key):
            grid = np.geomspace(law.budgets[0], analysis.next_budget or law.budgets[-1], 60)
            style: Any = {"color": colour, "legend_label": name}
            if fit.hanging:
                style = {"color": GREY, "line_dash": "dashed", "legend_label": f"{name}: hangs on suspected cells"}
            plot.line(grid, [law.at(c).value for c in grid], **style)
    plot.legend.location = "top_right" if key == "loss" else "top_left"
    form = "%.5g" if key == "loss" else "%.3e"
    rows = [("C", "@c{%.3e}"), (LABELS[key], f"@value{{{form}}}"), ("95%", f"@low{{{form}}} to @high{{{form}}}")]
    _hover(plot, drawn, rows)
    plot.legend.click_policy = "hide"
    return plot


def _estimates(rows: list[tuple[float, Estimate]]) -> dict[str, Any]:
    """Return columns; an end that is unknown or infinite is that of the value, which draws no bar."""
    ends = [e.interval if e.interval and e.bounded else (e.value, e.value) for _, e in rows]
    return {
        "c": [c for c, _ in rows],
        "value": [e.value for _, e in rows],
        "low": [low for low, _ in ends],
        "high": [high for _, high in ends],
    }
