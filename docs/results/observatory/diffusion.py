"""What is known of N*, D* and L* of masked diffusion: the published laws and the fits, side by side."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sources
from refits import Numbers, estimate, number
from scipy import stats

from diffusionlm import scaling
from diffusionlm.scaling.laws.analysis import Analysis
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.surface_fit import SurfaceFit

AT = (1e20, 1e21, 1e22)  # FLOPs at which laws are compared: within the data of SMDM and MDM-Prime-v2, and beyond
ORDER = ("smdm_mdm", "quokka", "gidd_mdm", "gidd_uniform")
LABELLED = 3 / 4  # of the parameters that MDM-Prime-v2's models have without embeddings, in the labels of its sizes
SIZES, SUM_OF_SQUARES = 5, 10  # sizes of a bowl, and the sum of the squares of -2, -1, 0, 1 and 2
CHIP = 0.4 * 197e12  # FLOP/s of a v5e chip at 40% utilisation
LADDERS = (  # budgets of sweeps that could be run
    (1e18, 1e19, 1e20, 1e21),
    (1e18, 3e18, 1e19, 3e19, 1e20),
    (1e18, 3e18, 1e19, 3e19, 1e20, 3e20),
    (1e18, 3e18, 1e19, 3e19, 1e20, 3e20, 1e21),
)
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


def apart(rows: Sequence[Mapping[str, Any]]) -> list[Numbers]:
    """Return how far the laws differ in N* at each budget of `AT`."""
    found = []
    for c in AT:
        sizes = sorted(at["params"] for row in rows for at in row["at"] if at["budget"] == c and at["params"])
        low, high = sizes[0], sizes[-1]
        found.append({"budget": c, "smallest": number(low), "largest": number(high), "factor": number(high / low)})
    return found


def ladders(surface: SurfaceFit, sd: float, scatters: Mapping[str, float]) -> list[Numbers]:
    """Return what sweeps of one recipe would cost, and the half width of their 95% intervals of a.

    Each budget has `SIZES` sizes a factor of two apart around the best one. A parabola through them has
    log N* = -b / 2c with the variance sd^2 / (4 c^2 sum u^2), where c is the curvature there; a budget adds its own
    scatter. The interval is Student's, since the scatter has to be seen in the sweep itself.

    Args:
      surface: says how curved the loss is.
      sd: the noise of a run, nats.
      scatters: the random effect of a budget in log N*, by whose it is.
    """
    rows = []
    for budgets in LADDERS:
        variances = []
        for c in budgets:
            n, step = surface.optimum(c)[0], math.log(2)
            below, at, above = (
                float(surface.loss(n * math.exp(u), c / (surface.k * n * math.exp(u)))) for u in (-step, 0, step)
            )
            curvature = (below + above - 2 * at) / (2 * step**2)
            variances.append(sd**2 / (4 * curvature**2 * SUM_OF_SQUARES * step**2))
        log_c = np.log(budgets) - np.mean(np.log(budgets))
        total = SIZES * sum(budgets)
        row = {"budgets": list(budgets), "runs": SIZES * len(budgets), "flops": number(total)}
        row["chip_hours"] = number(total / CHIP / 3600)
        for name, scatter in scatters.items():
            variance = float(np.mean(variances)) + scatter**2
            quantile = float(stats.t.ppf(0.975, len(budgets) - 2))
            row[f"half_width_{name}"] = number(quantile * math.sqrt(variance / float(log_c @ log_c)))
        rows.append(row)
    return rows
