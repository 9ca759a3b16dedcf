"""The two fits of an IsoFLOP analysis: a parabola in log N for each budget, and power laws of C through its minima.

Both are linear least squares, so that what noise does to them is known in closed form; `uncertainty` draws from it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True)
class Parabola:
    """A least-squares parabola of the loss in log N, at one budget (Hoffmann et al. 2203.15556, Approach 2)."""

    centre: float  # log N that u = log N - centre counts from; numbers stay small and the columns nearly orthogonal
    coefficients: np.ndarray  # (3,) of 1, u, u^2; the loss in nats
    unscaled: np.ndarray  # (3, 3) covariance of the coefficients over the variance of one run
    residuals: np.ndarray  # (runs,) measured minus fitted, nats

    @property
    def convex(self) -> bool:
        """Whether it has a minimum at all."""
        return bool(self.coefficients[2] > 0)

    @property
    def log_n(self) -> float:
        """log N of the minimum; NaN without one."""
        return float(self.centre + vertex(self.coefficients)[0])

    @property
    def loss(self) -> float:
        """The least loss, nats; NaN without a minimum."""
        return float(vertex(self.coefficients)[1])

    def variances(self) -> tuple[float, float]:
        """Variances of log N* and of L* over that of one run, by the delta method."""
        b, c = self.coefficients[1:]
        u = -b / (2 * c)
        of_n = np.array([0, -1 / (2 * c), b / (2 * c**2)])
        of_loss = np.array([1, u, u**2])  # the slope is zero at the minimum: that u is estimated too costs nothing
        return float(of_n @ self.unscaled @ of_n), float(of_loss @ self.unscaled @ of_loss)

    def __call__(self, log_n: ArrayLike) -> np.ndarray:
        return np.polynomial.polynomial.polyval(np.asarray(log_n) - self.centre, self.coefficients)


def parabola(log_n: ArrayLike, loss: ArrayLike) -> Parabola:
    """Fits a parabola to the runs of one budget, each with the same weight.

    Args:
      log_n: (runs,) natural logarithm of the size; at least three different ones.
      loss: (runs,) nats per token.
    """
    log_n, loss = np.asarray(log_n, float), np.asarray(loss, float)
    centre = float(np.unique(log_n).mean())
    design = np.vander(log_n - centre, 3, increasing=True)
    inverse = np.linalg.pinv(design)
    coefficients = inverse @ loss
    return Parabola(centre, coefficients, inverse @ inverse.T, loss - design @ coefficients)


def vertex(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the parabolas (..., 3) are least, and how much they are there; NaN for those that open downwards."""
    a, b, c = np.moveaxis(coefficients, -1, 0)
    c = np.where(c > 0, c, np.nan)
    u = -b / (2 * c)
    return u, a + b * u / 2


def fieller(fit: Parabola, variance: float, dof: float, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of log N*, where the slope does not differ from zero (Fieller 1954).

    Args:
      fit: of the runs of one budget.
      variance: of one run, estimated with `dof` degrees of freedom from other runs than the residuals of `fit`.
      dof: of that estimate.
      confidence: of the interval.

    Returns:
      Its ends; infinite where the curvature is not significant, for then no size can be ruled out on some side.
    """
    _, b, c = fit.coefficients
    k = stats.t.ppf(0.5 + confidence / 2, dof) ** 2 * variance
    v = fit.unscaled
    # (b + 2 c u)^2 <= k Var(b + 2 c u), a quadratic in u.
    quadratic = 4 * (c**2 - k * v[2, 2])
    linear = 4 * (b * c - k * v[1, 2])
    constant = b**2 - k * v[1, 1]
    if c <= 0 or quadratic <= 0:
        return -np.inf, np.inf
    half = np.sqrt(max(linear**2 - 4 * quadratic * constant, 0.0)) / (2 * quadratic)
    middle = fit.centre - linear / (2 * quadratic)
    return float(middle - half), float(middle + half)


@dataclass(frozen=True)
class PowerLaw:
    """y = exp(level) (C / exp(centre))^exponent, a straight line in logarithms."""

    centre: float  # log C
    level: float  # log y there
    exponent: float
    weights: np.ndarray  # (2, points): level and exponent are these weights times log y
    chi_square: float  # sum of squared residuals over their variances

    @property
    def log_prefactor(self) -> float:
        """beta of log y = exponent log C + beta, as SMDM writes it (2410.18514, section 3)."""
        return self.level - self.exponent * self.centre

    def __call__(self, c: ArrayLike) -> np.ndarray:
        return np.exp(self.level + self.exponent * (np.log(c) - self.centre))


def power_law(log_c: ArrayLike, log_y: ArrayLike, covariance: ArrayLike | None = None) -> PowerLaw:
    """Fits a power law by generalised least squares (Aitken 1936) on logarithms.

    Args:
      log_c: (points,) natural logarithm of the compute.
      log_y: (points,) natural logarithm of what is fitted.
      covariance: of `log_y` up to a factor: (points,) variances or (points, points); all alike without it.
    """
    log_c, log_y = np.asarray(log_c, float), np.asarray(log_y, float)
    covariance = np.ones_like(log_y) if covariance is None else np.asarray(covariance, float)
    covariance = np.diag(covariance) if covariance.ndim == 1 else covariance
    centre = float(log_c.mean())
    design = np.vander(log_c - centre, 2, increasing=True)
    weights = gls_weights(design, covariance)
    level, exponent = weights @ log_y
    residuals = log_y - design @ (level, exponent)
    chi_square = float(residuals @ np.linalg.solve(covariance, residuals))
    return PowerLaw(centre, float(level), float(exponent), weights, chi_square)


def gls_weights(design: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """(parameters, points): the generalised least-squares estimate is these weights times the observations."""
    whitened = np.linalg.solve(covariance, design)
    return np.linalg.solve(design.T @ whitened, whitened.T)
