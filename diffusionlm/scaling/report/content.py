"""The content of report.json: all numbers of an analysis as plain JSON types."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusionlm.scaling.laws.analysis import Analysis
from diffusionlm.scaling.laws.bootstrap import Estimate
from diffusionlm.scaling.laws.diagnostics import outermost
from diffusionlm.scaling.laws.gap import Gap
from diffusionlm.scaling.laws.loss_surface import LossSurface
from diffusionlm.scaling.laws.next_cells import SUSPECTED, WORTH, Candidate
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.optima import QUANTITIES, BudgetFit
from diffusionlm.scaling.laws.power_laws import Law
from diffusionlm.scaling.laws.roads import Roads
from diffusionlm.scaling.laws.shares import ShareFit


def to_json(analysis: Analysis) -> dict[str, Any]:
    """Return all numbers of an analysis.

    An estimate is {"value", "low", "high", "interval"}; interval is "95%", "unbounded" (the end that is null is
    infinite) or "unknown" (there is no noise estimate). Losses are in nats per token, compute in FLOPs.
    """
    objectives = analysis.objectives
    return {
        "verdict": analysis.verdict,
        "warnings": list(analysis.warnings),
        "noise": {name: _plain(fit.noise) for name, fit in objectives.items()},
        "optima": [_optimum(fit, row) for fit in objectives.values() for row in fit.budgets],
        "laws": {name: {key: _law(law) for key, law in fit.laws.items()} for name, fit in objectives.items()},
        "used_noise": {name: _plain(fit.used_noise) for name, fit in objectives.items()},
        "shapes": {name: _shape(fit) for name, fit in objectives.items()},
        "runs": {name: len(fit.runs) for name, fit in objectives.items()},
        "hanging": [name for name, fit in objectives.items() if fit.hanging],
        "suspects": {name: _plain(fit.suspects) for name, fit in objectives.items()},
        "unnamed_outliers": {name: fit.unnamed for name, fit in objectives.items()},
        "gaps": [_gap(gap) for gap in analysis.gaps],
        **({"roads": _roads(analysis.roads)} if analysis.roads else {}),
        "next_budget": analysis.next_budget,
        "predictions": {name: _plain(fit.prediction) for name, fit in objectives.items()},
        "next_cells": [cell for fit in objectives.values() for cell in _best_candidates(fit)],
        "paired_errors": [
            {"objective": row.objective, "budget": row.budget, **_plain(row.paired), "small": row.paired.small}
            for fit in objectives.values()
            for row in fit.budgets
            if row.paired
        ],
        "cross_checks": {name: _plain(_cross_checks(fit, analysis.next_budget)) for name, fit in objectives.items()},
    }


def _shape(fit: ObjectiveFit) -> dict[str, Any] | None:
    """Return the alpha and beta of the curves of one objective, with the central 95% of what they could be."""
    if fit.shape is None:
        return None
    names = ("alpha", "beta")
    ranges = dict(zip(names, fit.shape.ranges, strict=True))
    values = {key: {"value": getattr(fit.shape, key), "range": list(ranges[key])} for key in names}
    return _plain(values | {"scatter": fit.shape.scatter, "dof": fit.shape.dof})


def _best_candidates(fit: ObjectiveFit) -> list[dict[str, Any]]:
    """Return suspected cells and those that are best for something: L* or N*, in all or for their cost.

    Without laws all candidates are. Runs that settle nothing are not among them.
    """
    presets = {run.params: run.preset for row in fit.budgets for run in row.runs}
    best = {candidate: ["whether it went wrong"] for candidate in fit.candidates if candidate.kind == SUSPECTED}
    others = [candidate for candidate in fit.candidates if candidate not in best]
    if not fit.laws:
        best |= {candidate: ["an optimum at this budget"] for candidate in others}
        return [_candidate(candidate, presets, purposes) for candidate, purposes in best.items()]
    for name, field in (("L*", "loss_reduction"), ("N*", "params_reduction")):
        shares = {candidate: getattr(candidate, field) for candidate in others}
        shares = {candidate: share for candidate, share in shares.items() if share >= WORTH}
        if shares:
            best.setdefault(max(shares, key=lambda c: shares[c]), []).append(name)
            best.setdefault(max(shares, key=lambda c: shares[c] / c.relative_cost), []).append(f"{name} for its cost")
    return [_candidate(candidate, presets, purposes) for candidate, purposes in best.items()]


def _candidate(candidate: Candidate, presets: Mapping[int, str], best_for: Sequence[str]) -> dict[str, Any]:
    """Return a candidate with its purposes and the nearest size of the sweep, and on which side of all sizes it is."""
    nearest = min(presets, key=lambda params: abs(math.log(params / candidate.params)))
    side = ""
    if candidate.params < 0.99 * min(presets):  # the size of a repeat is rounded
        side = "smaller than "
    elif candidate.params > 1.01 * max(presets):
        side = "larger than "
    return dataclasses.asdict(candidate) | {"best_for": list(best_for), "nearest_preset": side + presets[nearest]}


def _optimum(fit: ObjectiveFit, row: BudgetFit) -> dict[str, Any]:
    optimum = row.optimum
    return {
        "objective": row.objective,
        "budget": row.budget,
        "sizes": row.sizes,
        "runs": len(row.runs),
        **{key: _plain(getattr(optimum, key, None)) for key in QUANTITIES},
        "tokens_per_parameter": _plain(optimum.tokens.value / optimum.params.value if optimum else None),
        "curvature": _plain(optimum.curve.curvature if optimum else None),
        "in_laws": row.usable and bool(fit.laws),
        "at_edge": optimum.at_edge if optimum else False,
        "best_size_is": outermost(row) or "between",
        "lack_of_fit": _plain(optimum.lack_of_fit if optimum else None),
        "log_params_minus_parabola": _plain(optimum.shift_log_n if optimum else None),
        "loss_minus_parabola": _plain(optimum.shift_loss if optimum else None),
    }


def _law(law: Law) -> dict[str, Any]:
    return {
        "exponent": _plain(law.exponent),
        "log_prefactor": law.fit.log_prefactor,
        "budgets": list(law.budgets),
        "lack_of_fit": _plain(law.lack_of_fit),
        "exponent_minus_parabola": _plain(law.shift_exponent),
        "without": [{"budget": c, "exponent": _plain(e)} for c, e in law.without],
    }


def _roads(roads: Roads) -> dict[str, Any]:
    """Return the best share of each budget, what it gains, how it moves with C, and what is known of each share."""
    return {
        "noise": _plain(roads.noise),
        "used_noise": _plain(roads.used_noise),
        "budgets": [_best_share(fit, roads) for fit in roads.budgets],
        "laws": {key: _law(law) for key, law in roads.laws.items()},
    }


def _best_share(fit: ShareFit, roads: Roads) -> dict[str, Any]:
    best = fit.best
    return {
        "budget": fit.budget,
        "runs": len(fit.runs),
        "distant": len(fit.distant),
        "share": _plain(best.share if best else None),
        **{key: _plain(getattr(best, key, None)) for key in QUANTITIES},
        "in_laws": bool(best and best.usable),
        "lack_of_fit": _plain(fit.lack_of_fit),
        "loss_minus": {name: _plain(dict(rows).get(fit.budget)) for name, rows in roads.differences.items()},
        "shares": _plain(fit.shares),
    }


def _gap(gap: Gap) -> dict[str, Any]:
    return {
        "objective": gap.objective,
        "reference": gap.reference,
        "at_budgets": [
            {"budget": c, "gap": _plain(e), "inside": inside, "extrapolated_by": beyond}
            for (c, e, inside), beyond in zip(gap.at_budgets, gap.extrapolations[0], strict=True)
        ],
        "at_own_budgets": [
            {"budget": c, "gap": _plain(e), "extrapolated_by": beyond}
            for (c, e), beyond in zip(gap.at_own, gap.extrapolations[1], strict=True)
        ],
        # Where equal exponents are rejected, no single number is the gap.
        "common": _plain(gap.common) if gap.parallel else None,
        "common_exponent": _plain(gap.common_exponent) if gap.parallel else None,
        "equal_exponents_p": _plain(gap.equal_p),
        "size_ratio": [{"budget": c, "ratio": _plain(e)} for c, e in gap.size_ratio],
        "size_ratio_of_laws": _plain(gap.size_ratio_law),
    }


def _cross_checks(fit: ObjectiveFit, next_budget: float | None) -> dict[str, Any]:
    checks: dict[str, Any] = {}
    if fit.envelope and fit.envelope.params_law and fit.envelope.loss_law:
        checks["envelope"] = {
            "params_exponent": fit.envelope.params_law.exponent,
            "loss_exponent": fit.envelope.loss_law.exponent,
            "points": int(fit.envelope.used.sum()),
        }
    if surface := fit.parametric:
        checks["parametric"] = {
            "params_exponent": surface.params_exponent,
            "tokens_exponent": surface.tokens_exponent,
            "determined": surface.determined,
            "params_exponent_stderr": surface.stderr[0],
            **{key: getattr(surface, key) for key in ("e", "log_a", "log_b", "alpha", "beta", "k")},
            "optima": _surface_optima(surface, [row.budget for row in fit.budgets], next_budget),
        }
    if projected := fit.surface:
        checks["surface"] = {
            "params_exponent": _plain(projected.exponent),
            "determined": projected.determined,
            "scatter": projected.scatter,
            **{key: getattr(projected, key) for key in ("e", "log_a", "log_b", "alpha", "beta", "k")},
            "optima": _surface_optima(projected, [row.budget for row in fit.budgets], next_budget),
        }
    return checks


def _surface_optima(surface: LossSurface, budgets: Sequence[float], next_budget: float | None) -> list[dict[str, Any]]:
    compute = [*budgets, next_budget] if next_budget else budgets
    with np.errstate(all="ignore"):  # a fit that diverged has no optimum
        return [_plain(dict(zip(("budget", *QUANTITIES), (c, *surface.optimum(c)), strict=True))) for c in compute]


def _plain(value: Any) -> Any:
    """Return dataclasses, arrays and numbers as JSON types; a number that is not finite becomes None."""
    if isinstance(value, Estimate):
        interval = "95%" if value.bounded else "unbounded" if value.interval else "unknown"
        return {key: _plain(getattr(value, key)) for key in ("value", "low", "high")} | {"interval": interval}
    if dataclasses.is_dataclass(value):
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
