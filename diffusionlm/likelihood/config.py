"""The settings of likelihood estimates."""

import math
from dataclasses import dataclass

from diffusionlm.errors import UserError, suggest
from diffusionlm.likelihood.estimators import ESTIMATORS
from diffusionlm.scalars import NativeScalars, is_real, is_whole

LEAST_PASSES = 8  # with fewer, Student's t has tails that make an interval useless


@dataclass(frozen=True)
class LikelihoodConfig(NativeScalars):
    """The settings of likelihood estimates."""

    # exact_count, iid (random); chain_rule, any_order (exact); None: exact_count (autoregressive: exact)
    estimator: str | None = None
    draws: int = 16  # forward passes of one pass, spread evenly over the numbers of masks
    passes: int = 8  # independent passes, at least 8, from which the standard error comes
    stop_at_stderr: float = 0.0  # up to max_passes, continue until standard errors are at most this, nats; 0: do not
    max_passes: int = 128  # the most passes, with stop_at_stderr and in choices
    guidance: float = 0.0  # scale of unsupervised guidance; 0: none
    seed: int = 0  # seed of the masks
    rows: int = 64  # sequences that the network sees at a time

    def validate(self) -> None:
        """Raise `UserError` for a value that has no meaning."""
        for name, least in (("draws", 1), ("passes", LEAST_PASSES), ("max_passes", 1), ("rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if not is_whole(value) or value < least:
                raise UserError(f"{name}={value!r} must be an integer of at least {least}")
        if self.seed >= 1 << 32:  # JAX would drop its higher bits
            raise UserError(f"seed={self.seed} must be an integer from 0 to {2**32 - 1}")
        for name in ("stop_at_stderr", "guidance"):
            value = getattr(self, name)
            if not is_real(value) or not 0 <= value < math.inf:
                raise UserError(f"{name}={value!r} must be a number that is not negative")
        if self.stop_at_stderr and self.max_passes < self.passes:
            raise UserError(f"max_passes={self.max_passes} must not be below passes={self.passes}")
        if self.estimator is not None and self.estimator not in ESTIMATORS:
            raise UserError(f"unknown estimator {self.estimator!r}{suggest(str(self.estimator), ESTIMATORS)}")
