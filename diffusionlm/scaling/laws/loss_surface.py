"""The surface L(N, D) = E + A / N^alpha + B / D^beta, and its optima (Hoffmann et al. 2203.15556, Eq. 2 to 4)."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

BOUNDS = float(np.log(1e-3)), float(np.log(5.0))  # of log alpha and log beta in fits


@dataclass(frozen=True)
class LossSurface:
    """A surface, with C = k N D."""

    e: float  # nats per token
    log_a: float
    log_b: float
    alpha: float
    beta: float
    k: float  # FLOPs per parameter and token: 6, or the average in the recipe's convention

    @property
    def params_exponent(self) -> float:
        """The a of N* = G (C / k)^a (Hoffmann et al., Eq. 4)."""
        return self.beta / (self.alpha + self.beta)

    @property
    def tokens_exponent(self) -> float:
        """The b of D* = G^-1 (C / k)^b."""
        return self.alpha / (self.alpha + self.beta)

    def log_params(self, c: float) -> float:
        """Return log N* at C FLOPs; NaN for a surface without A and B."""
        log_g = (math.log(self.alpha / self.beta) + self.log_a - self.log_b) / (self.alpha + self.beta)
        return log_g + self.params_exponent * math.log(c / self.k)

    def optimum(self, c: float) -> tuple[float, float, float]:
        """Return N*, D* and L* at C FLOPs; without A or B, N* or D* is 0, infinite or NaN."""
        log_n = self.log_params(c)
        log_d = np.log(c / self.k) - log_n
        return float(np.exp(log_n)), float(np.exp(log_d)), float(self.loss(np.exp(log_n), np.exp(log_d)))

    def loss(self, n: ArrayLike, d: ArrayLike) -> np.ndarray:
        """Return L(N, D), nats per token."""
        return self.e + _term(self.log_a, self.alpha, n) + _term(self.log_b, self.beta, d)


def _term(log_coefficient: float, exponent: float, x: ArrayLike) -> np.ndarray:
    """Return a coefficient over a power of x; zero everywhere where the coefficient is, also at 0 and infinity."""
    if log_coefficient == -math.inf:
        return np.zeros(np.shape(x))
    return np.exp(log_coefficient - exponent * np.log(x))
