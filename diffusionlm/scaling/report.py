"""The report of a sweep: one page that stands alone, its pictures, two tables and the numbers, from results alone."""

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusionlm.errors import UserError
from diffusionlm.files import in_bucket, run_path
from diffusionlm.scaling import laws, page, plots
from diffusionlm.scaling.analysis import Analysis, ObjectiveFit, analyse
from diffusionlm.scaling.design import Candidate
from diffusionlm.scaling.misfit import LackOfFit
from diffusionlm.scaling.optima import QUANTITIES, BudgetFit
from diffusionlm.scaling.results import CellResult
from diffusionlm.scaling.uncertainty import Estimate

__all__ = ["analyse", "as_json", "write"]

PICTURES = ("isoflop.png", "laws.png", "gap.png", "residuals.png", "envelope.png")


def write(
    results: Sequence[CellResult],
    directory: str | os.PathLike,
    *,
    title: str,
    convention: str,
    overlay: Sequence[str] = (),
    incomplete: int = 0,
) -> dict[str, Any]:
    """Writes report.html, report.json, cells.csv, optima.csv and PNG files; each is there whole or not at all.

    Args:
      results: of the finished cells.
      directory: where to; made if missing, and the files of an earlier report are replaced.
      title: of the page.
      convention: what N and C count, in a sentence for the page.
      overlay: names of published laws to draw, as in `laws.names()`.
      incomplete: planned cells that have not finished, to be told.

    Returns:
      What report.json holds.

    Raises:
      UserError: no finished cell, an unknown law, matplotlib missing, or a directory that cannot be written.
    """
    published = [laws.get(name) for name in overlay]
    analysis = analyse(results)
    if incomplete:
        line = f"the sweep is incomplete: {incomplete} planned cells have not finished, {len(results)} have"
        analysis = dataclasses.replace(analysis, warnings=(line, *analysis.warnings))
    pictures = plots.render(analysis, published)
    content = as_json(analysis) | {
        "title": title,
        "convention": convention,
        "cells": len(results),
        "incomplete": incomplete,
        "overlay": {law.name: law.source for law in published},
    }
    files = pictures | {
        "cells.csv": _csv(_cell_rows(results, analysis)),
        "optima.csv": _csv(_optimum_rows(analysis)),
        "report.json": (json.dumps(content, indent=1, allow_nan=False) + "\n").encode(),
        "report.html": page.render(analysis, content, pictures, published).encode("ascii", "xmlcharrefreplace"),
    }
    target = run_path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in set(PICTURES) - set(pictures):  # of an earlier report that had more to show
            (target / name).unlink(missing_ok=True)
        for name, data in files.items():  # the page last: who sees it sees files that belong to it
            _write(target / name, data)
    except OSError as error:
        raise UserError(f"cannot write the report to {str(directory)!r}: {error.strerror or error}") from error
    return content


def _write(path, data: bytes) -> None:
    if in_bucket(path):  # objects appear whole
        path.write_bytes(data)
        return
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def as_json(analysis: Analysis) -> dict[str, Any]:
    """All numbers of an analysis with plain types, as report.json has them.

    An estimate is {"value", "low", "high", "interval"}; interval is "95%", "unbounded" (the end that is null is
    infinite) or "unknown" (no noise estimate). Losses are nats per token, compute is in FLOPs.
    """
    objectives = analysis.objectives
    return {
        "warnings": list(analysis.warnings),
        "noise": {name: _plain(fit.noise) for name, fit in objectives.items()},
        "optima": [_optimum(row) for fit in objectives.values() for row in fit.budgets],
        "laws": {name: {key: _law(law) for key, law in fit.laws.items()} for name, fit in objectives.items()},
        "asymmetry": {name: _plain(fit.asymmetry) for name, fit in objectives.items()},
        "gaps": [_gap(gap) for gap in analysis.gaps],
        "next_budget": analysis.next_budget,
        "predictions": {name: _plain(fit.prediction) for name, fit in objectives.items()},
        "next_cells": [cell for fit in objectives.values() for cell in best_candidates(fit)],
        "paired_errors": [
            {"objective": row.objective, "budget": row.budget, **_plain(row.paired), "small": row.paired.small}
            for fit in objectives.values()
            for row in fit.budgets
            if row.paired
        ],
        "cross_checks": {name: _cross_checks(fit, analysis.next_budget) for name, fit in objectives.items()},
    }


def best_candidates(fit: ObjectiveFit) -> list[dict[str, Any]]:
    """The next cells that are best at something: for L* and for N*, in all and for their cost.

    Each says what it is `best_for`, and which size of the sweep is nearest to it.
    """
    purposes = {
        "L*": lambda c: c.loss_reduction,
        "L* for its cost": lambda c: c.loss_reduction / c.relative_cost,
        "N*": lambda c: c.params_reduction,
        "N* for its cost": lambda c: c.params_reduction / c.relative_cost,
    }
    presets = {run.params: run.preset for row in fit.budgets for run in row.runs}
    best: dict[Candidate, list[str]] = {}
    for purpose, key in purposes.items():
        if fit.candidates:
            best.setdefault(max(fit.candidates, key=key), []).append(purpose)
    found = []
    for candidate, purpose in best.items():
        nearest = min(presets, key=lambda params: abs(math.log(params / candidate.params)))
        found.append(dataclasses.asdict(candidate) | {"best_for": purpose, "nearest_preset": presets[nearest]})
    return found


def _optimum(row: BudgetFit) -> dict[str, Any]:
    return {
        "objective": row.objective,
        "budget": row.budget,
        "sizes": row.sizes,
        "runs": len(row.runs),
        **{key: _plain(getattr(row, key)) for key in QUANTITIES},
        "tokens_per_parameter": _plain(row.tokens.value / row.params.value if row.params else None),
        "curvature": _plain(row.parabola.coefficients[2] if row.parabola else None),
        "in_laws": row.usable,
        "at_edge": row.at_edge,
        "lack_of_fit": _plain(row.lack_of_fit),
        "bias_log_params": _plain(row.shift_log_n),
        "bias_loss": _plain(row.shift_loss),
    }


def _law(law) -> dict[str, Any]:
    return {
        "exponent": _plain(law.exponent),
        "log_prefactor": law.fit.log_prefactor,
        "budgets": list(law.budgets),
        "lack_of_fit": _plain(law.lack_of_fit),
        "bias_exponent": _plain(law.shift_exponent),
    }


def _gap(gap) -> dict[str, Any]:
    return {
        "objective": gap.objective,
        "reference": gap.reference,
        "at_budgets": [{"budget": c, "gap": _plain(e), "inside": inside} for c, e, inside in gap.at_budgets],
        "common": _plain(gap.common),
        "common_exponent": _plain(gap.common_exponent),
        "equal_exponents_p": _plain(gap.equal_p),
        "size_ratio": [{"budget": c, "ratio": _plain(e)} for c, e in gap.size_ratio],
        "size_ratio_of_laws": _plain(gap.size_ratio_law),
    }


def _cross_checks(fit: ObjectiveFit, next_budget: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if fit.envelope and fit.envelope.params_law:
        found["envelope"] = {
            "params_exponent": fit.envelope.params_law.exponent,
            "loss_exponent": fit.envelope.loss_law.exponent,
            "points": int(fit.envelope.used.sum()),
        }
    if surface := fit.parametric:
        found["parametric"] = {
            "params_exponent": surface.params_exponent,
            "tokens_exponent": surface.tokens_exponent,
            "params_exponent_stderr": surface.stderr[0] if surface.stderr else None,
            **{key: getattr(surface, key) for key in ("e", "log_a", "log_b", "alpha", "beta", "k")},
            "optima": [
                dict(zip(("budget", *QUANTITIES), (c, *surface.optimum(c)), strict=True))
                for c in [row.budget for row in fit.budgets] + ([next_budget] if next_budget else [])
            ],
        }
    return found


def _plain(value: Any) -> Any:
    """A value of dataclasses, arrays and numbers as JSON can hold it; what is not a number becomes None."""
    if isinstance(value, Estimate):
        interval = "unknown" if value.low is None else "95%" if value.bounded else "unbounded"
        return {key: _plain(getattr(value, key)) for key in ("value", "low", "high")} | {"interval": interval}
    if isinstance(value, LackOfFit) or dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer | np.bool_):
        return value.item()
    return value


def _csv(rows: Iterable[Mapping[str, Any]]) -> bytes:
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _cell_rows(results: Sequence[CellResult], analysis: Analysis) -> Iterable[dict[str, Any]]:
    fitted = {
        run.id: float(run.loss - residual)
        for fit in analysis.objectives.values()
        for row in fit.budgets
        if row.parabola
        for run, residual in zip(row.runs, row.parabola.residuals, strict=True)
    }
    for result in results:
        row = {
            field.name: getattr(result, field.name)
            for field in dataclasses.fields(result)
            if field.name not in ("loss_per_draw", "curve")
        }
        yield row | {"fitted_loss": fitted.get(result.id, "")}


def _optimum_rows(analysis: Analysis) -> Iterable[dict[str, Any]]:
    for fit in analysis.objectives.values():
        for row in fit.budgets:
            flat = {"objective": row.objective, "budget": row.budget, "sizes": row.sizes, "runs": len(row.runs)}
            for key in QUANTITIES:
                estimate = getattr(row, key) or Estimate(math.nan)
                for part in ("value", "low", "high"):
                    number = getattr(estimate, part)
                    flat[f"{key}_{part}"] = "" if number is None or math.isnan(number) else number
            yield flat | {
                "in_laws": row.usable,
                "bias_log_params": "" if row.shift_log_n is None else row.shift_log_n,
                "bias_loss": "" if row.shift_loss is None else row.shift_loss,
            }
