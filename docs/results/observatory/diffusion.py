"""What is known of N*, D* and L* of masked diffusion: the published laws and the fits, side by side at equal compute."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sources
from refits import Numbers, estimate, number

from diffusionlm import scaling
from diffusionlm.scaling.laws.analysis import Analysis
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.surface_fit import SurfaceFit

AT = (1e20, 1e21, 1e22)  # FLOPs at which laws are compared: within the data of SMDM and MDM-Prime-v2, and beyond
ORDER = ("smdm_mdm", "quokka", "gidd_mdm", "gidd_uniform")
LABELLED = 3 / 4  # of the parameters that MDM-Prime-v2's models have without embeddings, in the labels of its sizes
BOOTSTRAP = "approach2 method 1 (DeepSeek), parabola of log L, 10000 bootstraps of optima"


def published_rows(data: Path) -> list[Numbers]:
    """Return the published laws of discrete diffusion."""
    laws, rows = scaling.published_laws(), []
    for name in ORDER:
        law = laws[name]
        params, tokens = law.params_law or {}, law.tokens_law or {}
        row = {
            "name": name,
            "title": law.title,
            "objective": law.objective,
            "kind": "published",
            "range": list(law.fitted_range) if law.fitted_range else None,
            "a": {"value": params.get("exponent")},
            "b": {"value": tokens.get("exponent")} if tokens else None,
            "loss": {"value": law.loss_law["exponent"]} if law.loss_law else None,
            "at": [_at(c, law.params(c), law.tokens(c), law.loss(c)) for c in AT],
        }
        if name.startswith("gidd"):
            of = sources.published(data, "gidd", BOOTSTRAP, law.objective)
            row["flops_per_token"] = {key: of["flops_per_token_exponent"][key] for key in ("value", "low", "high")}
            row["b"] = {key: of["b"][key] for key in ("value", "low", "high")}
            row["loss"] = {key: of["loss_exponent"][key] for key in ("value", "low", "high")}
        rows.append(row)
    return rows


def _at(c: float, params: float | None, tokens: float | None, loss: float | None) -> Numbers:
    ratio = tokens / params if tokens and params else None
    return {
        "budget": c,
        "params": number(params),
        "tokens": number(tokens),
        "tokens_per_param": number(ratio),
        "loss": number(loss),
    }


def fitted_rows(name: str, title: str, fit: ObjectiveFit, at: Sequence[float] = AT) -> list[Numbers]:
    """Return the laws through our curves, and the surface, of masked diffusion models."""
    budgets = [row.budget for row in fit.budgets]
    base = {"name": name, "title": title, "objective": fit.objective, "range": [min(budgets), max(budgets)]}
    laws, rows = fit.laws, []
    rows.append(
        base
        | {
            "kind": "curves",
            "a": estimate(laws["params"].exponent),
            "b": estimate(laws["tokens"].exponent),
            "loss": estimate(laws["loss"].exponent),
            "at": [_at(c, *(laws[key].at(c).value for key in ("params", "tokens", "loss"))) for c in at],
        }
    )
    if fit.surface and fit.surface.determined:
        surface = fit.surface
        rows.append(
            base
            | {
                "kind": "surface",
                "a": estimate(surface.exponent),
                "b": {"value": number(surface.tokens_exponent)},
                "loss": None,
                "at": [_at(c, *surface.optimum(c)) for c in at],
            }
        )
    return rows


def cost_of_another_law(rows: Sequence[Numbers], surface: SurfaceFit) -> list[Numbers]:
    """Return what the size that each law names costs at `AT`, nats, if this surface is right."""
    costs = []
    for row in rows:
        for at in row["at"]:
            if at["params"] is None:
                continue
            c, n = at["budget"], at["params"]
            best = surface.optimum(c)
            loss = float(surface.loss(n, c / (surface.k * n))) - best[2]
            costs.append(
                {
                    "name": row["name"],
                    "kind": row["kind"],
                    "budget": c,
                    "params": n,
                    "factor": number(n / best[0]),
                    "nats": 0.0 if loss < 1e-9 else number(loss),  # the surface's own best size, but for rounding
                }
            )
    return costs


def recounted(fit: ObjectiveFit, c: float) -> float | None:
    """Return N* of MDM-Prime-v2's models at C FLOPs with all their weights but embeddings counted, in N and in C."""
    return number(fit.laws["params"].at(c * LABELLED).value / LABELLED)


def next_cells(analysis: Analysis) -> list[Numbers]:
    """Return the runs of masked diffusion that take most off the variance of log N* and of log L* one budget ahead."""
    fit = analysis.objectives["mdm"]
    chosen = []
    for key in ("loss_reduction", "params_reduction"):
        best = max(fit.candidates, key=lambda cell: getattr(cell, key) or 0.0)
        chosen.append(
            {
                "of": key.removesuffix("_reduction"),
                "budget": number(best.budget),
                "params": number(best.params),
                "kind": best.kind,
                "reduction": number(getattr(best, key)),
            }
        )
    return chosen


def separating(rows: Sequence[Mapping[str, Any]], surface: SurfaceFit, sd: float) -> Numbers:
    """Return the budget of the cells that tell the published laws apart, and how well they do.

    At a budget C the two laws that differ most name sizes that are a factor apart. A bowl with five sizes has log N* with
    the standard error sd / (c s), where c is the bowl's curvature and s depends on the sizes: here 1/4 to 4 of the best.
    """
    found = {}
    for c in AT:
        sizes = sorted(at["params"] for row in rows for at in row["at"] if at["budget"] == c and at["params"])
        n = surface.optimum(c)[0]
        step = math.log(2)
        around = [float(surface.loss(n * math.exp(u), c / (surface.k * n * math.exp(u)))) for u in (-step, 0, step)]
        curvature = (around[0] + around[2] - 2 * around[1]) / (2 * step**2)
        # Least squares of a parabola at u = -2, -1, 0, 1, 2 steps: the variance of b is sd^2 / sum u^2, and
        # log N* = -b / (2 c) at the middle.
        error = sd / math.sqrt(10 * step**2) / (2 * curvature)
        found[f"{c:.0e}"] = {
            "smallest": number(sizes[0]),
            "largest": number(sizes[-1]),
            "apart": number(sizes[-1] / sizes[0]),
            "log_apart": number(math.log(sizes[-1] / sizes[0])),
            "curvature": number(curvature),
            "stderr_log_n": number(error),
            "runs": 5,
            "sd": number(sd),
        }
    return found
