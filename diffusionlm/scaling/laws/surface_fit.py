"""The surface L(N, D) by variable projection, with intervals from its Jacobian and from the profile of its exponent.

Given alpha and beta the surface is linear in E, A and B, so these are found by non-negative least squares, and only
alpha and beta by search (Golub and Pereyra 1973; 2603.22339 fits it so, as VPNLS). It is exact on exact surfaces,
whatever the grid, and takes runs of no budget. It assumes that one surface holds everywhere: where that is not so, its
exponents are off by more than their intervals say, and the scatter of the losses about it is larger than that about
IsoFLOP curves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from scipy import optimize, special, stats

from diffusionlm.scaling.laws.arguments import check_runs
from diffusionlm.scaling.laws.bootstrap import CONFIDENCE, Estimate
from diffusionlm.scaling.laws.curves import EXACT
from diffusionlm.scaling.laws.loss_surface import BOUNDS, LossSurface
from diffusionlm.scaling.laws.noise import Noise
from diffusionlm.scaling.sweep.results import CellResult

STARTS = (0.2, 0.6)  # of alpha and beta
TERMS = 5


@dataclass(frozen=True)
class SurfaceFit(LossSurface):
    """A surface that was fitted, and what is known of it."""

    scatter: float  # standard deviation of the losses about the surface, nats
    dof: int  # degrees of freedom of the scatter
    sd: float  # of a run, as the intervals use it: the larger of the scatter and of the noise
    sd_dof: float  # degrees of freedom of that one
    exponent: Estimate  # of N*: its profile interval
    at_bound: bool  # one of the five numbers is, or the losses do not change
    residuals: np.ndarray = field(repr=False)  # (runs,) measured minus fitted, nats
    # (5, 5) covariance of E, log A, log B, alpha and beta, with A and B at the centre of the runs, in units of the
    # variance of a run; zero for those at a bound.
    unscaled: np.ndarray = field(repr=False)
    centre: tuple[float, float] = field(repr=False)  # log N and log D

    @property
    def covariance(self) -> np.ndarray | None:
        """(5, 5) of E, log A, log B, alpha and beta, with A and B at the centre of the runs; None at a bound."""
        return None if self.at_bound else self.sd**2 * self.unscaled

    @property
    def determined(self) -> bool:
        """True if no parameter is at a bound, and the interval of the exponent of N* lies between 0 and 1."""
        ends = self.exponent.interval
        return not self.at_bound and ends is not None and 0.0 < ends[0] and ends[1] < 1.0

    def params_at(self, c: float) -> Estimate:
        """Return N* at C FLOPs, with the interval of the delta method."""
        value = self.log_params(c)
        if self.at_bound:
            return Estimate(float(np.exp(value)))
        half = self._half(self._gradient(lambda q: self._at(q).log_params(c)))
        return Estimate(float(np.exp(value)), *(float(np.exp(value + s * half)) for s in (-1.0, 1.0)))

    def loss_at(self, c: float) -> Estimate:
        """Return L* at C FLOPs, with the interval of the delta method."""
        n, d, value = self.optimum(c)  # whose own error costs nothing
        return self._around(value, self._loss_gradient(n, d))

    def loss_of_run(self, n: float, d: float) -> Estimate:
        """Return the loss of one more run, with its prediction interval."""
        return self._around(float(self.loss(n, d)), self._loss_gradient(n, d), self.sd**2)

    def leverages(self, log_n: np.ndarray, log_d: np.ndarray) -> np.ndarray:
        """Return the share of each run's variance that its own loss takes in its fitted value, (runs,)."""
        jacobian = _jacobian(self._parameters, log_n - self.centre[0], log_d - self.centre[1])
        return np.einsum("ri,ij,rj->r", jacobian, self.unscaled, jacobian)

    @property
    def _parameters(self) -> np.ndarray:
        log_a, log_b = self.log_a - self.alpha * self.centre[0], self.log_b - self.beta * self.centre[1]
        return np.array([self.e, log_a, log_b, self.alpha, self.beta])

    def _at(self, q: np.ndarray) -> LossSurface:
        e, a, b, alpha, beta = map(float, q)
        return LossSurface(e, a + alpha * self.centre[0], b + beta * self.centre[1], alpha, beta, self.k)

    def _gradient(self, function) -> np.ndarray:
        q = self._parameters
        steps = 1e-5 * np.maximum(np.abs(q), 0.1)
        return np.array(
            [(function(q + s) - function(q - s)) / (2 * h) for s, h in zip(np.diag(steps), steps, strict=True)]
        )

    def _loss_gradient(self, n: float, d: float) -> np.ndarray:
        place = np.array([np.log(n) - self.centre[0]]), np.array([np.log(d) - self.centre[1]])
        return _jacobian(self._parameters, *place)[0]

    def _around(self, value: float, gradient: np.ndarray, variance: float = 0.0) -> Estimate:
        if self.at_bound:
            return Estimate(value)
        half = self._half(gradient, variance)
        return Estimate(value, value - half, value + half)

    def _half(self, gradient: np.ndarray, variance: float = 0.0) -> float:
        """Return half of the width of the interval of what has this gradient, with a variance of its own."""
        quantile = stats.t.ppf(0.5 + CONFIDENCE / 2, self.sd_dof)
        return float(quantile * np.sqrt(self.sd**2 * (gradient @ self.unscaled @ gradient) + variance))


def fit_surface(
    results: Sequence[CellResult],
    noise: Noise | None = None,
    *,
    profile: bool = True,
) -> SurfaceFit | None:
    """Fit the surface to all runs of one objective, each with the same weight.

    Args:
      results: the runs.
      noise: the noise of a run; intervals use the scatter about the surface if that is larger, or if it is None.
      profile: also find the profile interval of the exponent of N*.

    Returns:
      The fit, or None with fewer than seven different cells.

    Raises:
      UserError: `results` is no list of runs.
    """
    check_runs(results)
    if len({(r.params, r.tokens) for r in results}) < TERMS + 2:
        return None
    log_n, log_d = np.log([r.params for r in results]), np.log([r.tokens for r in results])
    loss, centre = np.array([r.loss for r in results]), (float(log_n.mean()), float(log_d.mean()))
    problem = Projection(log_n - centre[0], log_d - centre[1], loss)
    alpha, beta = np.exp(problem.minimise())
    (e, a, b), residuals = problem.project(alpha, beta)
    dof = len(loss) - TERMS
    scatter = float(np.sqrt((residuals**2).sum() / dof))
    sd, sd_dof = max((scatter, float(dof)), (noise.sd, noise.dof) if noise else (0.0, 0.0))
    free = problem.free(alpha, beta, e, a, b)
    with np.errstate(divide="ignore"):
        log_a, log_b = (float(np.log(0.0 if none else x)) for x, none in zip((a, b), ~free[1:3], strict=True))
    jacobian = free * _jacobian(np.array([e, log_a, log_b, alpha, beta]), problem.x, problem.y)
    exponent = Estimate(float(beta / (alpha + beta)))
    if not free[1:3].all():
        exponent = Estimate(exponent.value, 0.0, 1.0)
    elif profile:
        exponent = problem.profile(float(alpha), float(beta), sd, sd_dof)
    return SurfaceFit(
        e=float(e),
        log_a=float(log_a + alpha * centre[0]),
        log_b=float(log_b + beta * centre[1]),
        alpha=float(alpha),
        beta=float(beta),
        k=float(np.exp(np.mean(np.log([r.flops for r in results]) - log_n - log_d))),
        scatter=scatter,
        dof=dof,
        sd=sd,
        sd_dof=sd_dof,
        exponent=exponent,
        at_bound=not free.all(),
        residuals=residuals,
        unscaled=np.linalg.pinv(jacobian.T @ jacobian),
        centre=centre,
    )


@dataclass(frozen=True)
class Projection:
    """The least-squares problem in alpha and beta alone."""

    x: np.ndarray  # (runs,) centred log N
    y: np.ndarray  # (runs,) centred log D
    loss: np.ndarray  # (runs,) nats

    def exponentials(self, alpha: float, beta: float) -> np.ndarray:
        """Return the terms of A and B, (runs, 2), which are 1 at the centre."""
        return np.stack([np.exp(-alpha * self.x), np.exp(-beta * self.y)], 1)

    def project(self, alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the best E, A and B, none of them negative, (3,), and the residuals, (runs,)."""
        design = np.column_stack([np.ones_like(self.x), self.exponentials(alpha, beta)])
        coefficients = np.linalg.lstsq(design, self.loss)[0]
        if coefficients.min() < 0:
            coefficients = optimize.nnls(design, self.loss)[0]
        return coefficients, self.loss - design @ coefficients

    def free(self, alpha: float, beta: float, e: float, a: float, b: float) -> np.ndarray:
        """Return which of E, A, B, alpha and beta are at no bound, (5,) booleans.

        An exponential that moves no loss by more than rounding has a coefficient of zero, and any exponent.
        """
        effects = np.array([a, b]) * np.ptp(self.exponentials(alpha, beta), 0)
        seen = effects > EXACT * np.abs(self.loss).mean()
        ends = np.exp(BOUNDS)
        inner = [1.01 * ends[0] < x < 0.99 * ends[1] for x in (alpha, beta)]
        return np.array([e > 0, *seen, *(seen & inner)])

    def minimise(self) -> np.ndarray:
        """Return the best log alpha and log beta: roughly from a grid of starts, and from the best of these exactly."""

        def search(start: np.ndarray, tolerance: float) -> optimize.OptimizeResult:
            return optimize.least_squares(
                lambda q: self.project(*np.exp(np.clip(q, *BOUNDS)))[1],
                start,
                method="lm",
                xtol=tolerance,
                ftol=tolerance,
                gtol=tolerance,
            )

        rough = [search(np.log(pair), 1e-4) for pair in product(STARTS, STARTS)]
        return np.clip(search(min(rough, key=lambda fit: fit.cost).x, 1e-14).x, *BOUNDS)

    def profile(self, alpha: float, beta: float, sd: float, dof: float) -> Estimate:
        """Return the exponent of N* with its profile interval: those at which the best fit is not much worse.

        A value is in it if the sum of squares grows by at most t^2 times the variance of a run, with the quantile t of
        Student's distribution, when alpha + beta is free and beta / (alpha + beta) is held there.
        """
        best, total = beta / (alpha + beta), float(np.log(alpha + beta))
        limit = (stats.t.ppf(0.5 + CONFIDENCE / 2, dof) * sd) ** 2
        smallest = float((self.project(alpha, beta)[1] ** 2).sum())

        def excess(logit: float) -> float:
            share = special.expit(logit)

            def square_sum(log_total: float) -> float:
                sizes = np.exp(log_total) * np.array([1 - share, share])
                return float((self.project(*sizes)[1] ** 2).sum())

            best_total = optimize.minimize_scalar(square_sum, bounds=(total - 2.5, total + 2.5), method="bounded")
            return float(best_total.fun - smallest - limit)

        if limit < 1e-20 * float(self.loss @ self.loss):  # exact losses
            return Estimate(best, best, best)
        ends, place = [], float(special.logit(best))
        if excess(place) > 0:  # the losses are exact to the precision of this search
            return Estimate(best, best, best)
        for end, beyond in ((-6.0, 0.0), (6.0, 1.0)):
            outside = next((s for s in np.linspace(0, 1, 13)[1:] if excess(place + s * (end - place)) > 0), None)
            if outside is None:
                ends.append(beyond)
                continue
            inner, outer = place + (outside - 1 / 12) * (end - place), place + outside * (end - place)
            logit = optimize.brentq(excess, inner, outer, xtol=1e-4)
            ends.append(special.expit(logit))
        return Estimate(best, *map(float, ends))


def _jacobian(q: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the derivatives of the loss by E, log A, log B, alpha and beta, (runs, 5)."""
    _, log_a, log_b, alpha, beta = q
    by_a, by_b = np.exp(log_a - alpha * x), np.exp(log_b - beta * y)
    return np.stack([np.ones_like(x), by_a, by_b, -x * by_a, -y * by_b], 1)
