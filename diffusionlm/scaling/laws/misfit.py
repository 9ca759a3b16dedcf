"""Lack-of-fit tests of the parabolas and laws, and the bias from asymmetric curves.

Loss over log N is steeper on one side than on the other, so a parabola misplaces the minimum by an amount that no
number of seeds removes. This bias is reported beside the interval, never inside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from diffusionlm.scaling.laws.bootstrap import CONFIDENCE, Estimate
from diffusionlm.scaling.laws.isoflop_fits import Parabola, PowerLaw
from diffusionlm.scaling.laws.noise import Noise


@dataclass(frozen=True)
class LackOfFit:
    """The part of the residuals that noise does not explain, and the p value of the F test."""

    sd: float  # nats, or log units for a law
    p: float | None  # None where the noise is unknown


@dataclass(frozen=True)
class Asymmetry:
    """A cubic term in log N, common to the budgets of an objective, and how it would move their minima."""

    cubic: Estimate  # nats per unit of log N cubed, around the minimum of the parabola
    p: float | None  # p value of no cubic term; None where the noise is unknown
    shift_log_n: tuple[float, ...]  # per budget, the minimum with the term minus that without; NaN if there is none
    shift_loss: tuple[float, ...]  # the same for the loss, nats


def parabola_lack_of_fit(fit: Parabola, log_n: ArrayLike, noise: Noise | None) -> LackOfFit | None:
    """Test the residuals of the sizes' mean losses against the noise between seeds (the lack-of-fit F test).

    Args:
      fit: the parabola of one budget.
      log_n: (runs,) natural logarithms of the sizes.
      noise: the noise between seeds.

    Returns:
      The misfit, or None with three sizes, through which a parabola always goes.
    """
    if noise and noise.source == "residuals":  # these residuals cannot be tested against themselves
        noise = None
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
    counts = np.bincount(cells)
    dof = len(counts) - parameters
    if dof < 1:
        return None
    means = np.bincount(cells, residuals) / counts
    return _against_noise(float((counts * means**2).sum()), dof, noise)


def law_lack_of_fit(law: PowerLaw, variances: Sequence[float], noise: Noise | None) -> LackOfFit | None:
    """Test the residuals of optima around a power law in the same way.

    Args:
      law: the law.
      variances: the variances that it was fitted with, in units of the variance of one run.
      noise: the noise between seeds.

    Returns:
      The misfit, or None with two points, through which a line always goes.
    """
    dof = len(variances) - 2
    if dof < 1:
        return None
    unscaled = _against_noise(law.chi_square, dof, noise)
    return LackOfFit(unscaled.sd * float(np.sqrt(np.mean(variances))), unscaled.p)


def _against_noise(square_sum: float, dof: int, noise: Noise | None) -> LackOfFit:
    variance = noise.sd**2 if noise else 0.0
    sd = float(np.sqrt(max(square_sum / dof - variance, 0.0)))
    return LackOfFit(sd, float(stats.f.sf(square_sum / dof / variance, dof, noise.dof)) if noise else None)


def asymmetry(
    fits: Sequence[Parabola], log_n: Sequence[np.ndarray], loss: Sequence[np.ndarray], noise: Noise | None
) -> Asymmetry | None:
    """Fit one cubic term to all parabolas of an objective; None without a residual degree of freedom for it.

    Args:
      fits: convex parabolas, one for each budget.
      log_n: natural logarithms of the sizes of each budget, (runs,).
      loss: losses of the same runs, nats.
      noise: the noise between seeds.
    """
    fitted = [(fit, x, y) for fit, x, y in zip(fits, log_n, loss, strict=True)]
    if not fitted or sum(len(np.unique(x)) for x in log_n) <= 3 * len(fitted):
        return None
    rows, start = sum(map(len, log_n)), 0
    design = np.zeros((rows, 3 * len(fitted) + 1))
    for i, (fit, x, _) in enumerate(fitted):
        z = x - fit.log_n
        design[start : start + len(x), 3 * i : 3 * i + 3] = np.vander(z, 3, increasing=True)
        design[start : start + len(x), -1] = z**3
        start += len(x)
    inverse = np.linalg.pinv(design)
    *coefficients, d = inverse @ np.concatenate(loss)
    scale = float(np.linalg.norm(inverse[-1]))
    cubic, p = Estimate(float(d)), None
    if noise:
        half = stats.t.ppf(0.5 + CONFIDENCE / 2, noise.dof) * noise.sd * scale
        cubic = Estimate(float(d), float(d - half), float(d + half))
        p = float(2 * stats.t.sf(abs(d) / (noise.sd * scale), noise.dof))
    shifts = [_shift(coefficients[3 * i : 3 * i + 3], d, fit.loss) for i, (fit, _, _) in enumerate(fitted)]
    return Asymmetry(cubic, p, tuple(n for n, _ in shifts), tuple(loss for _, loss in shifts))


def _shift(coefficients: Sequence[float], cubic: float, loss: float) -> tuple[float, float]:
    """Return the minimum of a + b z + c z^2 + d z^3, and its loss minus `loss`."""
    a, b, c = coefficients
    discriminant = c**2 - 3 * b * cubic
    if c <= 0 or discriminant <= 0:
        return float("nan"), float("nan")
    # Of the two roots, the one that stays finite as d goes to zero, where the second derivative is positive.
    z = -b / (c + np.sqrt(discriminant))
    return float(z), float(a + b * z + c * z**2 + cubic * z**3 - loss)
