"""The report of a sweep: one page that stands alone, its pictures, two tables and the numbers, from results alone."""

import csv
import dataclasses
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from etils import epath

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import checks
from diffusionlm.scaling.laws import published as laws
from diffusionlm.scaling.laws.analysis import Analysis, ObjectiveFit, analyse
from diffusionlm.scaling.laws.design import Candidate
from diffusionlm.scaling.laws.misfit import LackOfFit
from diffusionlm.scaling.laws.optima import QUANTITIES, BudgetFit
from diffusionlm.scaling.laws.parametric import Parametric
from diffusionlm.scaling.laws.uncertainty import Estimate
from diffusionlm.scaling.report import page, plots
from diffusionlm.scaling.sweep.recipe import Cell, ScalingRecipe, Sweep
from diffusionlm.scaling.sweep.results import CellResult, at_once
from diffusionlm.scaling.sweep.results import as_json as results_as_json
from diffusionlm.storage import run_path, write_atomically

__all__ = ["analyse", "as_json", "describe", "write"]

PICTURES = ("isoflop.png", "laws.png", "gap.png", "residuals.png", "envelope.png")


def write(
    results: Sequence[CellResult],
    directory: str | os.PathLike,
    *,
    title: str,
    convention: str,
    overlay: Sequence[str] = (),
    incomplete: int = 0,
    context: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
    note: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Writes report.html, report.json, results.json, two CSV files and PNG files; each is there whole or not at all.

    Args:
      results: of the finished cells.
      directory: where to; made if missing, and the files of an earlier report are replaced.
      title: of the page.
      convention: what N and C count, in a sentence for the page.
      overlay: names of published laws to draw, as in `laws.names()`.
      incomplete: planned cells that have not finished, to be told.
      context: what was measured, a table of the page, as `describe` makes it.
      warnings: more of them, for instance of the data, above all others.
      note: is called with what begins, for progress.

    Returns:
      What report.json holds.

    Raises:
      UserError: no finished cell, an unknown law, matplotlib missing, or a directory that cannot be written.
    """
    published = [laws.get(name) for name in overlay]
    analysis = analyse(results, note=note)
    more = list(warnings)
    if incomplete:
        more.insert(0, f"the sweep is incomplete: {incomplete} planned cells have not finished, {len(results)} have")
    analysis = dataclasses.replace(analysis, warnings=(*more, *analysis.warnings))
    note("drawing plots")
    pictures = plots.render(analysis, published)
    content = as_json(analysis) | {
        "title": title,
        "context": dict(context or {}) | {"counts": convention},
        "convention": convention,
        "cells": len(results),
        "incomplete": incomplete,
        "overlay": {law.name: law.source for law in published},
    }
    files = pictures | {
        "cells.csv": _csv(_cell_rows(results, analysis)),
        "optima.csv": _csv(_optimum_rows(analysis)),
        "results.json": results_as_json(results).encode(),
        "report.json": (json.dumps(content, indent=1, allow_nan=False) + "\n").encode(),
        "report.html": page.render(analysis, content, pictures, published).encode("ascii", "xmlcharrefreplace"),
    }
    target = run_path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in set(PICTURES) - set(pictures):  # of an earlier report that had more to show
            (target / name).unlink(missing_ok=True)
        for name, data in files.items():  # the page last: who sees it sees files that belong to it
            write_atomically(target / name, data)
    except OSError as error:
        raise UserError(f"cannot write the report to {str(directory)!r}: {error.strerror or error}") from error
    return content


def as_json(analysis: Analysis) -> dict[str, Any]:
    """All numbers of an analysis with plain types, as report.json has them.

    An estimate is {"value", "low", "high", "interval"}; interval is "95%", "unbounded" (the end that is null is
    infinite) or "unknown" (no noise estimate). Losses are nats per token, compute is in FLOPs.
    """
    objectives = analysis.objectives
    return {
        "verdict": analysis.verdict,
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
        "cross_checks": {name: _plain(_cross_checks(fit, analysis.next_budget)) for name, fit in objectives.items()},
    }


def best_candidates(fit: ObjectiveFit) -> list[dict[str, Any]]:
    """The next cells that are best at something: for L* and for N*, in all and for their cost; without laws, all.

    Each says what it is `best_for`, and which size of the sweep is nearest to it.
    """
    purposes = {
        "L*": lambda c: c.loss_reduction,
        "L* for its cost": lambda c: c.loss_reduction / c.relative_cost,
        "N*": lambda c: c.params_reduction,
        "N* for its cost": lambda c: c.params_reduction / c.relative_cost,
    }
    presets = {run.params: run.preset for row in fit.budgets for run in row.runs}
    if not fit.laws:
        return [_named(candidate, presets, ["an optimum at this budget"]) for candidate in fit.candidates]
    best: dict[Candidate, list[str]] = {}
    for purpose, key in purposes.items():
        if fit.candidates:
            best.setdefault(max(fit.candidates, key=key), []).append(purpose)
    return [_named(candidate, presets, purpose) for candidate, purpose in best.items()]


def _named(candidate: Candidate, presets: Mapping[int, str], purpose: Sequence[str]) -> dict[str, Any]:
    nearest = min(presets, key=lambda params: abs(math.log(params / candidate.params)))
    # A size that no budget has is named as such; rounding aside, a repeat is at one that is there.
    side = "smaller than " if candidate.params < 0.99 * min(presets) else ""
    side = "larger than " if candidate.params > 1.01 * max(presets) else side
    return dataclasses.asdict(candidate) | {"best_for": list(purpose), "nearest_preset": side + presets[nearest]}


def describe(
    sweep: Sweep, cells: Sequence[Cell], workdir: os.PathLike, identity: Mapping[str, Any], today: str = ""
) -> tuple[dict[str, str], list[str]]:
    """What a sweep measured, for a reader who has only the page, and warnings of its data.

    Args:
      sweep: that is reported.
      cells: those of its cells that the report is about, finished or not.
      workdir: its directory.
      identity: content of sweep.json.
      today: the date; empty: that of the clock.

    Returns:
      Rows of a table, and lines.
    """
    sizes = sorted({(cell.params, cell.preset) for cell in cells})
    budgets = sorted({cell.budget for cell in cells})
    seeds = sorted({cell.seed for cell in cells})
    every = len({(c.objective, c.preset, c.budget) for c in cells}) * len(seeds) == len(cells)
    rows = {
        "sweep": sweep.name,
        "objectives": ", ".join(sorted({cell.objective for cell in cells})),
        "model sizes N": f"{len(sizes)}, from {sizes[0][1]} ({sizes[0][0]:,} parameters) to {sizes[-1][1]} "
        f"({sizes[-1][0]:,})",
        "budgets C": f"{len(budgets)}: {', '.join(f'{budget:.3g}' for budget in budgets)} FLOPs",
        "seeds": ", ".join(map(str, seeds)) + ("" if every or len(seeds) == 1 else " (not all of them in every cell)"),
    }
    recipes: dict[ScalingRecipe, list[str]] = {}
    for cell in cells:
        recipes.setdefault(cell.recipe, []).append(cell.objective)
    for recipe, objectives in recipes.items():
        whose = f" of {recipe.name} ({', '.join(sorted(set(objectives)))})" if len(recipes) > 1 else ""
        rows |= {f"{key}{whose}": value for key, value in _describe_recipe(recipe).items()}
    rows["dataset"] = f"sha256 {identity.get('dataset', 'unknown')}"
    rows["training text"] = f"{identity['unique_tokens']:,} different tokens"
    lines = []
    scored = [found for found in at_once(lambda cell: _scored(run_path(workdir) / "cells" / cell.id), cells) if found]
    if scored:
        tokens, size = min(scored)
        rows["held-out text, scored"] = f"{tokens:,} tokens, {size:,} bytes of text"
        length = next(iter(recipes)).sequence_length  # the same in all cells of a sweep
        records, asked = tokens / (length - 1), max(recipe.eval_records for recipe in recipes)
        if records < asked:
            lines.append(
                f"losses are of {records:,.0f} of {asked:,} held-out records that the recipe asks for; how much the "
                "choice of so little text matters is in no interval"
            )
    rows["date of this report"] = today or datetime.now(UTC).date().isoformat()
    return rows, lines


def _describe_recipe(recipe: ScalingRecipe) -> dict[str, str]:
    schedule = (
        "constant" if recipe.schedule == "constant" else f"cosine, to {100 * recipe.final_lr_ratio:g}% of the peak"
    )
    by_width = f" at width {recipe.lr_width}, times (width / {recipe.lr_width})^{recipe.lr_exponent:g}"
    decayed = "matrices" if recipe.decay_mask == "matrices" else "all parameters"
    rows = {
        "batch": f"{recipe.batch_size} sequences of {recipe.sequence_length} tokens a step",
        "peak learning rate": f"{recipe.peak_lr:g}" + (by_width if recipe.lr_width else " at every width"),
        "schedule": schedule,
        "warm-up": f"{recipe.warmup_steps} steps, or {100 * recipe.warmup_fraction:g}% of all if that is more, but at "
        "most a quarter",
        "weight decay": f"{recipe.weight_decay:g} on {decayed}",
        "dtype": recipe.dtype,
        "evaluation": f"{recipe.eval_records:,} held-out records at most, {recipe.eval_draws} noise draws of each for "
        "mdm, one pass for arm",
    }
    if recipe.random_length:
        rows["random length"] = f"{100 * recipe.random_length:g}% of the sequences of mdm"
    return rows


def _scored(directory: epath.Path) -> tuple[int, int] | None:
    """Tokens and bytes of the held-out text that a finished cell was scored on."""
    try:
        found = json.loads((directory / "DONE.json").read_text())["eval"]
        return int(found["tokens"]), int(found["bytes"])
    except (OSError, ValueError, KeyError, TypeError):  # not finished, or an older file
        return None


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
        "best_size_is": checks.outermost(row) or "between",
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
        "without": [{"budget": c, "exponent": _plain(e)} for c, e in law.without],
    }


def _gap(gap) -> dict[str, Any]:
    return {
        "objective": gap.objective,
        "reference": gap.reference,
        "at_budgets": [
            {"budget": c, "gap": _plain(e), "inside": inside, "extrapolated_by": beyond}
            for (c, e, inside), beyond in zip(gap.at_budgets, gap.beyond[0], strict=True)
        ],
        "at_own_budgets": [
            {"budget": c, "gap": _plain(e), "extrapolated_by": beyond}
            for (c, e), beyond in zip(gap.at_own, gap.beyond[1], strict=True)
        ],
        # One number for all budgets is none where the exponents are told apart.
        "common": _plain(gap.common) if gap.parallel else None,
        "common_exponent": _plain(gap.common_exponent) if gap.parallel else None,
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
            "determined": surface.determined,
            "params_exponent_stderr": surface.stderr[0] if surface.stderr else None,
            **{key: getattr(surface, key) for key in ("e", "log_a", "log_b", "alpha", "beta", "k")},
            "optima": _surface_optima(surface, [row.budget for row in fit.budgets], next_budget),
        }
    return found


def _surface_optima(surface: Parametric, budgets: Sequence[float], next_budget: float | None) -> list[dict[str, Any]]:
    found = []
    with np.errstate(all="ignore"):  # a fit that diverged has none
        for c in [*budgets, *([next_budget] if next_budget else [])]:
            found.append(_plain(dict(zip(("budget", *QUANTITIES), (c, *surface.optimum(c)), strict=True))))
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
