"""The fits of the observatory as plain numbers: exponents, gaps, predictions of what was held out, and bias."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import sources
from scipy import stats

from diffusionlm.scaling.laws import held_out
from diffusionlm.scaling.laws.analysis import Analysis, analyse
from diffusionlm.scaling.laws.bootstrap import Estimate
from diffusionlm.scaling.laws.gap import Gap
from diffusionlm.scaling.laws.isoflop_fits import parabola, power_law
from diffusionlm.scaling.laws.noise import NoiseOption
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.surface_fit import fit_surface
from diffusionlm.scaling.sweep.results import CellResult

FAR = 1e24  # FLOPs to which exact surfaces are extrapolated, a thousand times their largest budget
Numbers = dict[str, Any]


def number(value: float | None) -> float | None:
    """Return a number to six digits; None for what is unknown or unbounded, which strict JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def estimate(value: Estimate | None) -> Numbers | None:
    """Return an estimate and the ends of its interval; an end that is unknown or unbounded is None."""
    if value is None:
        return None
    return {key: number(end) for key, end in asdict(value).items()}


def plain(runs: Sequence[CellResult]) -> Numbers:
    """Fit Approach 2 as it is usually done: parabolas through all runs of each budget, and a line without weights.

    Vertices outside the sizes of their budget are left out, as is usual too.
    """
    budgets = defaultdict(list)
    for run in runs:
        if not math.isnan(run.budget):
            budgets[run.budget].append(run)
    log_c, log_n = [], []
    for budget, members in sorted(budgets.items()):
        sizes = np.log([run.params for run in members])
        if len(np.unique(sizes)) < 3:
            continue
        fit = parabola(sizes, [run.loss for run in members])
        if fit.convex and sizes.min() <= fit.log_n <= sizes.max():
            log_c.append(math.log(budget))
            log_n.append(fit.log_n)
    if len(log_c) < 2:
        return {"value": None, "optima": len(log_c), "budgets": len(budgets)}
    law = power_law(log_c, log_n)
    far = float(law(FAR))
    return {"value": number(law.exponent), "optima": len(log_c), "budgets": len(budgets), "params_far": number(far)}


def line(log_c: np.ndarray, log_y: np.ndarray) -> Numbers:
    """Fit a line through published optima, with Student's interval from their scatter."""
    fit = stats.linregress(log_c, log_y)
    half = float(stats.t.ppf(0.975, len(log_c) - 2) * fit.stderr)
    return {"value": number(fit.slope), "low": number(fit.slope - half), "high": number(fit.slope + half)}


def exponents(name: str, title: str, fit: ObjectiveFit, published: Numbers | None) -> Numbers:
    """Return a row of the table of exponents."""
    law, surface = fit.laws.get("params"), fit.surface
    used = fit.used_noise
    row = {
        "name": name,
        "title": title,
        "objective": fit.objective,
        "runs": len(fit.runs),
        "budgets": len(fit.budgets),
        "range": [number(end) for end in _range(fit)],
        "noise": None if used is None else {"sd": number(used.sd), "source": used.source},
        "published": published,
        "plain": plain(fit.runs),
        "plain_same": None,
        "curves": None,
        "surface": None,
        "hanging": fit.hanging,
        "suspects": len(fit.suspects),
    }
    if law:
        # Other budgets are another line, whatever the curves are.
        row["plain_same"] = plain([run for run in fit.runs if run.budget in law.budgets])
        row["curves"] = (estimate(law.exponent) or {}) | {
            "optima": len(law.budgets),
            "effect": number(law.lack_of_fit.sd) if law.lack_of_fit else None,
            "p": number(law.lack_of_fit.p) if law.lack_of_fit else None,
        }
    if surface:
        about_curves = fit.shape.scatter if fit.shape else None
        row["surface"] = (estimate(surface.exponent) or {}) | {
            "scatter": number(surface.scatter),
            "of_curves": number(about_curves),
            "ratio": number(surface.scatter / about_curves) if about_curves else None,
            "determined": surface.determined,
        }
    return row


def _range(fit: ObjectiveFit) -> tuple[float, float]:
    flops = [row.budget for row in fit.budgets] or [run.flops for run in fit.runs]
    return min(flops), max(flops)


def optima_exponents(data: Path) -> list[Numbers]:
    """Fit lines through the optima of sources that published no runs."""
    rows = []
    for file in sources.OPTIMA:
        series = defaultdict(list)
        for row in sources.rows(data, file):
            series[row["source"], row["objective"], row["corpus"]].append(row)
        for (source, objective, corpus), members in series.items():
            log_c, log_n = (np.log([float(row[key]) for row in members]) for key in ("budget_flops", "params"))
            of_loss = line(log_c, np.log([float(row["loss"]) for row in members])) if members[0]["loss"] else None
            stated = sources.exponent(data, source, objective)
            if source == "evo":
                stated = sources.published(data, f"evo:{corpus}", "approach2", objective).get("a")
            rows.append(
                {
                    "name": source if source != "evo" else f"{source} {corpus}",
                    "objective": objective,
                    "optima": len(members),
                    "range": [number(float(np.exp(end))) for end in (log_c.min(), log_c.max())],
                    "published": stated,
                    "line": line(log_c, log_n),
                    "loss": of_loss,
                }
            )
    return rows


def law_numbers(fit: ObjectiveFit, budgets: Sequence[float]) -> Numbers:
    """Return the exponents of all three laws of an objective, and their values at budgets."""
    return {
        key: {
            "exponent": estimate(law.exponent),
            "at": [
                {"budget": c, **(estimate(law.at(c)) or {}), "beyond": number(law.extrapolation(c))} for c in budgets
            ],
        }
        for key, law in fit.laws.items()
    }


def twins(name: str, analysis: Analysis) -> list[Numbers]:
    """Return the gaps of one experiment that trained both objectives alike."""
    hanging = {objective for objective, fit in analysis.objectives.items() if fit.hanging}
    return [_gap(name, gap) | {"hanging": sorted({gap.objective, gap.reference} & hanging)} for gap in analysis.gaps]


def _gap(name: str, gap: Gap) -> Numbers:
    return {
        "name": name,
        "objective": gap.objective,
        "reference": gap.reference,
        "common": estimate(gap.common),
        "equal_p": number(gap.equal_p),
        "at_budgets": [{"budget": c, **(estimate(g) or {}), "measured": inside} for c, g, inside in gap.at_budgets],
        "at_own": [
            {"budget": c, **(estimate(g) or {}), "beyond": number(far)}
            for (c, g), far in zip(gap.at_own, gap.extrapolations[1], strict=True)
        ],
        "size_ratio": [{"budget": c, **(estimate(r) or {})} for c, r in gap.size_ratio],
        "size_ratio_law": estimate(gap.size_ratio_law),
    }


def gap_of_optima(data: Path) -> Numbers:
    """Return the gap of SMDM's published optima: two parallel lines of log L* in log C, with the delta method."""
    members = sources.rows(data, "smdm_optima")
    first = np.array([row["objective"] == "mdm" for row in members])
    log_c, log_n, log_l = (np.log([float(row[k]) for row in members]) for k in ("budget_flops", "params", "loss"))
    design = np.stack([first, ~first, log_c - log_c.mean()], 1).astype(float)
    theta, squares, *_ = np.linalg.lstsq(design, log_l, rcond=None)
    dof = len(log_l) - 3
    covariance = float(squares[0]) / dof * np.linalg.inv(design.T @ design)
    log_gap = (theta[0] - theta[1]) / -theta[2]
    gradient = np.array([-1 / theta[2], 1 / theta[2], -log_gap / theta[2]])
    half = stats.t.ppf(0.975, dof) * math.sqrt(gradient @ covariance @ gradient)
    ratios = log_n[first] - log_n[~first]
    spread = stats.t.ppf(0.975, len(ratios) - 1) * ratios.std(ddof=1) / math.sqrt(len(ratios))
    ends = {"low": -1, "high": 1}
    common = {"value": number(math.exp(log_gap))} | {k: number(math.exp(log_gap + s * half)) for k, s in ends.items()}
    ratio = {"value": number(math.exp(ratios.mean()))}
    ratio |= {k: number(math.exp(ratios.mean() + s * spread)) for k, s in ends.items()}
    row = {"name": "smdm", "objective": "mdm", "reference": "arm", "common": common, "size_ratio_law": ratio}
    return row | {"equal_p": None, "at_budgets": [], "at_own": [], "size_ratio": [], "hanging": []}


def largest_left_out(name: str, runs: Sequence[CellResult], noise: NoiseOption) -> list[Numbers]:
    """Predict the optimum of the largest budget from the others; see `held_out.largest_budget`."""
    found = held_out.largest_budget(runs, noise=noise)
    return [_held_out(name, row) for row in found if row.quantity != "tokens"]  # D* is C over N*


def larger_runs(
    name: str, runs: Sequence[CellResult], later: Sequence[CellResult], noise: NoiseOption
) -> list[Numbers]:
    """Predict runs that are larger than all that are fitted; see `held_out.larger_runs`."""
    return [_held_out(name, row) for row in held_out.larger_runs(runs, later, noise=noise)]


def _held_out(name: str, row: held_out.HeldOut) -> Numbers:
    return {
        "name": name,
        "objective": row.objective,
        "budget": number(row.budget),
        "quantity": row.quantity,
        "method": row.method,
        "predicted": estimate(row.predicted),
        "measured": number(row.measured),
        "holds": row.holds,
    }


def bias(name: str, truth: Numbers, runs: Sequence[CellResult]) -> Numbers:
    """Return the errors of Approach 2, of our curves and of the surface on exact losses: of a, and of N* at `FAR`."""
    fit = analyse(runs, noise=sources.RESIDUALS, draws=100, full=False).objectives["arm"]
    of_plain = plain(runs)
    log_g = math.log(truth["alpha"] * truth["A"] / (truth["beta"] * truth["B"])) / (truth["alpha"] + truth["beta"])
    a = truth["beta"] / (truth["alpha"] + truth["beta"])
    params = math.exp(log_g + a * math.log(FAR / 6))
    surface = fit.surface
    values = {
        "plain": (of_plain["value"], of_plain["params_far"]),
        "curves": (fit.laws["params"].exponent.value, fit.laws["params"].at(FAR).value),
        "surface": (surface.exponent.value, math.exp(surface.log_params(FAR))) if surface else (None, None),
    }
    row = {"name": name, "a": number(a)}
    for method, (value, far) in values.items():
        errors = value - a, far / params - 1
        # Below a millionth an error is that of rounding in the file, and differs between machines.
        row[method] = {
            key: 0.0 if abs(error) < 1e-4 else number(error)
            for key, error in zip(("exponent", "params_far"), errors, strict=True)
        }
    return row


def analysed(runs: Sequence[CellResult], noise: NoiseOption, *, full: bool = False) -> Analysis:
    """Fit one experiment, with the profile interval of its surface's exponent, which is otherwise a part of `full`."""
    analysis = analyse(runs, noise=noise, full=full)
    if full:
        return analysis
    fits = {name: replace(fit, surface=fit_surface(fit.runs, fit.noise)) for name, fit in analysis.objectives.items()}
    return replace(analysis, objectives=fits)
