"""The noise that an analysis works with: measured on repeated seeds, given, or taken from residuals."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import parametric
from diffusionlm.scaling.laws.isoflop_fits import parabola
from diffusionlm.scaling.laws.noise import Noise, seed_noise
from diffusionlm.scaling.sweep.results import CellResult

RESIDUALS = "residuals"
CERTAIN = 10**9  # degrees of freedom of a noise that is given: it is not in doubt

NoiseOption = float | Literal["residuals"] | None


def check_noise(noise: object) -> NoiseOption:
    """Return a noise as `noises` takes it: None, "residuals", or a positive number, also one that is written as text.

    Raises:
      UserError: it is anything else.
    """
    if noise is None or noise == RESIDUALS:
        return noise  # pyright: ignore[reportReturnType]  # the comparison says which
    try:
        sd = float(noise)  # pyright: ignore[reportArgumentType]  # what is no number is refused
    except (TypeError, ValueError):
        sd = np.nan
    if not 0 < sd < np.inf:
        raise UserError(
            f"noise={noise!r} must be the standard deviation of the loss between seeds in nats, such as 0.005, or "
            f"{RESIDUALS!r}"
        )
    return sd


def noises(results: Sequence[CellResult], noise: NoiseOption = None) -> dict[str, Noise | None]:
    """Return the noise of each objective; None where it is unknown.

    Args:
      results: finished cells whose loss is finite.
      noise: the standard deviation of the loss between seeds, nats, if it is given; "residuals": the scatter of the
        losses about the fitted curves; None: as measured where cells are repeated with other seeds.
    """
    if noise is None:
        return seed_noise(results)
    names = sorted({result.objective for result in results})
    if noise == RESIDUALS:
        return {name: residual_noise([r for r in results if r.objective == name]) for name in names}
    return dict.fromkeys(names, Noise(float(noise), CERTAIN, 0, False, "given"))


def residual_noise(runs: Sequence[CellResult]) -> Noise | None:
    """Return the scatter of the runs of one objective about their curves, which contains misfit as well as noise.

    The curves are the parabolas of all budgets with more than three sizes, each with its own scale and one common
    scatter; where no run belongs to a budget, the parametric law of all runs.

    Returns:
      The standard deviation with its degrees of freedom, or None if the curves go through all points.
    """
    budgets: dict[float, list[CellResult]] = defaultdict(list)
    for run in runs:
        if np.isfinite(run.budget):
            budgets[run.budget].append(run)
    total, dof, curves = 0.0, 0, 0
    for group in budgets.values():
        if len({run.params for run in group}) > 3:
            residuals = parabola(np.log([run.params for run in group]), [run.loss for run in group]).residuals
            total, dof, curves = total + float(residuals @ residuals), dof + len(group) - 3, curves + 1
    if not budgets and (surface := _surface(runs)):
        fitted = np.array([surface.loss(run.params, run.tokens) for run in runs])
        total, dof, curves = float(((np.array([run.loss for run in runs]) - fitted) ** 2).sum()), len(runs) - 5, 1
    return Noise(float(np.sqrt(total / dof)), dof, curves, False, RESIDUALS) if dof > 0 and total > 0 else None


def _surface(runs: Sequence[CellResult]) -> parametric.Parametric | None:
    with threadpool_limits(limits=1, user_api="blas"), np.errstate(all="ignore"):  # tiny matrices; it may diverge
        return parametric.fit(runs)
