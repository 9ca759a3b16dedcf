"""Predicates for doubtful fits, what a budget lacks and misfits that noise cannot explain, and their words."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from diffusionlm.scaling.laws.misfit import LackOfFit
from diffusionlm.scaling.laws.noise import by_cell
from diffusionlm.scaling.laws.optima import BudgetFit

SUSPICIOUS = 0.05  # p value below which a misfit is mentioned
REJECTED = 0.01  # p value below which a parabola is not the curve of its budget, or one of its runs went wrong

SMALLEST = 1e-6  # p value below which the tails of no noise are known

SYMBOLS = {"params": "N*", "tokens": "D*", "loss": "L*"}

Lack = Literal["sizes", "equal", "smaller", "larger", "seeds"]
REASONS: dict[Lack, str] = {
    "sizes": "fewer than three sizes have finished, so finish those",
    "equal": "all losses are equal, so see that each run has its own",
    "smaller": "the smallest size is the best, so run smaller ones",
    "larger": "the largest size is the best, so run larger ones",
    "seeds": "the losses do not show which size is the best, so look for a run that went wrong, or run more seeds",
}


def p_words(p: float | None) -> str:
    """Return a p value in words, "p = 0.03" or "p < 1e-6"."""
    if p is None:
        return "p unknown"
    return f"p = {p:.2g}" if p >= SMALLEST else f"p {p_number(p)}"


def p_number(p: float) -> str:
    """Return a p value as tables show it, "0.03" or "< 1e-6"."""
    return f"{p:.2g}" if p >= SMALLEST else "< 1e-6"


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence, "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def budget_count(count: int) -> str:
    """Return a number of budgets in words."""
    return "1 budget" if count == 1 else f"{count} budgets"


def suspicious(misfit: LackOfFit | None) -> bool:
    """Return True if a misfit is larger than noise explains."""
    return misfit is not None and misfit.p is not None and misfit.p < SUSPICIOUS


def rejected(fit: BudgetFit) -> bool:
    """Return True if the residuals of a budget are too large to be noise about its parabola."""
    misfit = fit.optimum.lack_of_fit if fit.optimum else None
    return misfit is not None and misfit.p is not None and misfit.p < REJECTED


def outermost(fit: BudgetFit) -> Literal["smallest", "largest", ""]:
    """Return at which end of the grid the smallest mean loss of a budget is; "" if it is between the ends."""
    losses = {params: float(np.mean([run.loss for run in runs])) for (_, _, params), runs in by_cell(fit.runs).items()}
    best = min(losses, key=lambda params: losses[params])
    return "largest" if best == max(losses) else "smallest" if best == min(losses) else ""


def lack(fit: BudgetFit) -> Lack | None:
    """Return what a budget needs for an optimum that the laws can use; None if it has one."""
    if fit.parabola is None:
        return "sizes"
    if fit.usable:
        return None
    if len({run.loss for run in fit.runs}) == 1:
        return "equal"
    ends: dict[str, Lack] = {"smallest": "smaller", "largest": "larger", "": "seeds"}
    return ends[outermost(fit)]
