"""Which cell to run next: what one more run would take off the variance of the prediction, for what it costs.

The model is linearised at the fits. A run at a budget that is there adds a row to the parabola of that budget, whose
minimum then has a smaller variance, and so has the law through the minima. A run at the next budget, where there is no
parabola yet, measures L* + c (log N - log N*)^2 with the prediction as its prior (a Kalman update) and the curvature c
of the budgets below. The noise of a run scales out of all ratios, so no repeated seeds are needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusionlm.scaling.laws import checks, uncertainty
from diffusionlm.scaling.laws.fit import gls_weights
from diffusionlm.scaling.laws.optima import BudgetFit
from diffusionlm.scaling.laws.power_laws import Law


@dataclass(frozen=True)
class Candidate:
    """One run that could be added."""

    objective: str
    budget: float  # FLOPs: its cost
    params: float
    kind: str  # repeat (of a size that is there), new size, next budget
    # share of the variance of the next budget's log L* that it takes away, and of log N*; None without laws
    loss_reduction: float | None
    params_reduction: float | None
    relative_cost: float  # its FLOPs over the next budget's


def candidates(rows: Sequence[BudgetFit], laws: Mapping[str, Law], next_budget: float) -> tuple[Candidate, ...]:
    """All candidates of one objective, those first that reduce the variance of the predicted L* most.

    Args:
      rows: the budgets that `laws` go through.
      laws: of the objective.
      next_budget: that is predicted, FLOPs.
    """
    before = _variances([_design(row) for row in rows], rows, next_budget)
    found = []
    step = float(np.median(np.concatenate([np.diff(np.unique(row.log_n)) for row in rows])))
    for i, row in enumerate(rows):
        sizes = np.unique(row.log_n)
        new = [sizes[0] - step, *((sizes[1:] + sizes[:-1]) / 2), sizes[-1] + step]
        for log_n, kind in [*((x, "repeat") for x in sizes), *((x, "new size") for x in new)]:
            designs = [_design(row, log_n if j == i else None) for j, row in enumerate(rows)]
            after = _variances(designs, rows, next_budget)
            reductions = 1 - after / before
            found.append(_candidate(row.objective, row.budget, log_n, kind, reductions, next_budget))
    log_n_star, log_loss = laws["params"].log_at(next_budget)[0], laws["loss"].log_at(next_budget)[0]
    loss, curvature = np.exp(log_loss), float(np.mean([row.parabola.coefficients[2] for row in rows]))
    for offset in step * np.arange(-2, 3):
        prior = np.diag(before)  # of (log L*, log N*), over the variance of a run
        observed = np.array([loss, -2 * curvature * offset])
        gain = prior @ observed / (observed @ prior @ observed + 1)
        reductions = gain * observed
        found.append(
            _candidate(
                rows[0].objective, next_budget, log_n_star + offset, "next budget", reductions + 0.0, next_budget
            )
        )
    return tuple(sorted(found, key=lambda candidate: -candidate.loss_reduction))


def towards_optima(rows: Sequence[BudgetFit], next_budget: float | None) -> tuple[Candidate, ...]:
    """Without laws: for each budget that lacks an optimum, the run that the smallest measured loss points to.

    That is the size one spacing of the grid beyond the edge, where the best size is at the edge, and the best size once
    more where it is between the others.

    Args:
      rows: all budgets of one objective.
      next_budget: the unit of costs, FLOPs; None: the budget itself.
    """
    found = []
    for row in rows:
        lack, sizes = checks.state(row), np.unique(row.log_n)
        if lack in ("", "sizes"):
            continue
        step = float(np.median(np.diff(sizes)))
        best = min(uncertainty.by_cell(row.runs).values(), key=lambda runs: np.mean([run.loss for run in runs]))
        log_n = {"smaller": sizes[0] - step, "larger": sizes[-1] + step}.get(lack, np.log(best[0].params))
        kind = "repeat" if lack == "seeds" else "new size"
        cost = row.budget / (next_budget or row.budget)
        found.append(Candidate(row.objective, row.budget, float(np.exp(log_n)), kind, None, None, cost))
    return tuple(found)


def _candidate(
    objective: str, budget: float, log_n: float, kind: str, reductions: np.ndarray, next_budget: float
) -> Candidate:
    of_loss, of_params = reductions.tolist()
    return Candidate(objective, budget, float(np.exp(log_n)), kind, of_loss, of_params, budget / next_budget)


def _design(row: BudgetFit, extra: float | None = None) -> np.ndarray:
    log_n = row.log_n if extra is None else np.append(row.log_n, extra)
    return np.vander(log_n - row.parabola.centre, 3, increasing=True)


def _variances(designs: Sequence[np.ndarray], rows: Sequence[BudgetFit], next_budget: float) -> np.ndarray:
    """Of the predicted log L* and log N*, over the variance of a run."""
    of_loss, of_params = [], []
    for design, row in zip(designs, rows, strict=True):
        b, c = row.parabola.coefficients[1:]
        u = -b / (2 * c)
        unscaled = np.linalg.inv(design.T @ design)
        at_minimum, slope = np.array([1, u, u**2]), np.array([0, 1, 2 * u]) / (2 * c)
        of_loss.append(at_minimum @ unscaled @ at_minimum / np.exp(2 * row.logs["loss"]))
        of_params.append(slope @ unscaled @ slope)
    log_c = np.log([row.budget for row in rows])
    lines = np.vander(log_c - log_c.mean(), 2, increasing=True)
    ahead = np.array([1, np.log(next_budget) - log_c.mean()])
    variances = []
    for of_minima in (of_loss, of_params):
        weights = ahead @ gls_weights(lines, np.diag(of_minima))
        variances.append(weights**2 @ of_minima)
    return np.array(variances)
