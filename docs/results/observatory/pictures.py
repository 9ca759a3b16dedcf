"""The plots of the observatory: PNGs for the page, and Bokeh's for the HTML, from nothing but observatory.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import page
from matplotlib.figure import Figure

from diffusionlm.scaling.report import interactive as bokeh_plots
from diffusionlm.scaling.report.plot_elements import GREY, STYLES

# Okabe and Ito's colours, with a marker each, so that nothing is told by colour alone.
METHODS = {
    "published": (GREY, "D"),
    "plain": (STYLES[4].colour, "v"),
    "curves": (STYLES[0].colour, "o"),
    "surface": (STYLES[1].colour, "s"),
}
Numbers = Mapping[str, Any]


def draw(numbers: Numbers, output: Path) -> None:
    """Write the PNGs."""
    # A white ground, which dark pages keep, rather than a transparent one, on which axes would vanish.
    with plt.rc_context({"savefig.facecolor": "white", "font.size": 9}):
        _exponents(numbers["exponents"]).savefig(output / "exponents.png", dpi=110)
        _diffusion(numbers["diffusion"]["laws"]).savefig(output / "diffusion.png", dpi=110)
    plt.close("all")


def _ends(e: Mapping[str, float | None] | None) -> tuple[float, float, float] | None:
    """Return a value with the distances of its interval's ends; no distance where it has none."""
    if e is None or e["value"] is None:
        return None
    low, high = e.get("low"), e.get("high")
    if low is None or high is None:
        return e["value"], 0.0, 0.0
    return e["value"], max(e["value"] - low, 0.0), max(high - e["value"], 0.0)


def _exponents(rows: Sequence[Numbers]) -> Figure:
    """Draw the exponents of each experiment, one line for each, one mark for each method."""
    rows = [row for row in rows if row["curves"]]
    figure, axes = plt.subplots(figsize=(7.6, 0.3 * len(rows) + 1), layout="constrained")
    for k, (method, (colour, marker)) in enumerate(METHODS.items()):
        label: str | None = method
        for i, row in enumerate(rows):
            found = _ends(row[method])
            if found is None:
                continue
            at, low, high = found
            place = len(rows) - 1 - i + 0.3 - 0.2 * k
            axes.errorbar(at, place, xerr=[[low], [high]], fmt=marker, color=colour, markersize=4, lw=1.2, label=label)
            label = None
    labels = [f"{page.name(row['name'])}, {row['objective']}{page.mark(row)}" for row in rows]
    axes.set_yticks(range(len(rows)), reversed(labels))
    axes.set(xlabel="exponent a of N*, with 95% intervals", xlim=(0.1, 1.0), ylim=(-0.7, len(rows) - 0.3))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, 1.06), ncols=4, frameon=False)
    return figure


def _diffusion(laws: Sequence[Numbers]) -> Figure:
    """Draw N* over C by each law of masked diffusion; thick where it is fitted, as far as its range is known."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    shown = [law for law in laws if law["at"] and law["objective"] == "mdm"]
    for law, style in zip(shown, STYLES, strict=False):
        first, last = law["at"][0], law["at"][-1]
        slope = np.log(last["params"] / first["params"]) / np.log(last["budget"] / first["budget"])

        def params(c: np.ndarray, first: Numbers = first, slope: float = slope) -> np.ndarray:
            return first["params"] * (c / first["budget"]) ** slope

        c = np.geomspace(3e18, 1e22, 50)
        label = f"{law['title']} ({law['kind']}): {law['a']['value']:.3f}"
        axes.plot(c, params(c), color=style.colour, ls=style.line, lw=1, label=label)
        if law["range"]:
            inside = np.geomspace(*law["range"], 20)
            axes.plot(inside, params(inside), color=style.colour, lw=3, alpha=0.6)
        axes.plot([a["budget"] for a in law["at"]], [a["params"] for a in law["at"]], style.marker, color=style.colour)
    axes.set(xscale="log", yscale="log", xlabel="C (FLOPs)", ylabel="N* (parameters, as each source counts)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, title="exponent a; thick within the fitted range", title_fontsize=7)
    return figure


def interactive(numbers: Numbers) -> str:
    """Return a page of its own with the plots to hover over; Bokeh's script is in it, and nothing is loaded."""
    from bokeh.models import ColumnDataSource, Whisker
    from bokeh.plotting import figure

    rows = [row for row in numbers["exponents"] if row["curves"] or row["surface"]]
    labels = [f"{page.name(row['name'])}, {row['objective']}" for row in rows]
    plot = figure(
        y_range=labels[::-1],
        height=24 * len(rows) + 120,
        sizing_mode="stretch_width",
        title="Exponent a of N*, with 95% intervals",
        x_range=(0.1, 1.0),
        tools="pan,box_zoom,wheel_zoom,reset,save",
    )
    drawn = []
    for method, (colour, _) in METHODS.items():
        columns: dict[str, list[Any]] = {key: [] for key in ("label", "value", "low", "high", "text", "method")}
        for row, label in zip(rows, labels, strict=True):
            if (found := _ends(row[method])) is None:
                continue
            at, low, high = found
            entry = (label, at, at - low, at + high, page.est(row[method]), method)
            for key, item in zip(columns, entry, strict=True):
                columns[key].append(item)
        source = ColumnDataSource(columns)
        shape = {"published": "diamond", "plain": "inverted_triangle", "curves": "circle", "surface": "square"}[method]
        options = {"source": source, "color": colour, "legend_label": method}
        drawn.append(plot.scatter("value", "label", size=8, marker=shape, **options))
        bars = {"base": "label", "lower": "low", "upper": "high", "source": source, "dimension": "width"}
        plot.add_layout(Whisker(line_color=colour, upper_head=None, lower_head=None, **bars))
    hover = [("", "@label"), ("", "@method"), ("a", "@text")]
    _finish(plot, drawn, hover)
    body = bokeh_plots.embedded(
        [plot, _predictions(numbers["held_out"], "params"), _predictions(numbers["held_out"], "loss")]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n<title>The observatory</title>\n'
        "<style>body { font-family: sans-serif; max-width: 70rem; margin: 1rem auto; }</style>\n</head>\n"
        "<body><h1>The observatory</h1>\n<p>Its tables are on the page that links to this one. "
        "Click on a word of the legend to hide its marks.</p>\n"
        f"{body}</body></html>\n"
    )


def _predictions(rows: Sequence[Numbers], quantity: str) -> Any:
    """Draw what was predicted of the largest budgets, divided by what was then measured."""
    from bokeh.models import ColumnDataSource, Span, Whisker
    from bokeh.plotting import figure

    rows = [row for row in rows if row["quantity"] == quantity and row["holds"] is not None]
    labels = list(dict.fromkeys(f"{page.name(row['name'])}, {row['objective']}" for row in rows))
    name = {"params": "N*", "loss": "L*"}[quantity]
    plot = figure(
        y_range=labels[::-1],
        height=24 * len(labels) + 140,
        sizing_mode="stretch_width",
        title=f"{name} of the largest budget: predicted from the others, divided by measured",
        x_axis_type="log",
        tools="pan,box_zoom,wheel_zoom,reset,save",
    )
    plot.add_layout(Span(location=1, dimension="height", line_color="black", line_dash="dashed"))
    drawn = []
    for method, key in (("laws", "curves"), ("surface", "surface")):
        chosen = [row for row in rows if row["method"] == method]
        columns = {end: [row["predicted"][end] / row["measured"] for row in chosen] for end in ("value", "low", "high")}
        columns["label"] = [f"{page.name(row['name'])}, {row['objective']}" for row in chosen]
        columns["text"] = [page.est(row["predicted"], ".4g") for row in chosen]
        columns["measured"] = [row["measured"] for row in chosen]
        source, colour = ColumnDataSource(columns), METHODS[key][0]
        marker = "circle" if key == "curves" else "square"
        options = {"source": source, "color": colour, "legend_label": method, "marker": marker}
        drawn.append(plot.scatter("value", "label", size=8, **options))
        bars = {"base": "label", "lower": "low", "upper": "high", "source": source, "dimension": "width"}
        plot.add_layout(Whisker(line_color=colour, upper_head=None, lower_head=None, **bars))
    hover = [("", "@label"), ("predicted", "@text"), ("measured", "@measured")]
    _finish(plot, drawn, hover)
    return plot


def _finish(plot: Any, drawn: Sequence[Any], hover: Sequence[tuple[str, str]]) -> None:
    """Add what the marks say, and a legend above the plot that hides them."""
    from bokeh.models import HoverTool

    plot.add_tools(HoverTool(renderers=list(drawn), tooltips=list(hover)))
    plot.toolbar.logo = None
    plot.toolbar.active_scroll = None
    plot.legend.click_policy = "hide"
    plot.add_layout(plot.legend[0], "above")
    plot.legend.orientation = "horizontal"
