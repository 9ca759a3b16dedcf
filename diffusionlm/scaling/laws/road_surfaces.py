"""The runs that begin as an autoregressive model, with a surface through those of each budget, and their noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import special

from diffusionlm.scaling.laws.misfit import CellResiduals, leave_surfaces, scatter_about_surfaces
from diffusionlm.scaling.laws.noise import RESIDUALS, Noise, by_cell
from diffusionlm.scaling.laws.objective import FAR
from diffusionlm.scaling.laws.surface import TERMS, Surface, surface
from diffusionlm.scaling.sweep.results import CellResult

ENOUGH = 3  # shares that a quadratic goes through


@dataclass(frozen=True)
class RoadSurface:
    """The roads of one budget."""

    runs: tuple[CellResult, ...]
    distant: tuple[CellResult, ...]  # whose share is too far from the best for the surface
    fit: Surface | None = None  # None where the runs do not determine one
    by_run: Surface | None = None  # with one weight for each run: the noise alone decides how far cells are off it


@dataclass(frozen=True)
class Surfaces:
    """The roads of all budgets."""

    budgets: tuple[RoadSurface, ...]
    noise: Noise | None  # of all roads together, between seeds or as given
    used_noise: Noise | None  # what intervals use: the scatter about the surfaces, where that is more


def fit_surfaces(runs: Sequence[CellResult], noise: Noise | Literal["residuals"] | None) -> Surfaces | None:
    """Fit a surface to all roads of each budget; None without roads.

    Args:
      runs: all runs; those without an autoregressive share are left out.
      noise: the noise between the seeds of roads, or as given; "residuals": the scatter about these surfaces.
    """
    roads = [run for run in runs if run.arm_share]
    if not roads:
        return None
    of_budget = {budget: [run for run in roads if run.budget == budget] for budget in {run.budget for run in roads}}
    fitted = [_fit(_near(of_budget[budget])) for budget in sorted(of_budget)]
    if noise is None or (noise != RESIDUALS and not leave_surfaces(noise, _residuals(fitted), TERMS)):
        return Surfaces(tuple(fitted), noise, noise)
    fitted = [_weigh_cells_alike(budget) for budget in fitted]
    scatter = scatter_about_surfaces(_residuals(fitted), TERMS, RESIDUALS if noise == RESIDUALS else "surfaces")
    return Surfaces(tuple(fitted), scatter if noise == RESIDUALS else noise, scatter)


def cells_of(runs: Sequence[CellResult]) -> np.ndarray:
    """Return the number of the cell of each run of a budget, from 0: those of one size and share are one cell."""
    return np.unique(np.stack(_coordinates(runs), 1), axis=0, return_inverse=True)[1].reshape(-1)


def _near(runs: Sequence[CellResult]) -> RoadSurface:
    """Divide the runs of a budget by their share.

    The odds of a share, share / (1 - share), are near within a factor `FAR` of those of the best measured one, as
    sizes are near for a curve. All are near where fewer shares than a quadratic needs would be left.
    """
    best = min(by_cell(runs).values(), key=lambda cell: float(np.mean([run.loss for run in cell])))[0].arm_share
    shares = {run.arm_share for run in runs}
    near = {share for share in shares if abs(float(special.logit(share) - special.logit(best))) <= math.log(FAR) + 1e-9}
    kept = near if len(near) >= ENOUGH else shares
    return RoadSurface(
        tuple(run for run in runs if run.arm_share in kept), tuple(run for run in runs if run.arm_share not in kept)
    )


def _fit(budget: RoadSurface) -> RoadSurface:
    """Fit the surface of a budget with one weight for each run; losses that are all equal have none."""
    if len({run.loss for run in budget.runs}) == 1:
        return budget
    fit = surface(*_coordinates(budget.runs), [run.loss for run in budget.runs])
    return replace(budget, fit=fit, by_run=fit)


def _weigh_cells_alike(budget: RoadSurface) -> RoadSurface:
    """Fit the surface of a budget with one weight for each cell, whose error its seeds share."""
    if budget.fit is None:
        return budget
    cells = cells_of(budget.runs)
    losses = [run.loss for run in budget.runs]
    return replace(budget, fit=surface(*_coordinates(budget.runs), losses, 1 / np.bincount(cells)[cells]))


def _residuals(budgets: Sequence[RoadSurface]) -> list[CellResiduals]:
    return [CellResiduals(budget.fit.residuals, cells_of(budget.runs)) for budget in budgets if budget.fit]


def _coordinates(runs: Sequence[CellResult]) -> tuple[np.ndarray, np.ndarray]:
    """Return the log sizes and the shares of some runs."""
    return np.log([run.params for run in runs]), np.array([run.arm_share for run in runs])
