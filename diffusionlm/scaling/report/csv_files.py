"""The CSV files of a report: a row for each cell, and a row for each optimum."""

import csv
import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusionlm.scaling.laws.analysis import Analysis
from diffusionlm.scaling.laws.bootstrap import Estimate
from diffusionlm.scaling.laws.optima import QUANTITIES
from diffusionlm.scaling.sweep.results import LATER, CellResult

_OPTIMUM_COLUMNS = [
    *("objective", "budget", "sizes", "runs"),
    *(f"{key}_{part}" for key in QUANTITIES for part in ("value", "low", "high")),
    *("in_laws", "log_params_minus_parabola", "loss_minus_parabola"),
]


def cells_csv(results: Sequence[CellResult], analysis: Analysis) -> bytes:
    """Return cells.csv: what each cell measured, the loss that its curve fits, and why it was left out."""
    rows = list(_cell_rows(results, analysis))
    return _csv(list(rows[0]), rows)


def optima_csv(analysis: Analysis) -> bytes:
    """Return optima.csv: the optimum of each objective at each budget."""
    return _csv(_OPTIMUM_COLUMNS, list(_optimum_rows(analysis)))


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _cell_rows(results: Sequence[CellResult], analysis: Analysis) -> Iterator[dict[str, Any]]:
    fitted = {
        run.id: float(run.loss - residual)
        for fit in analysis.objectives.values()
        for row in fit.budgets
        if row.curve
        for run, residual in zip(row.runs, row.curve.residuals, strict=True)
    }
    unused = {name for name, default in LATER.items() if all(getattr(r, name) == default for r in results)}
    unused |= {"loss_per_draw", "curve"}
    names = [field.name for field in dataclasses.fields(CellResult) if field.name not in unused]
    reasons = {left.run.id: left.reason for left in analysis.left_out}
    for result in [*results, *(left.run for left in analysis.left_out)]:
        values = {name: getattr(result, name) for name in names}
        row = {name: "" if value != value else value for name, value in values.items()}  # NaN is not itself
        row["fitted_loss"] = fitted.get(result.id, "")
        yield row | ({"left_out": reasons.get(result.id, "")} if reasons else {})


def _optimum_rows(analysis: Analysis) -> Iterator[dict[str, Any]]:
    for fit in analysis.objectives.values():
        for row in fit.budgets:
            cells = {"objective": row.objective, "budget": row.budget, "sizes": row.sizes, "runs": len(row.runs)}
            for key in QUANTITIES:
                estimate = getattr(row.optimum, key, Estimate(math.nan))
                for part in ("value", "low", "high"):
                    number = getattr(estimate, part)
                    cells[f"{key}_{part}"] = "" if number is None or math.isnan(number) else number
            shifts = (row.optimum.shift_log_n, row.optimum.shift_loss) if row.optimum else (None, None)
            log_params, loss = ("" if shift is None else shift for shift in shifts)
            cells["in_laws"] = row.usable and bool(fit.laws)
            yield cells | {"log_params_minus_parabola": log_params, "loss_minus_parabola": loss}
