"""The two fits of Approach 2: a parabola in log N for each budget, and power laws of C through its minima.

Both are linear least squares, so the effect of noise on them is known in closed form; `bootstrap` draws from it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws.arguments import check_points


@dataclass(frozen=True)
class Parabola:
    """A least-squares parabola of the loss in log N, at one budget (Hoffmann et al. 2203.15556, Approach 2)."""

    centre: float  # u = log N - centre, so that numbers stay small and the columns nearly orthogonal
    coefficients: np.ndarray  # (3,) of 1, u, u^2, nats
    unscaled: np.ndarray  # (3, 3) covariance of the coefficients, in units of the variance of one run
    residuals: np.ndarray  # (runs,) measured minus fitted, nats

    @property
    def convex(self) -> bool:
        """True if the parabola has a minimum."""
        return bool(self.coefficients[2] > 0)

    @property
    def log_n(self) -> float:
        """Natural logarithm of N at the minimum; NaN without one."""
        return float(self.centre + vertex(self.coefficients)[0])

    @property
    def loss(self) -> float:
        """Loss at the minimum, nats; NaN without one."""
        return float(vertex(self.coefficients)[1])

    @property
    def curvature(self) -> float:
        """Half of the second derivative by log N, nats."""
        return float(self.coefficients[2])

    def terms(self, log_n: ArrayLike) -> np.ndarray:
        """Return 1, u and u^2 at (...) sizes, (..., 3)."""
        return np.vander(np.asarray(log_n) - self.centre, 3, increasing=True)

    def gradients(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the derivatives of log N* and of L* by the coefficients, (3,) each."""
        b, c = self.coefficients[1:]
        u = -b / (2 * c)
        # The slope is zero at the minimum, so an error of its place costs the loss nothing.
        return np.array([0, -1 / (2 * c), b / (2 * c**2)]), np.array([1, u, u**2])

    def variances(self) -> tuple[float, float]:
        """Return the variances of log N* and of L*, in units of the variance of one run, by the delta method."""
        of_n, of_loss = self.gradients()
        return float(of_n @ self.unscaled @ of_n), float(of_loss @ self.unscaled @ of_loss)

    def __call__(self, log_n: ArrayLike) -> np.ndarray:
        """Return the fitted loss at sizes, nats."""
        return np.polynomial.polynomial.polyval(np.asarray(log_n) - self.centre, self.coefficients)


def parabola(log_n: ArrayLike, loss: ArrayLike) -> Parabola:
    """Fit a parabola to the runs of one budget, each with the same weight.

    Args:
      log_n: (runs,) natural logarithms of the sizes, at least three different ones.
      loss: (runs,) nats per token.

    Raises:
      UserError: one is no list of finite numbers, they are of two lengths, or there are fewer than three sizes.
    """
    log_n, loss = check_points(log_n=log_n, loss=loss)
    if (sizes := len(np.unique(log_n))) < 3:
        raise UserError(f"log_n has {sizes} different size{'s' * (sizes > 1)}, and a parabola needs three")
    centre = float(np.unique(log_n).mean())
    design = np.vander(log_n - centre, 3, increasing=True)
    inverse = np.linalg.pinv(design)
    coefficients = inverse @ loss
    return Parabola(centre, coefficients, inverse @ inverse.T, loss - design @ coefficients)


def vertex(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the minima of parabolas and the losses there, NaN for those that open downwards.

    Args:
      coefficients: (..., 3) of 1, u, u^2.

    Returns:
      (...) u of the minimum, and (...) the loss there.
    """
    a, b, c = np.moveaxis(coefficients, -1, 0)
    c = np.where(c > 0, c, np.nan)
    u = -b / (2 * c)
    return u, a + b * u / 2


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
        """The beta of log y = exponent log C + beta, as SMDM writes it (2410.18514, section 3)."""
        return self.level - self.exponent * self.centre

    def __call__(self, c: ArrayLike) -> np.ndarray:
        """Return y at C."""
        return np.exp(self.level + self.exponent * (np.log(c) - self.centre))


def power_law(log_c: ArrayLike, log_y: ArrayLike, covariance: ArrayLike | None = None) -> PowerLaw:
    """Fit a power law by generalised least squares (Aitken 1936) on logarithms.

    Args:
      log_c: (points,) natural logarithms of the compute.
      log_y: (points,) natural logarithms of the quantity to fit.
      covariance: covariance of `log_y` up to a factor, as (points,) variances or as (points, points); None: equal
        variances.

    Raises:
      UserError: `log_c` or `log_y` is no list of finite numbers, they are of two lengths, or there is but one budget.
    """
    log_c, log_y = check_points(log_c=log_c, log_y=log_y)
    if len(np.unique(log_c)) < 2:
        raise UserError("log_c has 1 different budget, and a power law needs two")
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
    """Return the weights (parameters, points) whose product with the observations is the GLS estimate.

    Args:
      design: (points, parameters).
      covariance: (points, points) of the observations, up to a factor.
    """
    whitened = np.linalg.solve(covariance, design)
    return np.linalg.solve(design.T @ whitened, whitened.T)
