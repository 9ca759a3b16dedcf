"""Approach 3 of Hoffmann et al. (2203.15556, section 3.3): L(N, D) = E + A / N^alpha + B / D^beta for all cells at once.

A, B and E trade off against each other and against the exponents over any range that a sweep can afford, so they are
fitted and shown, and nothing is built on them. What the fit does determine is the exponents of N*(C) and D*(C), and L*.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import optimize, special

from diffusionlm.scaling.results import CellResult

DELTA = 1e-3  # of the Huber loss on residuals of log L, as published
BOUNDS = [(None, None)] * 3 + [(1e-3, 3.0)] * 2


@dataclass(frozen=True)
class Parametric:
    """The fitted surface, with C = k N D."""

    e: float  # nats per token
    log_a: float
    log_b: float
    alpha: float
    beta: float
    k: float  # FLOPs per parameter and token: 6, or what the recipe's count comes to on average
    objective: float  # sum of Huber losses of log L, over delta squared
    residuals: np.ndarray  # (runs,) of log L, in the order of the results
    stderr: tuple[float, float] | None  # of params_exponent and tokens_exponent; None where the noise is unknown

    @property
    def params_exponent(self) -> float:
        """a of N* = G (C / k)^a (Hoffmann et al., Eq. 4)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def tokens_exponent(self) -> float:
        """b of D* = G^-1 (C / k)^b."""
        return self.alpha / (self.alpha + self.beta)

    def optimum(self, c: float) -> tuple[float, float, float]:
        """N*, D* and L* at C."""
        log_g = (np.log(self.alpha / self.beta) + self.log_a - self.log_b) / (self.alpha + self.beta)
        log_n = log_g + self.params_exponent * np.log(c / self.k)
        log_d = np.log(c / self.k) - log_n
        return float(np.exp(log_n)), float(np.exp(log_d)), float(self.loss(np.exp(log_n), np.exp(log_d)))

    def loss(self, n: float, d: float) -> float:
        """L(N, D), nats per token."""
        return self.e + np.exp(self.log_a - self.alpha * np.log(n)) + np.exp(self.log_b - self.beta * np.log(d))


def fit(results: Sequence[CellResult], noise_sd: float | None = None, refits: int = 60) -> Parametric | None:
    """Fits the surface to all runs of one objective; None with fewer than six different cells (it has five numbers).

    Args:
      results: of one objective.
      noise_sd: between seeds, nats, for standard errors by parametric bootstrap.
      refits: of that bootstrap, each started from the fit.
    """
    if len({(r.params, r.tokens) for r in results}) < 6:
        return None
    log_n, log_d = np.log([r.params for r in results]), np.log([r.tokens for r in results])
    loss = np.array([r.loss for r in results])
    centre = log_n.mean(), log_d.mean()  # of both, or the level of a term and its exponent are nearly one number
    x, y = log_n - centre[0], log_d - centre[1]
    best = min((_minimise(start, x, y, np.log(loss)) for start in _starts(loss)), key=lambda found: found.fun)
    a, b, e, alpha, beta = best.x
    predicted = np.exp(_log_loss(best.x, x, y)[0])
    stderr = None
    if noise_sd:
        rng = np.random.default_rng(0)
        again = [
            _minimise(best.x, x, y, np.log(predicted + noise_sd * rng.standard_normal(len(loss)))).x
            for _ in range(refits)
        ]
        exponents = np.array([(q[4] / (q[3] + q[4]), q[3] / (q[3] + q[4])) for q in again])
        stderr = tuple(exponents.std(0, ddof=1).tolist())
    return Parametric(
        float(np.exp(e)),
        float(a + alpha * centre[0]),
        float(b + beta * centre[1]),
        float(alpha),
        float(beta),
        float(np.exp(np.mean(np.log([r.flops for r in results]) - log_n - log_d))),
        float(best.fun),
        np.log(loss) - np.log(predicted),
        stderr,
    )


def _starts(loss: np.ndarray) -> list[np.ndarray]:
    """A grid over both exponents, the irreducible share of the least loss, and how the rest divides into two terms."""
    starts = []
    for alpha, beta, share, part in product((0.2, 0.4, 0.8), (0.2, 0.4, 0.8), (0.2, 0.5, 0.8), (0.3, 0.7)):
        e = share * loss.min()
        rest = loss.mean() - e
        starts.append(np.array([np.log(part * rest), np.log((1 - part) * rest), np.log(e), alpha, beta]))
    return starts


def _log_loss(q: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log L of the runs, and the (3, runs) shares of the three terms in it."""
    a, b, e, alpha, beta = q
    terms = np.stack([a - alpha * x, b - beta * y, np.full_like(x, e)])
    total = special.logsumexp(terms, axis=0)
    return total, np.exp(terms - total)


def _objective(q: np.ndarray, x: np.ndarray, y: np.ndarray, log_loss: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum (a mean is so small that the optimiser stops early, 2404.10102) of Huber losses over delta^2; gradient."""
    predicted, shares = _log_loss(q, x, y)
    residuals = (predicted - log_loss) / DELTA
    slope = np.clip(residuals, -1, 1) / DELTA
    by_term = shares * slope
    gradient = np.array([*by_term.sum(1), -(by_term[0] @ x), -(by_term[1] @ y)])
    return float(special.huber(1.0, residuals).sum()), gradient


def _minimise(start: np.ndarray, x: np.ndarray, y: np.ndarray, log_loss: np.ndarray) -> optimize.OptimizeResult:
    return optimize.minimize(
        _objective,
        start,
        (x, y, log_loss),
        method="L-BFGS-B",
        jac=True,
        bounds=BOUNDS,
        options={"maxiter": 3000, "maxfun": 10_000, "ftol": 1e-13, "gtol": 1e-7},
    )
