"""Intervals of everything that is computed from the fits, by a parametric bootstrap.

The bootstrap draws the noise variance as well as the fits, so that few repeated seeds make wide intervals, as Student's
t does; for log N* its quantiles are Fieller's exact limits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from diffusionlm.scaling.laws.curves import Points, Shape, minimum, terms
from diffusionlm.scaling.laws.noise import CommonError, Noise
from diffusionlm.scaling.laws.random_effects import RandomEffect

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95% interval: None where the noise is unknown, infinite where data leave it open."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends, or None where the noise is unknown."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def bounded(self) -> bool:
        """True if the interval is known and finite."""
        return self.interval is not None and bool(np.isfinite(self.interval).all())

    @property
    def width(self) -> float:
        """The length of the interval; infinite where it is unknown or unbounded."""
        return float(self.interval[1] - self.interval[0]) if self.interval is not None else float("inf")

    def excludes(self, value: float) -> bool:
        """Return True if the interval is known and does not contain a value."""
        return self.interval is not None and not self.interval[0] <= value <= self.interval[1]


class Fit(Protocol):
    """A fit by linear least squares."""

    @property
    def coefficients(self) -> np.ndarray:
        """(terms,) The first is the constant one, nats."""
        ...

    @property
    def unscaled(self) -> np.ndarray:
        """(terms, terms) Their covariance, in units of the variance of one run."""
        ...


class Bootstrap:
    """Draws of what the fits could have been, shared by everything that is derived from them.

    For each objective the noise variance is drawn given its estimate (s^2 nu / chi^2_nu), then the coefficients of
    every fit given the variance, then the common shift of the masks. These are draws from the posterior under the
    usual flat prior, so quantiles of a coefficient are Student's t.
    """

    def __init__(self, noises: Mapping[str, Noise | None], draws: int, seed: int):
        self.size = draws
        self._rng = np.random.default_rng(seed)
        self._sds: dict[str, np.ndarray] = {}
        self._ratios: dict[str, np.ndarray] = {}  # of drawn variances to their estimates
        drawn: dict[object, np.ndarray] = {}  # objectives that share an estimate share its draws
        for objective, noise in noises.items():
            if noise is not None:
                key = noise if noise.pooled else (noise, objective)
                if key not in drawn:
                    drawn[key] = noise.dof / self._rng.chisquare(noise.dof, draws)
                self._ratios[objective] = drawn[key]
                self._sds[objective] = noise.sd * np.sqrt(drawn[key])

    def coefficients(self, objective: str, fits: Sequence[Fit], common: CommonError) -> np.ndarray:
        """Draw the coefficients of the fits of one objective.

        Args:
          objective: an objective whose noise is known.
          fits: its parabolas, or other fits with one number of terms.
          common: the noise that all its losses share.

        Returns:
          (draws, fits, terms) coefficients.
        """
        sds, terms = self._sds[objective], len(fits[0].coefficients)
        drawn = np.empty((self.size, len(fits), terms))
        for i, fit in enumerate(fits):
            values, vectors = np.linalg.eigh(fit.unscaled)
            root = vectors * np.sqrt(np.maximum(values, 0))
            drawn[:, i] = fit.coefficients + sds[:, None] * (self._rng.standard_normal((self.size, terms)) @ root.T)
        if common.stderr > 0:
            drawn[:, :, 0] += common.stderr * self._rng.standard_t(common.dof, self.size)[:, None]
        return drawn

    def curves(
        self, objective: str, shape: Shape, budgets: Sequence[Points], common: CommonError
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw the minima of the curves of one objective: the shape given the losses, then the curves given the shape.

        Args:
          objective: an objective whose noise is known.
          shape: the shape of its curves, and what it could have been.
          budgets: the runs of each curve.
          common: the noise that all its losses share.

        Returns:
          (draws, budgets) log N* and L*, NaN for curves without a minimum.
        """
        chosen = self._rng.choice(len(shape.weights), self.size, p=shape.weights)
        alpha, beta = shape.grid.T
        log_n, loss = np.empty((2, self.size, len(budgets)))
        for i, points in enumerate(budgets):
            design = terms(points.log_n - points.centre, alpha[:, None], beta[:, None])  # (shapes, runs, 3)
            inverse = np.linalg.pinv(design)
            values, vectors = np.linalg.eigh(inverse @ inverse.swapaxes(1, 2))
            roots = vectors * np.sqrt(np.maximum(values, 0))[:, None]
            errors = np.einsum("dij,dj->di", roots[chosen], self._rng.standard_normal((self.size, 3)))
            drawn = (inverse @ points.loss)[chosen] + self._sds[objective][:, None] * errors
            u, loss[:, i] = minimum(drawn, alpha[chosen], beta[chosen])
            log_n[:, i] = points.centre + u
        if common.stderr > 0:
            loss += common.stderr * self._rng.standard_t(common.dof, self.size)[:, None]
        return log_n, loss

    def effects(self, objective: str, effect: RandomEffect | None, points: int) -> np.ndarray:
        """Draw the random effects of optima about their law, (draws, points) in its logarithms."""
        if effect is None or effect.sd == 0:
            return np.zeros((self.size, points))
        drawn = effect.draw(self._rng, self._ratios[objective])
        return drawn[:, None] * self._rng.standard_normal((self.size, points))

    def new_run(self, objective: str) -> np.ndarray:
        """Draw the seed noise of one more run, (draws,) nats."""
        return self._sds[objective] * self._rng.standard_normal(self.size)


def estimate(
    value: float,
    draws: np.ndarray | None = None,
    transform: Callable[[float], ArrayLike] = float,
    *,
    has_minimum: bool = False,
) -> Estimate:
    """Return a number with the central 95% interval of its draws.

    A draw that is NaN (a parabola without a minimum) could lie anywhere, so it counts as lying beyond both ends. This
    is how Fieller's interval becomes unbounded when the curvature is not significant.

    Args:
      value: the estimate.
      draws: (draws,) what it could have been; None: there is no interval.
      transform: an increasing function for all numbers, such as `np.exp` for logarithms.
      has_minimum: leave NaN out, because the optimum goes into a law and so is known to exist.
    """
    if draws is None:
        return Estimate(_float(transform(value)))
    missing = np.isnan(draws)
    if has_minimum and not missing.all():
        draws, missing = draws[~missing], missing[~missing]
    tail = (1 - CONFIDENCE) / 2
    low = np.quantile(np.where(missing, -np.inf, draws), tail, method="lower")
    high = np.quantile(np.where(missing, np.inf, draws), 1 - tail, method="higher")
    with np.errstate(over="ignore"):  # a size of exp(1000) is as good as unbounded
        low, high = (_float(transform(end)) if np.isfinite(end) else float(end) for end in (low, high))
    return Estimate(_float(transform(value)), low, high)


def _float(value: ArrayLike) -> float:
    return float(np.asarray(value))
