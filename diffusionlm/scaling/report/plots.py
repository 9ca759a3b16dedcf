"""The pictures of a report, as PNG files in memory: readable in grey, with colours that the colour-blind can tell."""

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws.analysis import Analysis, ObjectiveFit
from diffusionlm.scaling.laws.optima import BudgetFit
from diffusionlm.scaling.laws.published import PublishedLaw
from diffusionlm.scaling.laws.uncertainty import Estimate, by_cell

# Okabe and Ito's blue and vermilion differ in lightness; marker, filling and line differ too.
STYLES = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-", "fill": True},
    {"color": "#D55E00", "marker": "s", "linestyle": "--", "fill": False},
    {"color": "#009E73", "marker": "^", "linestyle": "-.", "fill": True},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":", "fill": False},
)
MARKERS = "osD^vP*X<>"  # of budgets
OVERLAYS = ("-", "--", "-.", ":")
GREY = "#555555"


def render(analysis: Analysis, overlays: Sequence[PublishedLaw] = ()) -> dict[str, bytes]:
    """All pictures that the analysis has something for, by file name.

    Raises:
      UserError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plots need matplotlib; pip install matplotlib, or diffusionlm[docs]") from error
    makers: Mapping[str, Callable] = {
        "isoflop.png": _isoflop,
        "laws.png": _laws,
        "gap.png": _gap,
        "residuals.png": _residuals,
        "envelope.png": _envelope,
    }
    pictures = {}
    with rc_context({"font.size": 11, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True}):
        for name, make in makers.items():
            figure = Figure(layout="constrained")
            if make(figure, analysis, overlays):
                written = io.BytesIO()
                figure.savefig(written, format="png", dpi=140)
                pictures[name] = written.getvalue()
    return pictures


def _isoflop(figure, analysis: Analysis, overlays) -> bool:
    """Loss over N, a parabola and an optimum for each budget; a panel for each objective."""
    fits = list(analysis.objectives.values())
    figure.set_size_inches(5.6 * len(fits), 5.4)
    budgets = sorted({row.budget for fit in fits for row in fit.budgets})
    for axes, fit in zip(figure.subplots(1, len(fits), squeeze=False)[0], fits, strict=True):
        for row in fit.budgets:
            colour, marker = _budget_style(budgets, row.budget)
            cells = by_cell(row.runs)
            sizes = [key[2] for key in cells]
            means = [np.mean([run.loss for run in runs]) for runs in cells.values()]
            spread = [np.std([r.loss for r in runs], ddof=1) if len(runs) > 1 else np.nan for runs in cells.values()]
            axes.errorbar(
                sizes, means, spread, fmt=marker, color=colour, capsize=3, markersize=6, label=_flops(row.budget)
            )
            if row.parabola:
                step = 0.1 * np.ptp(row.log_n)
                x = np.linspace(row.log_n.min() - step, row.log_n.max() + step, 200)
                axes.plot(np.exp(x), row.parabola(x), color=colour, linewidth=1.4)
        axes.set(title=fit.objective.upper(), xscale="log", xlabel="model size N (parameters)")
        ends = np.array([_grid_ends(row) for row in fit.budgets])
        axes.set_xlim(ends[:, 0].min(), ends[:, 1].max())
        axes.set_ylim(axes.get_ylim())  # of points and curves: no interval stretches a panel
        for row in fit.budgets:
            if row.inside:
                _optimum(axes, row)
        _few_ticks(axes.xaxis)
        for usable, fill, label in ((True, "black", "optimum"), (False, "white", "optimum in no law")):
            if any(row.inside and row.usable == usable for row in fit.budgets):
                axes.plot([], [], "*", color="black", markerfacecolor=fill, markersize=11, label=label)
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: "optimum" in labels[i])  # budgets first
        _legend_under(axes, [handles[i] for i in order], [labels[i] for i in order], title="budget (FLOPs)")
    figure.axes[0].set_ylabel("held-out loss (nats per token)")
    return True


def _optimum(axes, row: BudgetFit) -> None:
    """A star with its interval: filled, or hollow and grey where it is in no law."""
    colour = "black" if row.usable else GREY
    _bar(axes, row.params.value, row.loss.value, row.params, axes.get_xlim(), colour, across=True)
    _bar(axes, row.params.value, row.loss.value, row.loss, axes.get_ylim(), colour)
    fill, edge = ("black", "white") if row.usable else ("white", "black")
    axes.plot(
        row.params.value, row.loss.value, "*", markersize=12, markerfacecolor=fill, markeredgecolor=edge, zorder=6
    )


def _bar(axes, x: float, y: float, of: Estimate, within: tuple[float, float], colour, across: bool = False) -> None:
    """An interval with caps, but cut at the limits `within`, where an arrow says that it goes on."""
    if of.low is None:
        return
    for end, limit, side in ((of.low, within[0], -1), (of.high, within[1], 1)):
        goes_on = side * (end - limit) > 0
        end = limit if goes_on else end
        along, start = ([end, y] if across else [x, end]), (x, y)
        style = "-|>" if goes_on else "|-|, widthA=0, widthB=0.3"
        arrow = {"arrowstyle": style, "color": colour, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", along, start, arrowprops=arrow, zorder=5)


def _grid_ends(row: BudgetFit, key: str = "params") -> tuple[float, float]:
    """The range of what was run at a budget and one spacing more: of N, or of D with "tokens"."""
    values = [getattr(run, key) for run in row.runs]
    step = np.exp(row.spacing) if row.sizes > 1 else 2.0
    return min(values) / step, max(values) * step


def _laws(figure, analysis: Analysis, overlays: Sequence[PublishedLaw]) -> bool:
    """N*, D* and L* over C, with bands, and the slopes of published laws."""
    fits = list(analysis.objectives.values())
    if not any(row.usable for fit in fits for row in fit.budgets):
        return False
    figure.set_size_inches(13.5, 4.8)
    budgets = sorted({row.budget for fit in fits for row in fit.budgets})
    ahead = analysis.next_budget if any(fit.prediction for fit in fits) else None
    grid = np.geomspace(budgets[0] / 1.3, (ahead or budgets[-1]) * 1.3, 100)
    names = {"params": "N* (parameters)", "tokens": "D* (tokens)", "loss": "L* (nats per token)"}
    panels = figure.subplots(1, 3)
    for axes, (key, label) in zip(panels, names.items(), strict=True):
        for fit in fits:
            style, name = _style(analysis, fit), fit.objective.upper()
            rows = [row for row in fit.budgets if row.usable]
            if rows:
                within = [None if key == "loss" else _grid_ends(row, key) for row in rows]
                _points(axes, [row.budget for row in rows], [getattr(row, key) for row in rows], style, name, within)
            rejected = [row for row in fit.budgets if row.inside and not row.usable]
            if rejected:
                at = [getattr(row, key).value for row in rejected]
                label_of = f"{name}, optimum in no law"
                axes.plot([row.budget for row in rejected], at, "x", color=style["color"], markersize=8, label=label_of)
            if fit.laws:
                at = [fit.laws[key].at(c) for c in grid]
                axes.plot(grid, [e.value for e in at], color=style["color"], linestyle=style["linestyle"])
                if at[0].low is not None:
                    low, high = np.array([(e.low, e.high) for e in at]).T
                    axes.fill_between(grid, low, high, color=style["color"], alpha=0.18, linewidth=0)
            else:
                axes.plot([], [], " ", label=f"no law of {fit.objective}")
        for law, line in zip(overlays, np.resize(OVERLAYS, len(overlays)), strict=True):
            _slope(axes, law, key, grid, fits, line)
        if ahead:
            axes.axvline(ahead, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)))
        axes.set(xscale="log", yscale="log", xlabel="compute C (FLOPs)", ylabel=label)
        _budget_ticks(axes.xaxis, budgets)
        _plain_ticks(axes.yaxis) if key == "loss" else _few_ticks(axes.yaxis)
    if ahead:
        panels[0].annotate(
            "next ", (ahead, 0.02), xycoords=("data", "axes fraction"), ha="right", color=GREY, fontsize=9
        )
    _legend_below(figure, panels[0], columns=4)
    return True


def _slope(axes, law: PublishedLaw, key: str, grid: np.ndarray, fits: Sequence[ObjectiveFit], line: str) -> None:
    """A published law, moved to go through the middle of what the sweep found for its objective (or else for any)."""
    inside = law.fitted_range and law.fitted_range[0] <= grid[-1] and law.fitted_range[1] >= grid[0]
    if law.params(grid[0]) is None or (key == "loss" and (law.loss(grid[0]) is None or not inside)):
        return  # far from where it was fitted, a law of the loss says nothing
    own = [fit for fit in fits if fit.objective == law.objective and any(row.usable for row in fit.budgets)]
    rows = [row for fit in own or fits for row in fit.budgets if row.usable]
    middle = np.exp(np.mean([np.log(row.budget) for row in rows]))
    level = np.exp(np.mean([np.log(getattr(row, key).value) for row in rows])) / getattr(law, key)(middle)
    values = [level * getattr(law, key)(c) for c in grid]
    title = f"{law.title}: slope only" + ("" if inside else ", extrapolated")
    axes.plot(grid, values, color=GREY, linestyle=line, linewidth=1.2, label=title, zorder=1)


def _gap(figure, analysis: Analysis, overlays) -> bool:
    """The compute gap over the compute of the reference, and the ratio of optimal sizes."""
    if not analysis.gaps:
        return False
    figure.set_size_inches(11, 4.8)
    left, right = figure.subplots(1, 2)
    for gap in analysis.gaps:
        style = _style(analysis, analysis.objectives[gap.objective])
        other, reference = gap.laws
        title = f"{gap.objective.upper()} over {gap.reference.upper()}"
        if other:
            grid = np.geomspace(reference.budgets[0], reference.budgets[-1], 60)
            at = [gap.at(c) for c in grid]
            values = np.array([e.value for e in at])
            inside = (values * grid >= other.budgets[0]) & (values * grid <= other.budgets[-1])
            if inside.any():
                left.plot(grid, np.where(inside, values, np.nan), color=style["color"], linewidth=2.4, label=title)
            if not inside.all():
                left.plot(grid, values, color=style["color"], linestyle=(0, (2, 2)), label=f"{title}, extrapolated")
            if at[0].low is not None:
                low, high = np.array([(e.low, e.high) for e in at]).T
                left.fill_between(grid, low, high, color=style["color"], alpha=0.18, linewidth=0)
        needed = [c / e.value for c, e in gap.at_own]
        _points(left, needed, [e for _, e in gap.at_own], style, f"optima of {gap.objective.upper()}")
        if gap.parallel:
            left.axhline(gap.common.value, color=GREY, linestyle=":", label=f"one exponent: {gap.common.value:.3g}")
        _points(right, [c for c, _ in gap.size_ratio], [e for _, e in gap.size_ratio], style, title)
    for axes, more in ((left, [c / e.value for gap in analysis.gaps for c, e in gap.at_own]), (right, [])):
        axes.set_xscale("log")
        _budget_ticks(axes.xaxis, [*reference.budgets, *more])
    left.axvspan(reference.budgets[0], reference.budgets[-1], color=GREY, alpha=0.1, linewidth=0)
    left.set(xlabel=f"compute C of {gap.reference.upper()} (FLOPs)", ylabel="times C for the same loss", yscale="log")
    _few_ticks(left.yaxis)
    right.axhline(1, color=GREY, linewidth=0.8)
    right.set(xlabel="compute C (FLOPs)", ylabel="ratio of optimal sizes N*")
    right.set_xlim(reference.budgets[0] / 1.3, reference.budgets[-1] * 1.3)
    for axes in (left, right):
        if axes.get_legend_handles_labels()[1]:
            _legend_under(axes, *axes.get_legend_handles_labels())
    return True


def _residuals(figure, analysis: Analysis, overlays) -> bool:
    """Measured minus fitted over N / N*: a pattern is misfit, scatter is noise."""
    fits = list(analysis.objectives.values())
    if not any(row.params for fit in fits for row in fit.budgets):
        return False
    figure.set_size_inches(5.6 * len(fits), 3.8)
    budgets = sorted({row.budget for fit in fits for row in fit.budgets})
    panels = figure.subplots(1, len(fits), squeeze=False, sharey=True)[0]
    for axes, fit in zip(panels, fits, strict=True):
        if fit.noise:
            axes.axhspan(-2 * fit.noise.sd, 2 * fit.noise.sd, color=GREY, alpha=0.15, linewidth=0)
        axes.axhline(0, color=GREY, linewidth=0.8)
        shown = [row for row in fit.budgets if row.params]
        for row in shown:
            colour, marker = _budget_style(budgets, row.budget)
            x = np.exp(row.log_n) / row.params.value
            axes.plot(x, row.parabola.residuals, marker, color=colour)
        # In the title, where it covers no point.
        noise = f": seed sd {fit.noise.sd:.2g} nats, grey is two" if fit.noise else ""
        axes.set(title=fit.objective.upper() + noise, xscale="log", xlabel="N / N*")
        if shown:
            _few_ticks(axes.xaxis)
        else:
            axes.set_xticks([], [])
            axes.minorticks_off()
        missing = [_flops(row.budget) for row in fit.budgets if not row.params]
        if missing:
            text = f"no minimum at {', '.join(missing)} FLOPs"
            axes.text(0.02, 0.04, text, transform=axes.transAxes, fontsize=9, color=GREY)
    for budget in sorted({row.budget for fit in fits for row in fit.budgets if row.params}):
        colour, marker = _budget_style(budgets, budget)
        panels[0].plot([], [], marker, color=colour, label=_flops(budget))
    panels[0].set_ylabel("residual (nats per token)")
    _legend_below(figure, panels[0], columns=8)
    return True


def _envelope(figure, analysis: Analysis, overlays) -> bool:
    """Training curves, green to violet by size, and their envelope."""
    fits = [fit for fit in analysis.objectives.values() if fit.envelope]
    if not fits:
        return False
    from matplotlib import colormaps

    figure.set_size_inches(5.6 * len(fits), 4.4)
    for axes, fit in zip(figure.subplots(1, len(fits), squeeze=False)[0], fits, strict=True):
        sizes = sorted({n for n, *_ in fit.envelope.curves})
        for n, c, loss in fit.envelope.curves:
            shade = 0.72 * (1 - sizes.index(n) / max(len(sizes) - 1, 1))
            axes.plot(c, loss, color=colormaps["viridis"](shade), linewidth=0.8, alpha=0.8)
        used = fit.envelope.used
        found = "points of the laws" if fit.envelope.params_law else "of too few sizes for a law"
        axes.plot(fit.envelope.c, fit.envelope.loss, color="black", linewidth=1, label="envelope")
        if used.any():
            axes.plot(fit.envelope.c[used], fit.envelope.loss[used], "k.", markersize=6, label=found)
        title = f"{fit.objective.upper()}: N from {_short(sizes[0])} (green) to {_short(sizes[-1])} (violet)"
        axes.set(title=title, xscale="log", yscale="log", xlabel="compute C (FLOPs)")
        axes.title.set_fontsize(11)
        _budget_ticks(axes.xaxis, [row.budget for row in fit.budgets])
        axes.set_xlim(fit.budgets[0].budget / 1.05, fit.budgets[-1].budget * 1.05)
        _plain_ticks(axes.yaxis)
        axes.legend(fontsize=9)
    figure.axes[0].set_ylabel("training loss (nats per token)")
    return True


def _points(
    axes, c: Sequence[float], estimates: Sequence[Estimate], style: Mapping, label: str, within: Sequence | None = None
) -> None:
    """Points with their intervals; `within`: limits for each, where its bar is cut."""
    values = np.array([e.value for e in estimates])
    limits = [limit or (0.0, np.inf) for limit in within or [None] * len(estimates)]
    shown = [
        (max(e.low, low), min(e.high, high)) if e.bounded else (np.nan, np.nan)
        for e, (low, high) in zip(estimates, limits, strict=True)
    ]
    reach = np.abs(np.array(shown, float).reshape(-1, 2).T - values)
    axes.errorbar(
        c,
        values,
        reach if np.isfinite(reach).any() else None,
        fmt=style["marker"],
        color=style["color"],
        markerfacecolor=style["color"] if style["fill"] else "white",
        capsize=4,
        markersize=7,
        label=label,
    )
    for x, e, (low, high) in zip(c, estimates, limits, strict=True):
        for end, marker, goes_on in ((low, "v", e.bounded and e.low < low), (high, "^", e.bounded and e.high > high)):
            if goes_on:
                axes.plot(x, end, marker, color=style["color"], markersize=7)


def _style(analysis: Analysis, fit: ObjectiveFit) -> Mapping:
    """MDM and ARM look the same in every report."""
    others = [name for name in analysis.objectives if name not in ("mdm", "arm")]
    return STYLES[("mdm", "arm", *others).index(fit.objective) % len(STYLES)]


def _budget_style(budgets: Sequence[float], budget: float) -> tuple:
    from matplotlib import colormaps

    i = list(budgets).index(budget)
    shade = 0.05 + 0.67 * i / max(len(budgets) - 1, 1)  # even in lightness, and visible on white and on black
    return colormaps["viridis"](shade), MARKERS[i % len(MARKERS)]


def _flops(c: float) -> str:
    mantissa, exponent = f"{c:.1e}".split("e")
    return rf"${mantissa.removesuffix('.0')} \times 10^{{{int(exponent)}}}$"


def _few_ticks(axis) -> None:
    """Labels at 1, 2 and 5 of a decade, as a panel often spans little more than one; fewer where they would touch."""
    from matplotlib import ticker

    decades = float(np.ptp(np.log10(axis.get_view_interval())))
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(ticker.NullFormatter())


def _budget_ticks(axis, budgets: Sequence[float]) -> None:
    """Labels at budgets, but not at those that are too close to the one before for both to be read."""
    from matplotlib import ticker

    apart = np.ptp(np.log(budgets)) / 5
    shown: list[float] = []
    for budget in sorted(budgets):
        if not shown or np.log(budget / shown[-1]) >= apart:
            shown.append(budget)
    axis.set_major_locator(ticker.FixedLocator(shown))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _flops(value)))
    axis.set_minor_locator(ticker.NullLocator())


def _legend_below(figure, axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)), fontsize=9)


def _legend_under(axes, handles: Sequence, labels: Sequence[str], title: str | None = None) -> None:
    """Under its panel, where it covers nothing."""
    at = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncols": 3}
    axes.legend(handles, labels, **at, title=title, fontsize=9, title_fontsize=9)


def _plain_ticks(axis) -> None:
    """Plain numbers on a logarithmic axis that spans less than a decade."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.MaxNLocator(6))
    axis.set_major_formatter(ticker.FormatStrFormatter("%.3g"))
    axis.set_minor_locator(ticker.NullLocator())


def _short(value: float) -> str:
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g}{letter}"
    return f"{value:.3g}"
