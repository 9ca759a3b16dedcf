"""Lack-of-fit tests of the curves and laws, and what the intervals make of a misfit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from diffusionlm.scaling.laws.curves import Curve, Shape
from diffusionlm.scaling.laws.isoflop_fits import Parabola, PowerLaw
from diffusionlm.scaling.laws.noise import RESIDUALS, Noise
from diffusionlm.scaling.laws.random_effects import RandomEffect

REJECTED = 0.05  # p value below which the curves of an objective do not fit within the noise


@dataclass(frozen=True)
class LackOfFit:
    """The part of the residuals that noise does not explain, and the p value of the F test."""

    sd: float  # nats, or log units for a law
    p: float | None  # None where the noise is unknown


class CellResiduals(NamedTuple):
    """The residuals of a fit, and which runs are of one cell."""

    residuals: np.ndarray  # (runs,) nats
    cells: np.ndarray  # (runs,) the number of each run's cell, from 0


def curve_lack_of_fit(fit: Curve | Parabola, log_n: ArrayLike, noise: Noise | None) -> LackOfFit | None:
    """Test the residuals of the sizes' mean losses against the noise between seeds (the lack-of-fit F test).

    Args:
      fit: the curve of one budget.
      log_n: (runs,) natural logarithms of the sizes.
      noise: the noise between seeds.

    Returns:
      The misfit, or None with three sizes, through which a curve always goes.
    """
    return lack_of_fit(fit.residuals, np.unique(np.asarray(log_n), return_inverse=True)[1], 3, noise)


def lack_of_fit(residuals: np.ndarray, cells: np.ndarray, parameters: int, noise: Noise | None) -> LackOfFit | None:
    """Test the mean residuals of cells against the noise between seeds.

    Args:
      residuals: (runs,) nats.
      cells: (runs,) the number of each run's cell, from 0.
      parameters: the number of fitted coefficients.
      noise: the noise between seeds.

    Returns:
      The misfit, or None with no more cells than coefficients.
    """
    if noise and noise.source == RESIDUALS:  # these residuals cannot be tested against themselves
        noise = None
    means, counts = _means(residuals, cells)
    dof = len(counts) - parameters
    return _against_noise(float((counts * means**2).sum()), dof, dof, noise) if dof > 0 else None


def law_lack_of_fit(law: PowerLaw, effect: RandomEffect | None, noise: Noise | None) -> LackOfFit | None:
    """Test the residuals of optima around a power law in the same way; the sd is that of the random effect.

    Args:
      law: the law.
      effect: the random effect of its budgets; None where the noise is unknown, whose sd is then that of the residuals.
      noise: the noise of a run.

    Returns:
      The misfit, or None with two points, through which a line always goes.
    """
    dof = law.weights.shape[1] - 2
    if dof < 1:
        return None
    if effect is None or noise is None:
        return LackOfFit(float(np.sqrt(law.chi_square / dof)), None)
    return LackOfFit(effect.sd, float(stats.f.sf(effect.statistic / dof, dof, noise.dof)))


def widened(
    noise: Noise | None, fits: Sequence[Curve], log_n: Sequence[np.ndarray], shape: Shape | None
) -> Noise | None:
    """Return the noise that intervals use: the scatter about the curves where they do not fit within the noise.

    Where the F test rejects all curves of an objective together (p < `REJECTED`), the losses have errors that are not
    those between seeds, and the optima have errors of that size.

    Args:
      noise: the noise between seeds, or as it was given.
      fits: the curves of one objective.
      log_n: (runs,) natural logarithms of the sizes of each.
      shape: the shape of the curves.
    """
    if noise is None or shape is None or not fits:
        return noise
    squares, count = _squares(
        [CellResiduals(fit.residuals, np.unique(x, return_inverse=True)[1]) for fit, x in zip(fits, log_n, strict=True)]
    )
    if count == 3 * len(fits):
        return noise
    divisor, dof = shape.spare(count - 3 * len(fits))
    misfit = _against_noise(squares, divisor, dof, noise)
    if not _rejected(misfit):
        return noise
    return Noise(float(np.hypot(misfit.sd, noise.sd)), dof, count, noise.pooled, "curves")


def leave_surfaces(noise: Noise, surfaces: Sequence[CellResiduals], parameters: int) -> bool:
    """Return True if losses leave the surfaces of all budgets together by more than the noise explains.

    Args:
      noise: the noise between seeds, or as it was given.
      surfaces: the residuals of each surface.
      parameters: the fitted coefficients of each.
    """
    squares, count = _squares(surfaces)
    dof = count - parameters * len(surfaces)
    return dof > 0 and _rejected(_against_noise(squares, dof, dof, noise))


def scatter_about_surfaces(
    surfaces: Sequence[CellResiduals], parameters: int, source: Literal["surfaces", "residuals"]
) -> Noise | None:
    """Return the scatter of the mean losses of cells about surfaces that weigh all cells alike; None without any.

    Seeds of a cell share what makes it leave the surface, so several of them are no better than one.

    Args:
      surfaces: the residuals of each surface.
      parameters: the fitted coefficients of each.
      source: what the noise is called.
    """
    means = np.concatenate([_means(*each)[0] for each in surfaces] or [np.empty(0)])
    dof = len(means) - parameters * len(surfaces)
    return Noise(float(np.sqrt((means**2).sum() / dof)), dof, len(means), False, source) if dof > 0 else None


def _rejected(misfit: LackOfFit) -> bool:
    return misfit.p is not None and misfit.p < REJECTED


def _means(residuals: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean residual of each cell, and the number of its runs, (cells,) each."""
    counts = np.bincount(cells)
    return np.bincount(cells, residuals) / counts, counts


def _squares(fits: Sequence[CellResiduals]) -> tuple[float, int]:
    """Return the sum of squares of the mean residuals of all cells, times their runs, and the number of cells."""
    parts = [_means(*fit) for fit in fits]
    return float(sum((counts * means**2).sum() for means, counts in parts)), sum(len(counts) for _, counts in parts)


def _against_noise(square_sum: float, divisor: float, dof: float, noise: Noise | None) -> LackOfFit:
    """Test a sum of squares over a divisor, with these degrees of freedom, against the variance of the noise."""
    variance, mean = noise.sd**2 if noise else 0.0, square_sum / divisor
    p = float(stats.f.sf(mean / variance, dof, noise.dof)) if noise else None
    return LackOfFit(float(np.sqrt(max(mean - variance, 0.0))), p)
