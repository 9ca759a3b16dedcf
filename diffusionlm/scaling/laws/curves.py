"""IsoFLOP curves: the loss over log N at one budget, of a shape that all budgets of an objective share.

On any surface L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2203.15556, Eq. 2) with D = C / (k N), the loss
at one budget is e + p exp(-alpha u) + q exp(beta u) in u = log N. Given alpha and beta this is linear in e, p and q,
and it becomes a parabola as both go to zero. A parabola misplaces the minimum of such a curve (2603.22339): to the
first order by a cubic term that is (beta - alpha) / 3 of the quadratic one at every budget, whatever the budget's
curvature. So alpha and beta are fitted to all budgets of an objective together, and e, p and q to each budget by
itself: unlike in a fit of the whole surface, nothing is assumed of how the optimum moves with C.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from diffusionlm.scaling.laws.loss_surface import BOUNDS

# The prior of log alpha and log beta, which decides where the losses do not. Published fits of Approach 3 lie within
# 0.25 and 0.55: Chinchilla 0.34 and 0.28, its refit 0.35 and 0.37, Quokka 0.38 and 0.38, six corpora of 2411.12925 0.43
# to 0.55 and 0.42 to 0.45, OpenEuroLLM 0.28 and 0.25, GIDD 0.29 and 0.37. The standard deviation is twice that of
# these.
TYPICAL, WIDTH = float(np.log(0.37)), 0.4
SPARED = 1e-6  # of a degree of freedom: what losses that decide a shape wholly leave of it
EXACT = 1e-11  # a scatter below this share of the loss is rounding
REACH, POINTS = 3.5, 11  # standard deviations, and points along each axis, of the grid of shapes that could have been


@dataclass(frozen=True)
class Shape:
    """The alpha and beta of the curves of one objective."""

    alpha: float
    beta: float
    scatter: float | None  # standard deviation of the losses about the curves, nats; None without a degree of freedom
    dof: float  # degrees of freedom of the scatter; 0 without any
    # (2,) How far the losses decide the shape, along two axes of its posterior: 0 where the prior does, 1 the losses.
    decided: np.ndarray = field(repr=False)
    # Shapes that could have been, (shapes, 2) of alpha and beta, with their posterior weights, which add up to 1.
    grid: np.ndarray = field(repr=False)
    weights: np.ndarray = field(repr=False)

    def spare(self, surplus: int) -> tuple[float, float]:
        """Return by what to divide a sum of squared residuals for their variance, and its degrees of freedom.

        Args:
          surplus: the number of losses beyond three for each curve.
        """
        return _spare(surplus, self.decided)

    @property
    def ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The central 95% of the alphas, and of the betas, that could have been."""
        ends = []
        for values in self.grid.T:
            order = np.argsort(values)
            total = np.cumsum(self.weights[order])
            ends.append(tuple(float(values[order][np.searchsorted(total, tail)]) for tail in (0.025, 0.975)))
        return ends[0], ends[1]


@dataclass(frozen=True)
class Curve:
    """A least-squares curve of the loss in log N, at one budget, given its shape."""

    centre: float  # u = log N - centre
    alpha: float
    beta: float
    coefficients: np.ndarray  # (3,) of `terms`, nats
    unscaled: np.ndarray  # (3, 3) covariance of the coefficients, in units of the variance of one run
    residuals: np.ndarray  # (runs,) measured minus fitted, nats

    @property
    def convex(self) -> bool:
        """True if the curve has a minimum."""
        return bool(np.isfinite(self.log_n))

    @property
    def log_n(self) -> float:
        """Natural logarithm of N at the minimum; NaN without one."""
        return float(self.centre + minimum(self.coefficients, self.alpha, self.beta)[0])

    @property
    def loss(self) -> float:
        """Loss at the minimum, nats; NaN without one."""
        return float(minimum(self.coefficients, self.alpha, self.beta)[1])

    @property
    def curvature(self) -> float:
        """Half of the second derivative by log N at the minimum, nats: the c of a parabola."""
        return float(self.coefficients @ slopes(self.log_n - self.centre, self.alpha, self.beta)[1] / 2)

    def terms(self, log_n: ArrayLike) -> np.ndarray:
        """Return the three terms at (...) sizes, (..., 3)."""
        return terms(np.asarray(log_n) - self.centre, self.alpha, self.beta)

    def gradients(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the derivatives of log N* and of L* by the coefficients, (3,) each."""
        u = self.log_n - self.centre
        first, second = slopes(u, self.alpha, self.beta)
        # The slope is zero at the minimum, so an error of its place costs the loss nothing.
        return -first / (self.coefficients @ second), terms(u, self.alpha, self.beta)

    def variances(self) -> tuple[float, float]:
        """Return the variances of log N* and of L* given the shape, in units of that of one run (delta method)."""
        of_n, of_loss = self.gradients()
        return float(of_n @ self.unscaled @ of_n), float(of_loss @ self.unscaled @ of_loss)

    def __call__(self, log_n: ArrayLike) -> np.ndarray:
        """Return the fitted loss at sizes, nats."""
        return self.terms(log_n) @ self.coefficients


@dataclass(frozen=True)
class Points:
    """The runs of one budget."""

    log_n: np.ndarray  # (runs,) natural logarithms of the sizes, at least three different ones
    loss: np.ndarray  # (runs,) nats per token

    @property
    def centre(self) -> float:
        """The middle of the sizes, around which the terms are nearly orthogonal."""
        return float(np.unique(self.log_n).mean())


def terms(u: ArrayLike, alpha: ArrayLike, beta: ArrayLike) -> np.ndarray:
    """Return three functions that span 1, exp(-alpha u) and exp(beta u), and are 1, u, u^2 near zero, (..., 3).

    Args:
      u: (...) log N - centre.
      alpha: (...) of a broadcastable shape, as is `beta`.
      beta: both are positive.
    """
    u, alpha, beta = np.broadcast_arrays(*(np.asarray(x, float) for x in (u, alpha, beta)))
    falling, rising, total = np.expm1(-alpha * u), np.expm1(beta * u), alpha + beta
    return np.stack([np.ones_like(u), (rising - falling) / total, 2 / total * (falling / alpha + rising / beta)], -1)


def slopes(u: float, alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and second derivatives of `terms` by u, (3,) each."""
    falling, rising, total = np.exp(-alpha * u), np.exp(beta * u), alpha + beta
    first = np.array([0.0, beta * rising + alpha * falling, 2 * (rising - falling)]) / total
    second = np.array([0.0, beta**2 * rising - alpha**2 * falling, 2 * (beta * rising + alpha * falling)]) / total
    return first, second


def minimum(coefficients: np.ndarray, alpha: ArrayLike, beta: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the minima of curves and the losses there, NaN for those that rise or fall all the way.

    Args:
      coefficients: (..., 3) of `terms`.
      alpha: (...) of a broadcastable shape, as is `beta`.
      beta: both are positive.

    Returns:
      (...) u of the minimum, and (...) the loss there.
    """
    _, b, c = np.moveaxis(np.asarray(coefficients, float), -1, 0)
    # The coefficients of exp(-alpha u) and exp(beta u), times alpha and beta and a common factor.
    falling, rising = 2 * c - alpha * b, 2 * c + beta * b
    exists = (falling > 0) & (rising > 0)
    u = (np.log(np.where(exists, falling, np.nan)) - np.log(np.where(exists, rising, np.nan))) / np.add(alpha, beta)
    return u, (coefficients * terms(u, alpha, beta)).sum(-1)


def curve(points: Points, alpha: float, beta: float) -> Curve:
    """Fit the curve of one budget, given its shape, each run with the same weight."""
    design = terms(points.log_n - points.centre, alpha, beta)
    inverse = np.linalg.pinv(design)
    coefficients = inverse @ points.loss
    return Curve(points.centre, alpha, beta, coefficients, inverse @ inverse.T, points.loss - design @ coefficients)


def fit_shape(budgets: Sequence[Points], noise: float | None, *, misfit: bool = False) -> Shape:
    """Fit the shape that all budgets of an objective share, by variable projection (Golub and Pereyra 1973).

    What is minimised is the sum of squared residuals of the best curves, over the variance of a run, plus the prior.

    Args:
      budgets: the runs of each budget that has three sizes.
      noise: the noise of a run, nats; None if unknown: the variance is then that of the scatter about the curves.
      misfit: take the variance of that scatter if it is larger than that of the noise.
    """
    surplus = sum(len(points.loss) - 3 for points in budgets)
    # Seeds of one cell say nothing of the shape, so it takes sizes. Two that are left over can be fitted exactly, so
    # they show a scatter beside a noise, and none by themselves.
    known = sum(len(np.unique(points.log_n)) - 3 for points in budgets) > (2 if noise is None else 0)
    best, decided, sd = np.full(2, TYPICAL), np.zeros(2), noise
    if not known and noise is None or not budgets:
        return _shape(budgets, best, None, decided, None, 0)
    floor = EXACT * float(np.mean([points.loss.mean() for points in budgets]))

    def scatter() -> float:
        square_sum = float((_residuals(budgets, best) ** 2).sum())
        return max(float(np.sqrt(square_sum / _spare(surplus, decided)[0])), floor)

    for _ in range(12):
        sd = max(noise or 0.0, scatter() if known and (misfit or noise is None) else 0.0)
        before = *best, *decided
        fit = optimize.least_squares(
            lambda q, sd=sd: np.append(_residuals(budgets, q) / sd, (q - TYPICAL) / WIDTH),
            best,
            method="lm",
            **dict.fromkeys(("xtol", "ftol", "gtol"), 1e-6 if noise else 1e-13),
        )
        best, decided = fit.x, _decided(fit.jac[:-2])
        if np.abs(np.subtract(before, (*best, *decided))).max() < (1e-3 if noise else 1e-6):
            break
    best = np.clip(best, *BOUNDS)
    return _shape(budgets, best, sd, decided, scatter() if known else None, _spare(surplus, decided)[1] if known else 0)


def _residuals(budgets: Sequence[Points], q: np.ndarray) -> np.ndarray:
    """Return the residuals of the best curves with log alpha and log beta `q`, (runs,) nats."""
    rest = []
    alpha, beta = np.exp(np.clip(q, *BOUNDS))
    for points in budgets:
        orthogonal = np.linalg.qr(terms(points.log_n - points.centre, alpha, beta))[0]
        rest.append(points.loss - orthogonal @ (orthogonal.T @ points.loss))
    return np.concatenate(rest)


def _decided(jacobian: np.ndarray) -> np.ndarray:
    """Return how far the losses decide the shape along the axes of its posterior, (2,) between 0 and 1.

    Their sum is the effective number of parameters: 2 less the trace of the prior's precision times the posterior's
    covariance.

    Args:
      jacobian: (runs, 2) derivatives of the residuals by log alpha and log beta, over the noise.
    """
    precisions = np.maximum(np.linalg.eigvalsh(jacobian.T @ jacobian), 0.0)
    return precisions / (precisions + WIDTH**-2)


def _spare(surplus: int, decided: np.ndarray) -> tuple[float, float]:
    """Return by what to divide a sum of squared residuals for their variance, and its degrees of freedom.

    Where the prior decides the shape, it is known, and takes no degree of freedom from the residuals. An axis that the
    losses decide by h leaves residuals of 1 - h times the variance of the others, and the degrees of freedom of a sum
    of such parts are those of Satterthwaite (1946).
    """
    # One residual that is left over decides one axis, and what it seems to say of the other is rounding.
    remaining = np.maximum(1 - np.sort(decided)[::-1][:surplus], SPARED)
    others = surplus - len(remaining)
    divisor = others + float(remaining.sum())
    return divisor, divisor**2 / (others + float((remaining**2).sum()))


def _shape(
    budgets: Sequence[Points],
    best: np.ndarray,
    sd: float | None,
    decided: np.ndarray,
    scatter: float | None,
    dof: float,
) -> Shape:
    """Return the shape with these logarithms of alpha and beta, and what it could have been."""
    grid, weights = _allowed(budgets, best, sd)
    return Shape(float(np.exp(best[0])), float(np.exp(best[1])), scatter, dof, decided, grid, weights)


def _allowed(budgets: Sequence[Points], best: np.ndarray, sd: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Return shapes that the losses and the prior allow, (shapes, 2), and their weights.

    They lie on a grid along the axes of the posterior at its maximum, and are weighted by the posterior itself.
    """

    def distance(q: np.ndarray) -> np.ndarray:  # (..., 2) -> (...) minus twice the log posterior
        total = (((q - TYPICAL) / WIDTH) ** 2).sum(-1)
        return total + (0.0 if sd is None else _square_sum(budgets, np.exp(q)) / sd**2)

    step, at = 1e-2, distance(best)
    shifts = step * np.array([[1, 0], [0, 1], [1, 1]])
    up, down = distance(best + shifts), distance(best - shifts)
    diagonal = (up + down - 2 * at)[:2] / step**2
    mixed = ((up + down - 2 * at)[2] / step**2 - diagonal.sum()) / 2
    values, vectors = np.linalg.eigh(np.array([[diagonal[0], mixed], [mixed, diagonal[1]]]) / 2)
    # No direction is wider than the prior, but for rounding.
    axes = vectors * np.minimum(1 / np.sqrt(np.maximum(values, 1e-300)), WIDTH)
    along = np.linspace(-REACH, REACH, POINTS)
    grid = best + np.stack(np.meshgrid(along, along), -1).reshape(-1, 2) @ axes.T
    grid = np.clip(grid, *BOUNDS)
    distances = distance(grid)
    weights = np.exp(-(distances - distances.min()) / 2)
    return np.exp(grid), weights / weights.sum()


def _square_sum(budgets: Sequence[Points], shapes: np.ndarray) -> np.ndarray:
    """Return the sum of squared residuals of the best curves of each shape, (...) for shapes (..., 2)."""
    total = np.zeros(shapes.shape[:-1])
    for points in budgets:
        design = terms(points.log_n - points.centre, shapes[..., :1], shapes[..., 1:])
        fitted = design @ (np.linalg.pinv(design) @ points.loss[:, None])
        total += ((points.loss[:, None] - fitted) ** 2).sum((-2, -1))
    return total
