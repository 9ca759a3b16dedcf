"""Approach 3 of Hoffmann et al. (2203.15556, section 3.3): L(N, D) = E + A / N^alpha + B / D^beta through all cells.

A, B and E trade off against each other and against the exponents over any range that a sweep can afford, so they are
fitted and shown, and nothing is built on them. What the fit does determine is the exponents of N*(C) and D*(C), and L*.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import optimize, special

from diffusionlm.scaling.sweep.results import CellResult

DELTA = 1e-3  # of the Huber loss on residuals of log L, as published


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

    @property
    def determined(self) -> bool:
        """Whether the exponents mean anything, so far as the noise tells."""
        exponents = self.params_exponent, self.tokens_exponent
        errors = self.stderr or (0.0, 0.0)
        # One that is 0 or NaN is of a fit that diverged.
        return all(e > 1e-3 and s <= e / 2 for s, e in zip(errors, exponents, strict=True))

    def optimum(self, c: float) -> tuple[float, float, float]:
        """N*, D* and L* at C."""
        log_g = (np.log(self.alpha / self.beta) + self.log_a - self.log_b) / (self.alpha + self.beta)
        log_n = log_g + self.params_exponent * np.log(c / self.k)
        log_d = np.log(c / self.k) - log_n
        return float(np.exp(log_n)), float(np.exp(log_d)), float(self.loss(np.exp(log_n), np.exp(log_d)))

    def loss(self, n: float, d: float) -> float:
        """L(N, D), nats per token."""
        return self.e + np.exp(self.log_a - self.alpha * np.log(n)) + np.exp(self.log_b - self.beta * np.log(d))


def fit(results: Sequence[CellResult], noise_sd: float | None = None, refits: int = 40) -> Parametric | None:
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
    rough = min((_minimise(start, x, y, np.log(loss), 2) for start in _starts(loss)), key=lambda found: found.fun)
    best = _minimise(rough.x, x, y, np.log(loss), 10)
    a, b, e = best.x[:3]
    alpha, beta = np.exp(best.x[3:])
    predicted = np.exp(_log_loss(best.x, x, y)[0])
    stderr = None
    if noise_sd:
        rng = np.random.default_rng(0)
        again = [
            _minimise(best.x, x, y, np.log(predicted + noise_sd * rng.standard_normal(len(loss))), 2).x
            for _ in range(refits)
        ]
        exponents = [(special.expit(q[4] - q[3]), special.expit(q[3] - q[4])) for q in again]
        stderr = tuple(np.std(exponents, axis=0, ddof=1).tolist())
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
    for alpha, beta, share, part in product((0.2, 0.6), (0.2, 0.6), (0.2, 0.7), (0.3, 0.7)):
        e = share * loss.min()
        rest = loss.mean() - e
        starts.append(np.log([part * rest, (1 - part) * rest, e, alpha, beta]))
    return starts


def _log_loss(q: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log L of the runs, and its (runs, 5) derivatives by q = log of (A, B, E, alpha, beta), A and B at x = y = 0."""
    a, b, e = q[:3]
    alpha, beta = np.exp(q[3:])
    terms = np.stack([a - alpha * x, b - beta * y, np.full_like(x, e)], 1)
    total = np.logaddexp.reduce(terms, axis=1)
    shares = np.exp(terms - total[:, None])
    return total, np.column_stack([shares, -alpha * x * shares[:, 0], -beta * y * shares[:, 1]])


def _huber(q: np.ndarray, x: np.ndarray, y: np.ndarray, log_loss: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum (a mean is so small that the optimiser stops early, 2404.10102) of Huber losses over delta^2; gradient."""
    predicted, derivatives = _log_loss(q, x, y)
    residuals = (predicted - log_loss) / DELTA
    gradient = (np.clip(residuals, -1, 1) / DELTA) @ derivatives
    return float(special.huber(1.0, residuals).sum()), gradient


def _minimise(
    start: np.ndarray, x: np.ndarray, y: np.ndarray, log_loss: np.ndarray, rounds: int
) -> optimize.OptimizeResult:
    """L-BFGS in coordinates where the Gauss-Newton matrix is the identity, for E and exponents are nearly collinear."""
    best, value = start, np.inf
    for _ in range(rounds):  # the coordinates are those of its start, so it starts again where it ended
        values, vectors = np.linalg.eigh((matrix := _log_loss(best, x, y)[1]).T @ matrix)
        root = vectors / np.sqrt(np.maximum(values, 1e-9 * values.max()))

        def objective(p, origin=best, root=root):
            value, gradient = _huber(origin + root @ p, x, y, log_loss)
            return value, root.T @ gradient

        found = optimize.minimize(objective, np.zeros(5), method="L-BFGS-B", jac=True, options={"ftol": 1e-12})
        best = best + root @ found.x
        if not found.fun < value * (1 - 1e-9) - 1e-9:
            break
        value = found.fun
    return optimize.OptimizeResult(x=best, fun=min(value, float(found.fun)))
