"""Rank candidate runs by how much they cut the prediction's variance, and by their cost.

The model is linearised at the fits. A run at a budget of the sweep adds a row to the curve of that budget, whose
minimum then has a smaller variance, and so has the law through the minima. A run at the next budget, where there is no
curve yet, measures L* + c (log N - log N*)^2 with the prediction as its prior (a Kalman update) and the curvature c
of the budgets below. The noise of a run cancels in all ratios, so no repeated seeds are needed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusionlm.scaling.laws.diagnostics import lack
from diffusionlm.scaling.laws.isoflop_fits import gls_weights
from diffusionlm.scaling.laws.noise import Noise, by_cell
from diffusionlm.scaling.laws.optima import BudgetFit, Optimum
from diffusionlm.scaling.laws.power_laws import Law
from diffusionlm.scaling.laws.suspects import Suspect

SUSPECTED = "suspected cell"
WORTH = 0.005  # the share of a variance below which a run settles nothing: it would show as 0%


@dataclass(frozen=True)
class Candidate:
    """One run that could be added."""

    objective: str
    budget: float  # FLOPs: its cost
    params: float
    kind: str  # repeat (of a size of the sweep), new size, next budget, or SUSPECTED: that cell once more
    # The shares of the variance of the next budget's log L* and log N* that it takes away; None without laws,
    # and of a suspected cell.
    loss_reduction: float | None
    params_reduction: float | None
    relative_cost: float  # its FLOPs over the next budget's


def candidates(
    optima: Sequence[Optimum], laws: Mapping[str, Law], next_budget: float, noise: Noise | None
) -> tuple[Candidate, ...]:
    """Return all candidates of one objective, first those that reduce the variance of the predicted L* most.

    Args:
      optima: the optima that `laws` go through.
      laws: the laws of the objective, by QUANTITIES.
      next_budget: the budget that is predicted, FLOPs.
      noise: the noise of a run, with which the random effects of the laws are compared.
    """
    step = float(np.median(np.concatenate([np.diff(optimum.sizes) for optimum in optima])))
    variances = functools.partial(_variances, optima=optima, laws=laws, next_budget=next_budget, noise=noise)
    before = variances([_design(optimum) for optimum in optima])
    ranked = _at_measured_budgets(optima, variances, before, next_budget, step)
    ranked += _at_next_budget(optima, laws, before, next_budget, step)
    return tuple(candidate for _, candidate in sorted(ranked, key=lambda item: -item[0]))


def _at_measured_budgets(
    optima: Sequence[Optimum],
    variances: Callable[[Sequence[np.ndarray]], np.ndarray],
    before: np.ndarray,
    next_budget: float,
    step: float,
) -> list[tuple[float, Candidate]]:
    """Return pairs of the reduction of Var log L* and a candidate at a budget of the sweep."""
    pairs = []
    for i, optimum in enumerate(optima):
        sizes = optimum.sizes
        new = [sizes[0] - step, *((sizes[1:] + sizes[:-1]) / 2), sizes[-1] + step]
        for log_n, kind in [*((x, "repeat") for x in sizes), *((x, "new size") for x in new)]:
            designs = [_design(other, log_n if j == i else None) for j, other in enumerate(optima)]
            reductions = 1 - variances(designs) / before
            pairs.append(_ranked(optimum.objective, optimum.budget, log_n, kind, reductions, next_budget))
    return pairs


def _at_next_budget(
    optima: Sequence[Optimum], laws: Mapping[str, Law], before: np.ndarray, next_budget: float, step: float
) -> list[tuple[float, Candidate]]:
    """Return pairs of the reduction of Var log L* and a candidate at the next budget."""
    log_n_star, log_loss = laws["params"].log_at(next_budget)[0], laws["loss"].log_at(next_budget)[0]
    loss, curvature = np.exp(log_loss), float(np.mean([optimum.curve.curvature for optimum in optima]))
    pairs = []
    for offset in step * np.arange(-2, 3):
        prior = np.diag(before)  # of (log L*, log N*), in units of the variance of a run
        observed = np.array([loss, -2 * curvature * offset])
        gain = prior @ observed / (observed @ prior @ observed + 1)
        reductions = gain * observed + 0.0  # no negative zero
        pairs.append(
            _ranked(optima[0].objective, next_budget, log_n_star + offset, "next budget", reductions, next_budget)
        )
    return pairs


def _ranked(
    objective: str, budget: float, log_n: float, kind: str, reductions: np.ndarray, next_budget: float
) -> tuple[float, Candidate]:
    loss, params = reductions.tolist()
    return loss, Candidate(objective, budget, float(np.exp(log_n)), kind, loss, params, budget / next_budget)


def towards_optima(fits: Sequence[BudgetFit], next_budget: float | None) -> tuple[Candidate, ...]:
    """Return, for each budget without an optimum, the run that its smallest measured loss points to.

    If the best size is at an edge of the grid, that is the size one spacing beyond the edge; if it is between the
    others, the best size once more.

    Args:
      fits: all budgets of one objective, which has no laws.
      next_budget: the unit of costs, FLOPs; None: each budget itself.
    """
    runs_to_add = []
    for fit in fits:
        need, sizes = lack(fit), np.unique(fit.log_n)
        if need in (None, "sizes", "equal"):
            continue
        step = float(np.median(np.diff(sizes)))
        best = min(by_cell(fit.runs).values(), key=lambda runs: float(np.mean([run.loss for run in runs])))
        log_n = {"smaller": sizes[0] - step, "larger": sizes[-1] + step}.get(need, np.log(best[0].params))
        kind = "repeat" if need == "seeds" else "new size"
        cost = fit.budget / (next_budget or fit.budget)
        runs_to_add.append(Candidate(fit.objective, fit.budget, float(np.exp(log_n)), kind, None, None, cost))
    return tuple(runs_to_add)


def repeats(suspects: Sequence[Suspect], objective: str, next_budget: float | None) -> tuple[Candidate, ...]:
    """Return suspected cells as runs to add: once more, each shows whether it went wrong.

    Args:
      suspects: cells of budgets, the worst first.
      objective: their objective.
      next_budget: the unit of costs, FLOPs; None: each budget itself.
    """
    return tuple(
        Candidate(objective, s.budget, s.params, SUSPECTED, None, None, s.budget / (next_budget or s.budget))
        for s in suspects
    )


def _design(optimum: Optimum, extra: float | None = None) -> np.ndarray:
    """Return the design matrix of a budget's curve, with one more run at log N = `extra`."""
    return optimum.curve.terms(optimum.log_n if extra is None else np.append(optimum.log_n, extra))


def _variances(
    designs: Sequence[np.ndarray],
    optima: Sequence[Optimum],
    laws: Mapping[str, Law],
    next_budget: float,
    noise: Noise | None,
) -> np.ndarray:
    """Return the variances of the predicted log L* and log N*, (2,), in units of the variance of a run.

    No run takes anything off the random effects of the budgets.
    """
    log_c = np.log([optimum.budget for optimum in optima])
    lines = np.vander(log_c - log_c.mean(), 2, increasing=True)
    ahead = np.array([1, np.log(next_budget) - log_c.mean()])
    variances = []
    for key, which in (("loss", 1), ("params", 0)):
        of_optima = np.array([_variance(*pair, which) for pair in zip(designs, optima, strict=True)])
        misfit = laws[key].lack_of_fit
        if noise and misfit:
            of_optima += (misfit.sd / noise.sd) ** 2
        weights = ahead @ gls_weights(lines, np.diag(of_optima))
        variances.append(weights**2 @ of_optima)
    return np.array(variances)


def _variance(design: np.ndarray, optimum: Optimum, which: int) -> float:
    """Return the variance of log N* (0) or log L* (1), in units of the variance of a run."""
    gradient = optimum.curve.gradients()[which]
    variance = float(gradient @ np.linalg.solve(design.T @ design, gradient))
    return variance / float(np.exp(2 * optimum.logs["loss"])) if which else variance
