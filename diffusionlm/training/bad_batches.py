"""Decides on the devices which batches are bad, and keeps what a run must remember of them.

The decision is part of the jitted step, so that it is the same on every host and steps can be dispatched ahead of it;
what it depends on is part of the state, so that a resumed run decides alike.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from diffusionlm.config import SafetyConfig

DECAY = 0.99  # of the running mean of gradient norms
HISTORY = 100  # steps before that mean is trusted


@struct.dataclass
class Guard:
    """The part of the train state that the treatment of bad batches needs, as scalars."""

    skips: jax.Array  # int32, bad batches left out since the last step
    rollbacks: jax.Array  # int32, times that the run returned to a checkpoint
    lr_factor: jax.Array  # float32, on the schedule's learning rate
    norm_sum: jax.Array  # float32, sum over the steps of gradient norm times DECAY^(steps since)


def new_guard() -> Guard:
    """Return the guard of a run that begins."""
    return Guard(jnp.int32(0), jnp.int32(0), jnp.float32(1), jnp.float32(0))


def is_bad(cfg: SafetyConfig, guard: Guard, step: jax.Array, loss: jax.Array, grad_norm: jax.Array) -> jax.Array:
    """Return True for a batch whose step must not be taken.

    Args:
      cfg: the policy; a gradient norm above `spike_factor` times the running mean is bad, as is one that is not finite.
      guard: of the state before the batch.
      step: int32, steps taken before it, in its part of the run.
      loss: float32 scalar.
      grad_norm: float32 scalar, before clipping.
    """
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    if cfg.spike_factor:
        mean = guard.norm_sum * (1 - DECAY) / (1 - jnp.float32(DECAY) ** step)  # the weights of `step` norms sum to 1
        bad |= (step >= HISTORY) & (grad_norm > cfg.spike_factor * mean)
    return bad


def start_history(guard: Guard, step: jax.Array) -> Guard:
    """Return the guard without the gradient norms before step 0 of a part, whose objective has norms of its own."""
    return dataclasses.replace(guard, norm_sum=jnp.where(step == 0, 0.0, guard.norm_sum))


def after_step(guard: Guard, grad_norm: jax.Array) -> Guard:
    """Return the guard after a step was taken with this gradient norm."""
    return dataclasses.replace(guard, skips=jnp.zeros_like(guard.skips), norm_sum=guard.norm_sum * DECAY + grad_norm)
