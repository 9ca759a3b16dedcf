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

from diffusionlm.scaling.laws.arguments import check_runs
from diffusionlm.scaling.laws.bootstrap import CONFIDENCE, Estimate
from diffusionlm.scaling.laws.curves import Points, curve, fit_shape
from diffusionlm.scaling.laws.noise import Noise
from diffusionlm.scaling.laws.surface_fit import SurfaceFit, fit_surface
from diffusionlm.scaling.sweep.results import CellResult

LEVEL = 0.05  # of the test of all cells in all steps together (Bonferroni)
SURE = 1e-3  # the same of a search beyond `AHEAD`, whose greedy steps among many cells may not find any by chance
MOST = 0.2  # of the cells: if more are far off, it is the surface that does not fit
AHEAD = 4  # cells in a row that are not far off, after which others are suspected at the level `SURE` only
ROUNDING = 1e-6  # of a loss, and of whole numbers of tokens, as a share of the loss


@dataclass(frozen=True)
class Suspect:
    """A cell that is far off the surface through the others."""

    budget: float  # FLOPs; NaN for runs of no budget
    params: int
    tokens: int
    off: Estimate  # its mean loss minus that of the surface through the others, nats
    p: float  # of a cell as far off as this among all cells


@dataclass(frozen=True)
class Outliers:
    """The cells of one objective that are far off the surface through the others."""

    suspects: tuple[Suspect, ...] = ()  # the worst first
    unnamed: int = 0  # about how many are far off, where they are too many for any of them to be suspected


def outliers(results: Sequence[CellResult], noise: Noise | None = None) -> Outliers:
    """Find the cells of one objective that went wrong.

    Cells that went wrong at once hide each other, because each is part of the scatter that the others are judged by. So
    the worst are taken out one by one until half are left, and all until the last one that is far off the surface
    through what is left are far off (the generalised extreme Studentised deviate, Rosner 1983). The level is that of
    all cells in all steps together. If these are more than `MOST` of the cells, none is named: it is the surface that
    does not fit. Behind more than `AHEAD` in a row that are not far off the level is stricter.

    The mean loss of a cell's seeds counts as that of one run, since they share its misfit.

    Args:
      results: the runs of one objective.
      noise: the noise of a run, which curves are expected to leave over.

    Raises:
      UserError: `results` is no list of runs.
    """
    check_runs(results)
    cells: dict[object, list[CellResult]] = {}
    for run in results:
        cells.setdefault(cell_key(run), []).append(run)
    means = [replace(runs[0], loss=float(np.mean([run.loss for run in runs]))) for runs in cells.values()]
    half, most = len(means) // 2, int(MOST * len(means))
    taken, p = _worst_first(means, half)
    comparisons = (most + 1) * len(means)
    near, far = _last(p[: most + 1] * comparisons < LEVEL, AHEAD), _last(p * half * len(means) < SURE)
    out = taken[: max(near, far)]
    others = fit_surface(without(means, out), profile=False)
    if others is None:
        return Outliers()
    again = [_against(others, cell, comparisons) for cell in out]
    far_off = [suspect for suspect in again if suspect.p < LEVEL]  # the others were taken out in vain
    if len(far_off) > most:
        return Outliers(unnamed=len(far_off))
    return Outliers(tuple(suspect for suspect in far_off if _curve_agrees(suspect, means, far_off, noise)))


def _worst_first(cells: Sequence[CellResult], steps: int) -> tuple[list[CellResult], np.ndarray]:
    """Return up to so many cells in the order in which they are taken out, and the p of each against what is left."""
    taken, p, left = [], [], list(cells)
    fit = fit_surface(left, profile=False)
    while fit and fit.dof > 2 and len(taken) < steps:
        cell = _worst(fit, left)
        left = without(left, [cell])
        if fit := fit_surface(left, profile=False):
            taken.append(cell)
            p.append(_against(fit, cell, 1).p)
    return taken, np.array(p)


def _last(far_off: np.ndarray, ahead: int | None = None) -> int:
    """Return the number of cells until the last one that is far off, with at most `ahead` others in a row before it."""
    places = [0, *(np.flatnonzero(far_off) + 1)]
    gaps = np.diff(places) - 1
    within = len(gaps) if ahead is None else next((i for i, gap in enumerate(gaps) if gap > ahead), len(gaps))
    return int(places[within])


def without(results: Sequence[CellResult], named: Sequence[Suspect | CellResult]) -> list[CellResult]:
    """Return the runs that are of no suspected cell."""
    keys = {cell_key(suspect) for suspect in named}
    return [run for run in results if cell_key(run) not in keys]


def cell_key(cell: CellResult | Suspect) -> tuple[float | None, int, int]:
    """Return what tells cells apart."""
    return None if math.isnan(cell.budget) else cell.budget, cell.params, cell.tokens


def _curve_agrees(suspect: Suspect, cells: Sequence[CellResult], worst: Sequence[Suspect], noise: Noise | None) -> bool:
    """Return True if the curve of the suspect's budget leaves over less without it, or has too few other sizes."""
    others = without(cells, worst)
    cells = without(cells, [other for other in worst if other is not suspect])
    budgets = sorted({cell.budget for cell in cells if not np.isnan(cell.budget)})
    points = {budget: _points(others, budget) for budget in budgets}
    if suspect.budget not in points or len(points[suspect.budget].loss) < 3:
        return True
    shape = fit_shape([at for at in points.values() if len(at.loss) >= 3], noise.sd if noise else None)
    before, after = (
        float((curve(at, shape.alpha, shape.beta).residuals ** 2).sum())
        for at in (_points(cells, suspect.budget), points[suspect.budget])
    )
    of_noise = (noise.sd, noise.dof) if noise else (0.0, 1)
    sd, dof = max(of_noise, (shape.scatter, shape.dof)) if shape.scatter else of_noise
    return before - after > float(stats.t.isf(LEVEL / 2, dof) * sd) ** 2


def _points(cells: Sequence[CellResult], budget: float) -> Points:
    of_budget = [cell for cell in cells if cell.budget == budget]
    return Points(np.log([cell.params for cell in of_budget]), np.array([cell.loss for cell in of_budget]))


def _against(others: SurfaceFit, cell: CellResult, comparisons: int) -> Suspect:
    """Return a cell as the surface through the others sees it; its p is that of so many comparisons (Bonferroni)."""
    off = cell.loss - float(others.loss(cell.params, cell.tokens))
    leverage = float(others.leverages(np.log([cell.params]), np.log([cell.tokens]))[0])
    sd = max(others.scatter, ROUNDING * cell.loss) * math.sqrt(1 + leverage)
    p = 2 * float(stats.t.sf(abs(off) / sd, others.dof)) * comparisons
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, others.dof)) * sd
    return Suspect(cell.budget, cell.params, cell.tokens, Estimate(off, off - half, off + half), min(1.0, p))


def _worst(fit: SurfaceFit, cells: Sequence[CellResult]) -> CellResult:
    """Return the cell that is furthest off, in units of the scatter of the others about their surface."""
    kept = 1 - fit.leverages(np.log([cell.params for cell in cells]), np.log([cell.tokens for cell in cells]))
    kept = np.maximum(kept, 1e-6)
    # What the sum of squares would be without the cell, which is the variance that the cell is judged by.
    others = np.maximum((fit.residuals**2).sum() - fit.residuals**2 / kept, 0.0) / (fit.dof - 1)
    floor = (ROUNDING * float(np.mean([cell.loss for cell in cells]))) ** 2
    return cells[int(np.argmax(np.abs(fit.residuals) / np.sqrt(np.maximum(others, floor) * kept)))]
