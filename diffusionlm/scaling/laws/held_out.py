"""Do the intervals hold? What a part of the runs predicts of the others, with prediction intervals.

Two questions are asked. Without its largest budget, what do the laws of a sweep say of the optimum there, and does what
is then measured lie inside? And what does the surface through some runs say of runs that are larger than all of them?
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.arguments import check_runs
from diffusionlm.scaling.laws.bootstrap import CONFIDENCE, Estimate
from diffusionlm.scaling.laws.noise import NoiseOption
from diffusionlm.scaling.laws.optima import QUANTITIES
from diffusionlm.scaling.laws.power_laws import Law, law_estimate
from diffusionlm.scaling.sweep.results import CellResult


@dataclass(frozen=True)
class HeldOut:
    """One number that was predicted, and what was then measured."""

    objective: str
    budget: float  # FLOPs
    quantity: str  # of `optima.QUANTITIES`
    method: str  # "laws" through the optima of the curves, or the "surface"
    predicted: Estimate  # without the budget; the interval is for the measured number, whose own error is in it
    measured: float

    @property
    def holds(self) -> bool | None:
        """True if the measured number lies in the interval; None without one."""
        return None if self.predicted.interval is None else not self.predicted.excludes(self.measured)


def largest_budget(
    results: Sequence[CellResult], *, noise: NoiseOption = None, draws: int = 10_000, seed: int = 0
) -> list[HeldOut]:
    """Predict the optimum of each objective's largest budget from the others, and compare it with the measured one.

    The interval of a law has the error of the law, the random effect of one more budget and the error with which its
    optimum was measured. That of the surface has the error of the surface and of the measured optimum; it has no random
    effect, since a surface has no budgets. Runs that belong to no budget are fitted by the surface if they cost less
    than the largest one.

    Args:
      results: the runs.
      noise: as `analysis.analyse` takes it.
      draws: draws of the bootstrap.
      seed: seed of its random numbers.

    Returns:
      The predictions; none for an objective without an optimum at its largest budget or without laws below it.
    """
    rows = []
    whole = analyse(results, noise=noise, draws=draws, seed=seed, full=False)
    for name, fit in whole.objectives.items():
        optimum = fit.budgets[-1].optimum if fit.budgets else None
        if optimum is None or not optimum.usable:
            continue
        earlier = [r for r in fit.runs if (r.flops if math.isnan(r.budget) else r.budget) < optimum.budget]
        if not earlier:
            continue
        before = analyse(earlier, noise=noise, draws=draws, seed=seed, full=False).objectives[name]
        for key in QUANTITIES:
            measured = float(np.exp(optimum.logs[key]))
            error = optimum.draws[key] - optimum.logs[key] if optimum.draws else None
            if key in before.laws:
                predicted = _ahead(before.laws[key], optimum.budget, error)
                rows.append(HeldOut(name, optimum.budget, key, "laws", predicted, measured))
            if before.surface and key != "tokens":
                surface = before.surface
                estimate = surface.params_at(optimum.budget) if key == "params" else surface.loss_at(optimum.budget)
                rows.append(HeldOut(name, optimum.budget, key, "surface", _with_error(estimate, error), measured))
    return rows


def larger_runs(
    results: Sequence[CellResult],
    held_out: Sequence[CellResult],
    *,
    noise: NoiseOption = None,
    draws: int = 10_000,
    seed: int = 0,
) -> list[HeldOut]:
    """Predict the losses of runs from others of the same objective, with prediction intervals.

    The surface predicts the loss of a run of that size and number of tokens. The laws predict the loss of a run of the
    best size for its compute, so this is only for runs that are near it.

    Args:
      results: the runs of one objective that are fitted.
      held_out: those that are predicted.
      noise: as `analysis.analyse` takes it.
      draws: draws of the bootstrap.
      seed: seed of its random numbers.

    Raises:
      UserError: there are runs of several objectives.
    """
    check_runs(results)
    check_runs(held_out, "held_out")
    if len(names := sorted({run.objective for run in (*results, *held_out)})) > 1:
        raise UserError(f"the runs are of {', '.join(names)}; give those of one objective at a time")
    [(name, fit)] = analyse(results, noise=noise, draws=draws, seed=seed, full=False).objectives.items()
    rng = np.random.default_rng([seed, 1])  # other numbers than those of the bootstrap
    rows = []
    for run in held_out:
        if fit.surface:
            predicted = fit.surface.loss_of_run(run.params, run.tokens)
            rows.append(HeldOut(name, run.flops, "loss", "surface", predicted, run.loss))
        if fit.laws:
            law, error = fit.laws["loss"], None
            if fit.used_noise:  # of the run, in logarithms
                relative = fit.used_noise.sd / np.exp(law.log_at(run.flops)[0])
                error = relative * rng.standard_t(fit.used_noise.dof, draws)
            rows.append(HeldOut(name, run.flops, "loss", "laws", _ahead(law, run.flops, error), run.loss))
    return rows


def _ahead(law: Law, budget: float, error: np.ndarray | None) -> Estimate:
    """Return what a law predicts that will be measured at a budget."""
    value, drawn = law.log_at(budget)
    if drawn is None or law.effects is None or error is None:
        return law_estimate(value, None, np.exp)
    return law_estimate(value, drawn + law.effects[:, -1] + error, np.exp)


def _with_error(estimate: Estimate, error: np.ndarray | None) -> Estimate:
    """Widen an interval by the error of the measured number, whose logarithm has these draws of its error."""
    if estimate.interval is None or error is None:
        return Estimate(estimate.value)
    center = np.log(estimate.value)
    own = np.nanquantile(error, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    low, high = (
        center + np.sign(end - center) * np.hypot(end - center, part)
        for end, part in zip(np.log(estimate.interval), own, strict=True)
    )
    return Estimate(estimate.value, float(np.exp(low)), float(np.exp(high)))
