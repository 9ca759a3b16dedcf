"""The tables of the page, as text; the template explains them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusionlm.scaling.laws.analysis import Analysis
from diffusionlm.scaling.laws.diagnostics import SYMBOLS, p_number, p_words
from diffusionlm.scaling.laws.gap import Gap, quoted
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.optima import Optimum
from diffusionlm.scaling.laws.parametric import Parametric
from diffusionlm.scaling.laws.published import PublishedLaw
from diffusionlm.scaling.report.formatting import Table, interval, number, with_unit
from diffusionlm.scaling.report.road_tables import road_tables
from diffusionlm.scaling.report.sentences import surface_exponent
from diffusionlm.scaling.sweep.points import LeftOut

Fits = Sequence[ObjectiveFit]
NO_MISFIT = 1e-4  # a smaller misfit of a law is rounding, or of no consequence
SHOWN = 100  # rows of a table of runs


def tables(analysis: Analysis, content: Mapping[str, Any], published: Sequence[PublishedLaw]) -> dict[str, Table]:
    """Return all tables by the names that the template has for them.

    Args:
      analysis: the fits.
      content: the content of report.json.
      published: the laws that the plots show.
    """
    fits = list(analysis.objectives.values())
    return {
        "measured": Table(["", ""], list(content["context"].items())),
        "left_out": _left_out(analysis.left_out),
        "optima": _optima(fits),
        "laws": _laws(fits),
        "without_one_budget": _without_one_budget(fits),
        **road_tables(analysis),
        "gaps": _gaps(quoted(analysis.gaps, analysis.objectives)),
        "predictions": _predictions(fits),
        "next_cells": _next_cells(content["next_cells"]),
        "parametric": _parametric(fits),
        "cross_checks": _cross_checks(fits),
        "paired_errors": _paired_errors(fits),
        "published": _published(published),
    }


def _left_out(left_out: Sequence[LeftOut]) -> Table:
    rows = []
    for run, reason in left_out[:SHOWN]:
        budget, loss = ("" if np.isnan(value) else f"{value:.4g}" for value in (run.budget, run.loss))
        sizes = with_unit(run.params, 3), with_unit(run.tokens, 3)
        rows.append([run.id, run.objective.upper(), budget, *sizes, loss, reason])
    if more := len(left_out) - SHOWN:
        rows += [[f"and {more:,} more, in cells.csv", *[""] * 6]] if more > 0 else []
    return Table(["", "", "C (FLOPs)", "N", "D", "loss (nats)", "why"], rows)


def _optima(fits: Fits) -> Table:
    header = [
        "",
        "C (FLOPs)",
        "N*",
        "D* (tokens)",
        "L* (nats/token)",
        "N* / parabola's",
        "L* - parabola's",
        "misfit p",
        "from",
    ]
    rows = []
    for fit in fits:
        for row in fit.budgets:
            cells = _optimum(row.optimum) if row.optimum else ["no optimum", "", "", "", "", ""]
            counts = f"{row.sizes} sizes, {len(row.runs)} runs" + ("" if row.usable else "; not in the laws")
            rows.append([fit.objective.upper(), f"{row.budget:.3g}", *cells, counts])
    return Table(header, rows)


def _optimum(optimum: Optimum) -> list[str]:
    log_n, loss = optimum.shift_log_n, optimum.shift_loss
    biases = ["", ""]
    if log_n is not None and loss is not None and np.isfinite(log_n):
        biases = [f"{np.exp(log_n):.3f}x", f"{loss:+.4f}"]
    misfit = optimum.lack_of_fit.p if optimum.lack_of_fit else None
    return [
        number(optimum.params),
        number(optimum.tokens),
        number(optimum.loss),
        *biases,
        "" if misfit is None else p_number(misfit),
    ]


def _of_laws(fit: ObjectiveFit) -> str:
    """Return the name of an objective for a row about its laws."""
    return fit.objective.upper() + (" (hangs on suspected cells)" if fit.hanging else "")


def _laws(fits: Fits) -> Table:
    header = ["", "of", "exponent of C", "log of prefactor", "minus parabolas'", "misfit", "budgets"]
    rows = []
    for fit in fits:
        for key, law in fit.laws.items():
            misfit = ""
            if law.lack_of_fit:
                sd, p = law.lack_of_fit.sd, law.lack_of_fit.p
                misfit = f"{100 * sd:.2g}%" if sd >= NO_MISFIT else f"< {100 * NO_MISFIT:g}%"
                misfit += "" if p is None else f", {p_words(p)}"
            rows.append(
                [
                    _of_laws(fit),
                    SYMBOLS[key],
                    number(law.exponent, 4),
                    f"{law.fit.log_prefactor:.4g}",
                    "" if law.shift_exponent is None else f"{law.shift_exponent:+.1g}",
                    misfit,
                    str(len(law.budgets)),
                ]
            )
    return Table(header, rows)


def _without_one_budget(fits: Fits) -> Table:
    budgets = sorted({c for fit in fits for law in fit.laws.values() for c, _ in law.without})
    rows = []
    for fit in fits:
        for key, law in fit.laws.items():
            if law.without:
                outside = dict(law.decisive)
                exponents = {c: number(e) + (" *" if c in outside else "") for c, e in law.without}
                cells = [exponents.get(c, "") for c in budgets]
                rows.append([_of_laws(fit), SYMBOLS[key], number(law.exponent), *cells])
    return Table(["", "of", "all budgets", *(f"without {c:.3g}" for c in budgets)], rows)


def _gaps(gaps: Sequence[Gap]) -> Table:
    rows = []
    for gap in gaps:
        name, reference = gap.objective.upper(), gap.reference.upper()
        pair, ratios = f"{name} over {reference}", dict(gap.size_ratio)
        for (c, factor, _), beyond in zip(gap.at_budgets, gap.extrapolations[0], strict=True):
            rows.append([pair, f"{c:.3g} of {reference}", number(factor), _extrapolated(name, beyond), ""])
        for (c, factor), beyond in zip(gap.at_own, gap.extrapolations[1], strict=True):
            ratio = number(ratios.get(c))
            rows.append([pair, f"{c:.3g} of {name}", number(factor), _extrapolated(reference, beyond), ratio])
        if gap.common is not None:
            equal = "" if gap.equal_p is None else f"exponents equal: {p_words(gap.equal_p)}"
            common = number(gap.common) if gap.parallel else "rejected"
            rows.append([pair, "one exponent", common, equal, number(gap.size_ratio_law)])
    return Table(["", "C (FLOPs)", "gap", "extrapolated", "ratio of N*"], rows)


def _extrapolated(name: str, factor: float) -> str:
    return f"law of {name}, {factor:.3g} times" if factor > 1 else "no"


def _predictions(fits: Fits) -> Table:
    rows = [
        [
            _of_laws(fit),
            f"{ahead.budget:.3g}",
            number(ahead.params),
            number(ahead.tokens),
            number(ahead.loss),
            interval(ahead.loss_of_run),
            number(ahead.bent_loss),
            number(ahead.hindcast, 2),
        ]
        for fit in fits
        if (ahead := fit.prediction)
    ]
    return Table(["", "C (FLOPs)", "N*", "D*", "L*", "one run", "bent law L*", "hindcast error"], rows)


def _next_cells(cells: Sequence[Mapping[str, Any]]) -> Table:
    header = ["", "best for", "C (FLOPs)", "N", "size", "kind", "off Var log L*", "off Var log N*", "cost"]
    rows = []
    for cell in cells:
        shares = cell["loss_reduction"], cell["params_reduction"]
        rows.append(
            [
                cell["objective"].upper(),
                ", ".join(cell["best_for"]),
                f"{cell['budget']:.3g}",
                with_unit(cell["params"], 3),
                cell["nearest_preset"],
                cell["kind"],
                *("" if share is None else f"{100 * share:.0f}%" for share in shares),
                f"{cell['relative_cost']:.2g}",
            ]
        )
    return Table(header, rows)


def _parametric(fits: Fits) -> Table:
    """Return the parametric laws of the objectives that have nothing else."""
    rows = []
    for fit in fits:
        if (law := fit.parametric) and not fit.budgets:
            terms = law.e, np.exp(law.log_a), np.exp(law.log_b), law.alpha, law.beta
            rows.append([fit.objective.upper(), str(len(fit.runs)), *(f"{term:.4g}" for term in terms)])
    return Table(["", "runs", "E (nats)", "A", "B", "alpha", "beta"], rows)


def _cross_checks(fits: Fits) -> Table:
    rows = []
    for fit in fits:
        name, ahead = fit.objective.upper(), fit.prediction
        if fit.laws:
            params, loss = fit.laws["params"].exponent, fit.laws["loss"].exponent
            predicted = number(ahead.loss) if ahead else ""
            rows.append(
                [_of_laws(fit), "laws through the curves' optima", number(params, 4), number(loss, 4), predicted]
            )
        envelope, exponents = fit.envelope, ["not determined", "not determined"]
        if envelope and envelope.params_law and envelope.loss_law:
            exponents = [f"{envelope.params_law.exponent:.4f}", f"{envelope.loss_law.exponent:.4f} (training loss)"]
        rows.append([name, "Approach 1 (envelope)", *exponents, ""])
        if projected := fit.surface:
            loss = number(projected.loss_at(ahead.budget)) if ahead and fit.noise and projected.determined else ""
            rows.append(
                [name, f"surface (scatter {projected.scatter:.2g} nats)", number(surface_exponent(fit), 4), "", loss]
            )
        if surface := fit.parametric:
            cells = _surface(fit, surface) if surface.determined else ["not determined", "not determined", ""]
            rows.append([name, "Approach 3 (parametric)", *cells])
    return Table(["", "", "exponent of N*", "exponent of L*", "L* at the next budget"], rows)


def _surface(fit: ObjectiveFit, surface: Parametric) -> list[str]:
    compute = [row.budget for row in fit.budgets] or [run.flops for run in fit.runs]
    first, last, ahead = min(compute), max(compute), fit.prediction
    error = f" \N{PLUS-MINUS SIGN} {surface.stderr[0]:.2g} (standard error)" if surface.stderr else ""
    change = np.log(surface.optimum(last)[2] / surface.optimum(first)[2])
    return [
        f"{surface.params_exponent:.4f}{error}",
        f"{change / np.log(last / first):.4f} (average)" if last > first else "",
        f"{surface.optimum(ahead.budget)[2]:.4g}" if ahead else "",
    ]


def _paired_errors(fits: Fits) -> Table:
    rows = [
        [
            fit.objective.upper(),
            f"{row.budget:.3g}",
            f"{row.paired.stderr:.2g}" if row.paired.stderr else "exact for this text",
            f"{row.paired.stderr_unpaired:.2g}" if row.paired.stderr else "",
            f"{row.paired.effect:.3g}",
            "yes" if row.paired.small else "no",
        ]
        for fit in fits
        for row in fit.budgets
        if row.paired
    ]
    return Table(["", "C (FLOPs)", "error (nats)", "unpaired", "effect (nats)", "below a tenth"], rows)


def _published(published: Sequence[PublishedLaw]) -> Table:
    rows = []
    for law in published:
        convention = f"N: {law.convention['N']}; C: {law.convention['C']}"
        fitted = "{:.2g} to {:.2g}".format(*law.fitted_range) if law.fitted_range else "not stated"
        rows.append([law.title, law.source, convention, fitted, law.how])
    return Table(["law", "source", "convention", "fitted range (FLOPs)", "how"], rows)
