"""A quadratic surface of the loss over model size and autoregressive share, at one budget.

Its variables are log N and the logit of the share, log(share / (1 - share)), of which 0 and 1 are the ends. Like a
parabola it is linear least squares, so the effect of noise on it is known in closed form.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

TERMS = 6  # 1, u, x, u^2, u x, x^2


@dataclass(frozen=True)
class Surface:
    """A least-squares quadratic of the loss in u = log N - centre[0] and x = logit(share) - centre[1]."""

    centre: tuple[float, float]
    coefficients: np.ndarray  # (6,) of 1, u, x, u^2, u x, x^2, nats
    unscaled: np.ndarray  # (6, 6) covariance of the coefficients, in units of the variance of one run
    residuals: np.ndarray  # (runs,) measured minus fitted, nats


def surface(log_n: ArrayLike, share: ArrayLike, loss: ArrayLike, weights: ArrayLike | None = None) -> Surface | None:
    """Fit a surface to the runs of one budget.

    Args:
      log_n: (runs,) natural logarithms of the sizes.
      share: (runs,) shares, none of them 0 or 1.
      loss: (runs,) nats per token.
      weights: (runs,) inverse variances, in units of that of one run; None: all are 1.

    Returns:
      The surface, or None where the runs do not determine all of its coefficients.
    """
    log_n, x, loss = np.asarray(log_n, float), special.logit(share), np.asarray(loss, float)
    centre = float(np.unique(log_n).mean()), float(np.unique(x).mean())
    design = terms(log_n - centre[0], x - centre[1])
    root = np.sqrt(np.ones(len(loss)) if weights is None else np.asarray(weights, float))
    if np.linalg.matrix_rank(design) < TERMS:
        return None
    inverse = np.linalg.pinv(design * root[:, None])
    coefficients = inverse @ (root * loss)
    return Surface(centre, coefficients, inverse @ inverse.T, loss - design @ coefficients)


def terms(u: ArrayLike, x: ArrayLike) -> np.ndarray:
    """Return the terms of a surface at (...) points, (..., 6)."""
    u, x = np.broadcast_arrays(u, x)
    return np.stack([np.ones_like(u, float), u, x, u**2, u * x, x**2], -1)


def minimum(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return u, x and the loss at the minima of surfaces, NaN for those without one.

    Args:
      coefficients: (..., 6).
    """
    _, b, d, c, f, e = np.moveaxis(coefficients, -1, 0)
    determinant = 4 * c * e - f**2
    exists = (c > 0) & (determinant > 0)
    determinant = np.where(exists, determinant, np.nan)
    u, x = (f * d - 2 * e * b) / determinant, (f * b - 2 * c * d) / determinant
    return u, x, (coefficients * terms(u, x)).sum(-1)


def at_share(coefficients: np.ndarray, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return u and the loss at the minima over u where x is given, NaN where there is none.

    Args:
      coefficients: (..., 6).
      x: (...) of the same or a broadcastable shape.
    """
    _, b, _, c, f, _ = np.moveaxis(coefficients, -1, 0)
    u = -(b + f * x) / (2 * np.where(c > 0, c, np.nan))
    return u, (coefficients * terms(u, x)).sum(-1)


def variances(fit: Surface) -> tuple[float, float, float]:
    """Return the variances of u, x and the loss at the minimum, in units of the variance of one run (delta method)."""
    u, x, _ = (float(value) for value in minimum(fit.coefficients))
    _, _, _, c, f, e = fit.coefficients
    slopes = np.array([[0, 1, 0, 2 * u, x, 0], [0, 0, 1, 0, u, 2 * x]])  # of both derivatives, by the coefficients
    place = -np.linalg.solve(np.array([[2 * c, f], [f, 2 * e]]), slopes)
    level = terms(u, x)  # the derivatives are zero at the minimum, so an error of its place costs nothing
    of_u, of_x, of_loss = (float(gradient @ fit.unscaled @ gradient) for gradient in (*place, level))
    return of_u, of_x, of_loss
