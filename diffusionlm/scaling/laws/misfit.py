"""How far a parabola is from the loss that it stands for: a test against the noise, and the bias that it causes.

Loss over log N is steeper on one side than on the other, so a parabola misplaces the minimum by an amount that no
number of seeds removes. It is reported beside the interval, never inside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from diffusionlm.scaling.laws.fit import Parabola, PowerLaw
from diffusionlm.scaling.laws.uncertainty import CONFIDENCE, Estimate, Noise


@dataclass(frozen=True)
class LackOfFit:
    """What residuals say beyond the noise: the deviation that is left (nats or log units), and the F test's p value."""

    sd: float
    p: float | None  # None where the noise is unknown


@dataclass(frozen=True)
class Asymmetry:
    """A cubic term in log N, common to the budgets of an objective, and where it would put their minima."""

    cubic: Estimate  # nats per unit of log N cubed, around the minimum of the parabola
    p: float | None  # of no cubic term at all; None where the noise is unknown
    shift_log_n: tuple[float, ...]  # per budget: with the term minus without it; NaN where no minimum is left
    shift_loss: tuple[float, ...]  # nats


def parabola_lack_of_fit(fit: Parabola, log_n: Sequence[float], noise: Noise | None) -> LackOfFit | None:
    """Residuals of the sizes' mean losses against the noise between seeds (the classic lack-of-fit F test).

    None with three sizes, through which a parabola always goes.
    """
    sizes, where = np.unique(np.asarray(log_n), return_inverse=True)
    dof = len(sizes) - 3
    if dof < 1:
        return None
    counts = np.bincount(where)
    means = np.bincount(where, fit.residuals) / counts
    return _against_noise(float((counts * means**2).sum()), dof, noise)


def law_lack_of_fit(law: PowerLaw, variances: Sequence[float], noise: Noise | None) -> LackOfFit | None:
    """The same for minima around a power law that was fitted with these variances, over that of one run.

    None with two points, through which a line always goes.
    """
    dof = len(variances) - 2
    if dof < 1:
        return None
    found = _against_noise(law.chi_square, dof, noise)
    return LackOfFit(found.sd * float(np.sqrt(np.mean(variances))), found.p)


def _against_noise(square_sum: float, dof: int, noise: Noise | None) -> LackOfFit:
    variance = noise.sd**2 if noise else 0.0
    sd = float(np.sqrt(max(square_sum / dof - variance, 0.0)))
    return LackOfFit(sd, float(stats.f.sf(square_sum / dof / variance, dof, noise.dof)) if noise else None)


def asymmetry(
    fits: Sequence[Parabola], log_n: Sequence[np.ndarray], loss: Sequence[np.ndarray], noise: Noise | None
) -> Asymmetry | None:
    """Adds one cubic term to all parabolas of an objective; None without a residual degree of freedom to see it.

    Args:
      fits: convex parabolas.
      log_n: of the runs of each, (runs,).
      loss: of the same runs, nats.
      noise: between seeds.
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
    return Asymmetry(cubic, p, *map(tuple, zip(*shifts, strict=True)))


def _shift(coefficients: Sequence[float], cubic: float, loss: float) -> tuple[float, float]:
    """Of the minimum of a + b z + c z^2 + d z^3 from z = 0 and from `loss`."""
    a, b, c = coefficients
    discriminant = c**2 - 3 * b * cubic
    if c <= 0 or discriminant <= 0:
        return float("nan"), float("nan")
    z = -b / (
        c + np.sqrt(discriminant)
    )  # the root that stays finite as d goes to zero, where the second derivative > 0
    return float(z), float(a + b * z + c * z**2 + cubic * z**3 - loss)
