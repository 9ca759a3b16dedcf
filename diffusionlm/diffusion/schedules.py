"""Masking schedules: alpha(t), the probability that a token is still clean at time t in [0, 1].

alpha falls from about 1 at t=0 to about 0 at t=1. Schedules differ in where they spend time, not in the
continuous-time bound that they define (MDLM, arXiv 2406.07524, Section 3.5; MD4, arXiv 2406.04329, Section 3). To add a
schedule, write a class with the methods of `Schedule` and give it an entry in `SCHEDULES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from scipy import special

from diffusionlm.config import DiffusionConfig
from diffusionlm.errors import UserError, suggest


class Schedule(Protocol):
    """Functions of time; arguments and results are float32 arrays of any shape."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """Return the probability that a token is clean at time t."""
        ...

    def mask_probability(self, t: jax.Array) -> jax.Array:
        """Return 1 - alpha(t), accurate where it is small."""
        ...

    def weight(self, t: jax.Array) -> jax.Array:
        """Return -alpha'(t) / (1 - alpha(t)): the weight of a masked token in the continuous-time bound."""
        ...

    def mean_mask_probability(self) -> float:
        """Return the mean of `mask_probability` over uniform t: the share of all tokens that training masks."""
        ...


@dataclass(frozen=True)
class Linear:
    """alpha(t) = 1 - t, so the weight is 1/t (SMDM, LLaDA, MDLM's log-linear noise)."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """Return alpha at time t."""
        return 1.0 - t

    def mask_probability(self, t: jax.Array) -> jax.Array:
        """Return 1 - alpha(t)."""
        return t

    def weight(self, t: jax.Array) -> jax.Array:
        """Return the weight of a masked token."""
        return 1.0 / t

    def mean_mask_probability(self) -> float:
        """Return the mean of 1 - alpha(t) over uniform t."""
        return 0.5


@dataclass(frozen=True)
class Cosine:
    """alpha(t) = 1 - cos(pi/2 (1 - t)) (MD4, Table 1)."""

    def alpha(self, t: jax.Array) -> jax.Array:
        """Return alpha at time t."""
        return 1.0 - self.mask_probability(t)

    def mask_probability(self, t: jax.Array) -> jax.Array:
        """Return 1 - alpha(t)."""
        return jnp.sin(math.pi / 2 * t)

    def weight(self, t: jax.Array) -> jax.Array:
        """Return the weight of a masked token."""
        return math.pi / 2 / jnp.tan(math.pi / 2 * t)

    def mean_mask_probability(self) -> float:
        """Return the mean of 1 - alpha(t) over uniform t."""
        return 2 / math.pi


@dataclass(frozen=True)
class Polynomial:
    """alpha(t) = 1 - t**power (MD4, Table 1)."""

    power: float

    def alpha(self, t: jax.Array) -> jax.Array:
        """Return alpha at time t."""
        return 1.0 - self.mask_probability(t)

    def mask_probability(self, t: jax.Array) -> jax.Array:
        """Return 1 - alpha(t)."""
        return t**self.power

    def weight(self, t: jax.Array) -> jax.Array:
        """Return the weight of a masked token."""
        return self.power / t

    def mean_mask_probability(self) -> float:
        """Return the mean of 1 - alpha(t) over uniform t."""
        return 1 / (self.power + 1)


@dataclass(frozen=True)
class Geometric:
    """alpha(t) = exp(-sigma(t)) with sigma(t) = sigma_min**(1-t) * sigma_max**t (MDLM, Appendix; SEDD)."""

    sigma_min: float
    sigma_max: float

    def _sigma(self, t: jax.Array) -> jax.Array:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def alpha(self, t: jax.Array) -> jax.Array:
        """Return alpha at time t."""
        return jnp.exp(-self._sigma(t))

    def mask_probability(self, t: jax.Array) -> jax.Array:
        """Return 1 - alpha(t)."""
        return -jnp.expm1(-self._sigma(t))

    def weight(self, t: jax.Array) -> jax.Array:
        """Return the weight of a masked token."""
        sigma = self._sigma(t)
        return sigma * math.log(self.sigma_max / self.sigma_min) / jnp.expm1(sigma)

    def mean_mask_probability(self) -> float:
        """Return the mean of 1 - alpha(t) over uniform t."""
        clean = special.exp1(self.sigma_min) - special.exp1(self.sigma_max)
        return 1 - float(clean) / math.log(self.sigma_max / self.sigma_min)


SCHEDULES: dict[str, Callable[[DiffusionConfig], Schedule]] = {
    "linear": lambda cfg: Linear(),
    "cosine": lambda cfg: Cosine(),
    "polynomial": lambda cfg: Polynomial(cfg.polynomial_power),
    "geometric": lambda cfg: Geometric(cfg.geometric_min, cfg.geometric_max),
}


def build(cfg: DiffusionConfig) -> Schedule:
    """Return the schedule that `cfg.schedule` names.

    Raises:
      UserError: there is no such schedule.
    """
    if cfg.schedule not in SCHEDULES:
        raise UserError(f"unknown diffusion.schedule {cfg.schedule!r}{suggest(cfg.schedule, SCHEDULES)}")
    return SCHEDULES[cfg.schedule](cfg)
