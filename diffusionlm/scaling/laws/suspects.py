"""Cells that went wrong: those far off the surface through all others, by deleted studentised residuals.

A residual hides what is wrong with its own cell: a curve through five sizes follows its outermost cell, and the
neighbour then looks wrong. So each cell is compared with the surface L(N, D) that is fitted to the others (Cook and
Weisberg 1982, section 2.2), whose five numbers no single cell can bend, and whose scatter contains its misfit. A
surface may misfit at a corner of the grid, where no cell went wrong; so the curve of the cell's budget has to be better
without it as well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from diffusionlm.scaling.laws.curves import Points, curve, fit_shape
from diffusionlm.scaling.laws.noise import Noise
from diffusionlm.scaling.laws.surface_fit import TERMS, fit_surface
from diffusionlm.scaling.sweep.results import CellResult

LEVEL = 0.05  # of the test of all cells together (Bonferroni)
MOST = 0.1  # of the cells: if more are far off, it is the surface that does not fit


@dataclass(frozen=True)
class Suspect:
    """A cell that is far off the surface through the others."""

    budget: float  # FLOPs; NaN for runs of no budget
    params: int
    tokens: int
    off: float  # its mean loss minus that of the surface through the others, nats
    p: float  # of a cell as far off as this among all cells


def suspects(results: Sequence[CellResult], noise: Noise | None = None) -> tuple[Suspect, ...]:
    """Return the suspected cells of one objective, the worst first.

    Each is taken out before the next is looked for, since a cell that went wrong makes others look so. Of a few cells,
    two that went wrong at once may hide each other, because either is part of the scatter that the other is judged by.

    Args:
      results: the runs of one objective.
      noise: the noise of a run, which curves are expected to leave over.
    """
    cells: dict[tuple[float, int, int], list[CellResult]] = {}
    for run in results:
        cells.setdefault((run.budget, run.params, run.tokens), []).append(run)
    means = [replace(runs[0], loss=float(np.mean([run.loss for run in runs]))) for runs in cells.values()]
    most = max(1, int(MOST * len(means)))
    named: list[Suspect] = []
    while suspect := _worst(means):
        others = without(means, [suspect])
        if not _curve_agrees(suspect, means, others, noise):
            break
        named.append(suspect)
        if len(named) > most:
            return ()
        means = others
    return tuple(named)


def without(results: Sequence[CellResult], named: Sequence[Suspect]) -> list[CellResult]:
    """Return the runs that are of no suspected cell."""
    keys = [(suspect.budget, suspect.params, suspect.tokens) for suspect in named]
    return [run for run in results if not any(_same(key, run) for key in keys)]


def _same(key: tuple[float, int, int], run: CellResult) -> bool:
    budget, params, tokens = key
    return (run.params, run.tokens) == (params, tokens) and (run.budget == budget or math.isnan(budget))


def _curve_agrees(
    suspect: Suspect, cells: Sequence[CellResult], others: Sequence[CellResult], noise: Noise | None
) -> bool:
    """Return True if the curve of the suspect's budget leaves over less without it, or has too few other sizes."""
    budgets = sorted({cell.budget for cell in cells if not np.isnan(cell.budget)})
    points = {budget: _points(others, budget) for budget in budgets}
    if suspect.budget not in points or len(points[suspect.budget].loss) < 3:
        return True
    shape = fit_shape([at for at in points.values() if len(at.loss) >= 3], noise.sd if noise else None)
    before, after = (
        float((curve(at, shape.alpha, shape.beta).residuals ** 2).sum())
        for at in (_points(cells, suspect.budget), points[suspect.budget])
    )
    sd = max(noise.sd if noise else 0.0, shape.scatter or 0.0)
    dof = shape.dof if shape.scatter else noise.dof if noise else 1
    return before - after > float(stats.t.isf(LEVEL / 2, dof) * sd) ** 2


def _points(cells: Sequence[CellResult], budget: float) -> Points:
    of_budget = [cell for cell in cells if cell.budget == budget]
    return Points(np.log([cell.params for cell in of_budget]), np.array([cell.loss for cell in of_budget]))


def _worst(cells: Sequence[CellResult]) -> Suspect | None:
    """Return the cell that is furthest off, if it is further off than the scatter of the others explains."""
    dof = len(cells) - TERMS - 1
    fit = fit_surface(cells, profile=False)
    if dof < 2 or fit is None or fit.covariance is None:
        return None
    kept = 1 - fit.leverages(np.log([cell.params for cell in cells]), np.log([cell.tokens for cell in cells]))
    kept = np.maximum(kept, 1e-6)
    # What the sum of squares would be without the cell, which is the variance that the cell is judged by.
    others = np.maximum((fit.residuals**2).sum() - fit.residuals**2 / kept, 0.0) / dof
    floor = (1e-6 * float(np.mean([cell.loss for cell in cells]))) ** 2  # rounding of losses and of whole tokens
    t = np.abs(fit.residuals) / np.sqrt(np.maximum(others, floor) * kept)
    worst = int(np.argmax(t))
    p = float(min(1.0, 2 * stats.t.sf(t[worst], dof) * len(cells)))
    if p >= LEVEL:
        return None
    cell = cells[worst]
    return Suspect(cell.budget, cell.params, cell.tokens, float(fit.residuals[worst] / kept[worst]), p)
