"""The fits of one training objective."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits

from diffusionlm.scaling.laws import next_cells, parametric, power_laws
from diffusionlm.scaling.laws.bootstrap import Bootstrap
from diffusionlm.scaling.laws.curves import Curve, Points, Shape, curve, fit_shape
from diffusionlm.scaling.laws.envelope import Envelope, envelope
from diffusionlm.scaling.laws.isoflop_fits import parabola
from diffusionlm.scaling.laws.misfit import widened
from diffusionlm.scaling.laws.noise import Noise, common_error, residual_noise
from diffusionlm.scaling.laws.optima import BudgetFit, fit_budget
from diffusionlm.scaling.laws.surface_fit import SurfaceFit, fit_surface
from diffusionlm.scaling.sweep.results import CellResult

REFITS = 20  # of Approach 3, for its standard errors, which are then known to a sixth


@dataclass(frozen=True)
class ObjectiveFit:
    """The fits of one objective, or of one road; a part that its cells do not allow is None or empty."""

    objective: str
    arm_share: float  # the share of the steps that are autoregressive at first; 0 for an objective from scratch
    noise: Noise | None  # of a run, as measured or given
    used_noise: Noise | None  # what intervals use: the scatter about the curves if these do not fit within the noise
    common_error: float  # standard error that the noise of the masks adds to all losses alike, nats
    budgets: tuple[BudgetFit, ...]
    shape: Shape | None  # of the curves; None without a budget that has three sizes
    laws: dict[str, power_laws.Law]  # by optima.QUANTITIES
    prediction: power_laws.Prediction | None
    candidates: tuple[next_cells.Candidate, ...]  # for the next cell; with laws, the most informative first
    envelope: Envelope | None  # Approach 1
    parametric: parametric.Parametric | None  # Approach 3
    surface: SurfaceFit | None  # the surface by variable projection
    runs: tuple[CellResult, ...]  # all runs, those without a budget too


@dataclass(frozen=True)
class Curves:
    """The runs of one objective by budget, with the curves through them."""

    runs: tuple[CellResult, ...]
    budgets: tuple[tuple[CellResult, ...], ...]  # the runs of each budget, by size and seed
    shape: Shape | None  # None without a budget that has three sizes
    points: tuple[Points, ...]  # of the budgets with three sizes
    fits: tuple[Curve, ...]  # of the same
    noise: Noise | None
    used_noise: Noise | None


def fit_curves(results: Sequence[CellResult], noise: Noise | Literal["residuals"] | None) -> Curves:
    """Fit the curves of one objective, and decide which noise its intervals use.

    Args:
      results: the runs of one objective; the budget of one that belongs to none is NaN.
      noise: the noise of a run; "residuals": the scatter about the curves.
    """
    budgets = sorted({result.budget for result in results if not math.isnan(result.budget)})
    groups = [sorted((r for r in results if r.budget == b), key=lambda r: (r.params, r.seed)) for b in budgets]
    points = [
        Points(np.log([run.params for run in group]), np.array([run.loss for run in group]))
        for group in groups
        if len({run.params for run in group}) >= 3
    ]
    shape, fits = None, []
    if points:
        shape = fit_shape(points, noise.sd if isinstance(noise, Noise) else None)
        fits = [curve(at, shape.alpha, shape.beta) for at in points]
    if noise == "residuals":
        noise = residual_noise(shape) if shape else None
    # The roads of a sweep share one noise.
    used = noise if results[0].arm_share else widened(noise, fits, [at.log_n for at in points])
    return Curves(tuple(results), tuple(map(tuple, groups)), shape, tuple(points), tuple(fits), noise, used)


def fit_objective(curves: Curves, bootstrap: Bootstrap, next_budget: float | None, full: bool) -> ObjectiveFit:
    """Fit everything that the finished cells of one objective allow.

    Args:
      curves: the runs of one objective with their curves.
      bootstrap: the draws that all objectives share.
      next_budget: the budget to predict, FLOPs; None with a single budget.
      full: also fit Approaches 1 and 3, and rank candidates for the next cell.
    """
    results, noise = curves.runs, curves.used_noise
    objective, common = results[0].objective, common_error(results)
    # The training loss of a road is not one quantity, and no surface knows its share.
    checked = full and not results[0].arm_share
    fits = _fit_budgets(curves, bootstrap)
    usable = [fit.optimum for fit in fits if fit.optimum and fit.optimum.usable]
    laws = power_laws.laws(usable, noise, bootstrap)
    prediction = None
    if laws and next_budget:
        prediction = power_laws.predict(usable, laws, bootstrap, next_budget, noise)
    candidates: tuple[next_cells.Candidate, ...] = ()
    if full and not laws:
        candidates = next_cells.towards_optima(fits, next_budget)
    elif full and next_budget:
        candidates = next_cells.candidates(usable, laws, next_budget, noise)
    lines = [(run.params, run.curve) for run in results if len(run.curve) > 1]
    return ObjectiveFit(
        objective=objective,
        arm_share=results[0].arm_share,
        noise=curves.noise,
        used_noise=noise,
        common_error=common.stderr,
        budgets=tuple(fits),
        shape=curves.shape,
        laws=laws,
        prediction=prediction,
        candidates=candidates,
        envelope=envelope(lines, fits[0].budget, fits[-1].budget) if checked and fits else None,
        parametric=_parametric(results, curves.noise) if checked else None,
        surface=None if results[0].arm_share else _surface(results, curves.noise),
        runs=results,
    )


def _fit_budgets(curves: Curves, bootstrap: Bootstrap) -> list[BudgetFit]:
    """Read the optimum of each budget of one objective off its curve."""
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    if curves.used_noise and curves.shape:
        common = common_error(curves.runs)
        log_n, loss = bootstrap.curves(curves.runs[0].objective, curves.shape, curves.points, common)
        drawn = list(zip(log_n.T, loss.T, strict=True))
    fits, i = [], 0
    for group in curves.budgets:
        if len({run.params for run in group}) < 3:
            fits.append(fit_budget(group, None, None, None, None))
            continue
        plain = parabola(curves.points[i].log_n, curves.points[i].loss)
        fits.append(fit_budget(group, plain, curves.fits[i], drawn[i] if drawn else None, curves.noise))
        i += 1
    return fits


def _parametric(results: Sequence[CellResult], noise: Noise | None) -> parametric.Parametric | None:
    # The fit makes thousands of BLAS calls on tiny matrices, for which threads on a busy machine wait longer than they
    # compute. It may diverge on losses that have no such surface.
    with threadpool_limits(limits=1, user_api="blas"), np.errstate(all="ignore"):
        return parametric.fit(results, noise.sd if noise else None, REFITS)


def _surface(results: Sequence[CellResult], noise: Noise | None) -> SurfaceFit | None:
    with threadpool_limits(limits=1, user_api="blas"):
        return fit_surface(results, noise)
