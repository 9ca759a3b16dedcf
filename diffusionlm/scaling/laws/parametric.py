"""The parametric law L(N, D), fitted with a Huber loss (Hoffmann et al. 2203.15556, Approach 3).

A, B and E trade off against each other and against the exponents over any range that a sweep can afford, so they are
fitted and shown, and nothing is built on them. The fit does determine the exponents of N*(C) and D*(C), and L*.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import optimize, special

from diffusionlm.scaling.laws.arguments import check_runs
from diffusionlm.scaling.laws.loss_surface import LossSurface
from diffusionlm.scaling.sweep.results import CellResult

SMALLEST = 1e-3  # nats: an E below it is at its bound
UNCHANGED = 1e-9  # of a loss: a smaller effect of N or of D is rounding
DELTA = 1e-3  # where the Huber loss of residuals of log L becomes linear, as published


@dataclass(frozen=True)
class Parametric(LossSurface):
    """The fitted surface."""

    objective: float  # sum of the Huber losses of log L, in units of DELTA^2
    stderr: tuple[float, float]  # of params_exponent and tokens_exponent

    @property
    def determined(self) -> bool:
        """True if no standard error exceeds half of its exponent, and E is not at its bound of zero.

        With E at zero the surface is a sum of two power laws, and its optima are those of any surface that could fit.
        """
        exponents = self.params_exponent, self.tokens_exponent
        # An exponent of 0 or NaN comes from a fit that diverged.
        errors = all(e > 1e-3 and s <= e / 2 for s, e in zip(self.stderr, exponents, strict=True))
        return errors and self.e > SMALLEST


def fit(results: Sequence[CellResult], noise_sd: float | None = None, refits: int = 40) -> Parametric | None:
    """Fit the surface to all runs of one objective; None where it cannot be determined.

    It has five numbers, so it takes six different cells, and losses that change with both N and D.

    Args:
      results: the runs of one objective.
      noise_sd: the noise of a run, nats, for standard errors by a parametric bootstrap, which takes the scatter about
        the surface if that is larger; None: the errors are those of the Jacobian and of the scatter.
      refits: fits of that bootstrap, each started from the fit to the runs.

    Raises:
      UserError: `results` is no list of runs.
    """
    check_runs(results)
    if len({(r.params, r.tokens) for r in results}) < 6:
        return None
    log_n, log_d = np.log([r.params for r in results]), np.log([r.tokens for r in results])
    loss = np.array([r.loss for r in results])
    centre = log_n.mean(), log_d.mean()  # without centring, the level of a term and its exponent are nearly one number
    x, y = log_n - centre[0], log_d - centre[1]
    candidates = [_minimise(start, x, y, np.log(loss), evaluations=50) for start in _starts(loss)]
    rough = min(candidates, key=lambda candidate: candidate.cost)
    best = _minimise(rough.x, x, y, np.log(loss), evaluations=1000)
    a, b, e = best.x[:3]
    alpha, beta = np.exp(best.x[3:])
    by_exponents = _log_loss(best.x, x, y)[1][:, 3:]
    if (np.abs(by_exponents).max(0) < UNCHANGED).any():  # the losses do not change with N, or with D
        return None
    if noise_sd:
        square_sum = ((loss - np.exp(_log_loss(best.x, x, y)[0])) ** 2).sum()
        scatter = float(np.sqrt(square_sum / max(len(loss) - len(best.x), 1)))
        stderr = _bootstrap(best.x, x, y, max(noise_sd, scatter), refits)
    else:
        stderr = _jacobian_errors(best.x, x, y, np.log(loss))
    return Parametric(
        e=float(np.exp(e)),
        log_a=float(a + alpha * centre[0]),
        log_b=float(b + beta * centre[1]),
        alpha=float(alpha),
        beta=float(beta),
        k=float(np.exp(np.mean(np.log([r.flops for r in results]) - log_n - log_d))),
        objective=float(best.cost / DELTA**2),
        stderr=stderr,
    )


def _bootstrap(best: np.ndarray, x: np.ndarray, y: np.ndarray, noise_sd: float, refits: int) -> tuple[float, float]:
    """Return the standard errors of both exponents from fits to simulated noise."""
    rng, predicted = np.random.default_rng(0), np.exp(_log_loss(best, x, y)[0])
    exponents = []
    for _ in range(refits):
        noisy = predicted + noise_sd * rng.standard_normal(len(x))
        noisy = np.maximum(noisy, 0.1 * predicted)  # diverged runs make a noise that exceeds the losses
        *_, log_alpha, log_beta = _minimise(best, x, y, np.log(noisy), evaluations=1000).x
        exponents.append((special.expit(log_beta - log_alpha), special.expit(log_alpha - log_beta)))
    of_params, of_tokens = np.std(exponents, axis=0, ddof=1).tolist()
    return of_params, of_tokens


def _jacobian_errors(best: np.ndarray, x: np.ndarray, y: np.ndarray, log_loss: np.ndarray) -> tuple[float, float]:
    """Return the standard errors of both exponents from the residuals and the Jacobian of the fit."""
    predicted, jacobian = _log_loss(best, x, y)
    variance = ((log_loss - predicted) ** 2).sum() / max(len(x) - len(best), 1)
    covariance = variance * np.linalg.pinv(jacobian.T @ jacobian)
    a = special.expit(best[4] - best[3])
    # The derivatives of a = beta / (alpha + beta) by log beta and log alpha are a (1 - a) and its negative.
    error = float(a * (1 - a) * np.sqrt(np.array([-1, 1]) @ covariance[3:, 3:] @ np.array([-1, 1])))
    return error, error


def _starts(loss: np.ndarray) -> list[np.ndarray]:
    """Return a grid over both exponents, the share of E in the smallest loss, and how A and B divide the rest."""
    starts = []
    for alpha, beta, share, part in product((0.2, 0.6), (0.2, 0.6), (0.2, 0.7), (0.3, 0.7)):
        e = share * loss.min()
        rest = loss.mean() - e
        starts.append(np.log([part * rest, (1 - part) * rest, e, alpha, beta]))
    return starts


def _minimise(
    start: np.ndarray, x: np.ndarray, y: np.ndarray, log_loss: np.ndarray, evaluations: int
) -> optimize.OptimizeResult:
    """Minimise the sum (not the mean: 2404.10102) of the Huber losses of log L."""
    return optimize.least_squares(
        lambda q: _log_loss(q, x, y)[0] - log_loss,
        start,
        jac=lambda q: _log_loss(q, x, y)[1],  # pyright: ignore[reportArgumentType]  # its stubs know names only
        loss="huber",
        f_scale=DELTA,
        x_scale="jac",  # E and the exponents are nearly collinear
        ftol=1e-12,
        xtol=1e-12,
        gtol=1e-12,
        max_nfev=evaluations,
    )


def _log_loss(q: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return log L of the runs, and its derivatives by q.

    Args:
      q: (5,) logarithms of A, B, E, alpha and beta, with A and B at x = y = 0.
      x: (runs,) centred log N.
      y: (runs,) centred log D.

    Returns:
      (runs,) log L and its (runs, 5) derivatives.
    """
    a, b, e = q[:3]
    alpha, beta = np.exp(q[3:])
    terms = np.stack([a - alpha * x, b - beta * y, np.full_like(x, e)], 1)
    total = np.logaddexp.reduce(terms, axis=1)
    shares = np.exp(terms - total[:, None])
    return total, np.column_stack([shares, -alpha * x * shares[:, 0], -beta * y * shares[:, 1]])
