"""AdamW from optax, with a learning-rate schedule, a weight-decay mask and clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusionlm.config import OptimConfig
from diffusionlm.tree_types import Params, PyTree


def learning_rate(cfg: OptimConfig, steps: int, start: int = 0) -> optax.Schedule:
    """Return the learning rate of a step (0-based): linear warm-up from 0, then cosine, WSD or constant.

    WSD (warm-up, stable, decay) with `drop_step` is LLaDA's (arXiv 2502.09992, Section 2.2): hold the peak, drop once
    to `drop_lr`, and decay linearly to `final_lr` over the last `decay_steps`.

    The numbers may be arrays that are known only when the program runs; optax's own schedules compare them in Python
    and cannot be used.

    Args:
      cfg: the schedule.
      steps: the step at which it ends.
      start: the step at which it starts; the rate before it is the one there.
    """
    steps -= start

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.maximum(jnp.asarray(step, jnp.float32) - start, 0)  # exact up to 2**24 steps
        after = jnp.float32(cfg.peak_lr)
        if cfg.schedule == "cosine":
            done = jnp.clip((step - cfg.warmup_steps) / jnp.maximum(steps - cfg.warmup_steps, 1), 0, 1)
            after = cfg.final_lr + (cfg.peak_lr - cfg.final_lr) * (1 + jnp.cos(jnp.pi * done)) / 2
        if cfg.schedule == "wsd":
            dropped = (jnp.asarray(cfg.drop_step) > 0) & (step >= cfg.drop_step)
            held = jnp.where(dropped, cfg.drop_lr, cfg.peak_lr)
            done = jnp.clip((step - (steps - cfg.decay_steps)) / jnp.maximum(cfg.decay_steps, 1), 0, 1)
            after = held + (cfg.final_lr - held) * done * (jnp.asarray(cfg.decay_steps) > 0)
        warming = cfg.peak_lr * step / jnp.maximum(cfg.warmup_steps, 1)
        return jnp.where(step < cfg.warmup_steps, warming, after).astype(jnp.float32)

    return rate


def decays(params: Params) -> PyTree:
    """Return a tree like `params`: True for matrices and embeddings, False for norm gains and biases."""

    def matrix(path: tuple[Any, ...], _: Any) -> bool:
        name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]  # below it there may be a box
        return name != "scale" and not name.endswith("bias")

    return jax.tree_util.tree_map_with_path(matrix, params)


def build(cfg: OptimConfig, steps: int, start: int = 0) -> optax.GradientTransformation:
    """Return the optimizer, whose moments have the shapes of the parameters; arguments are those of `learning_rate`."""
    adamw = optax.adamw(
        learning_rate(cfg, steps, start),
        b1=cfg.beta1,
        b2=cfg.beta2,
        eps=cfg.eps,
        mu_dtype=cfg.first_moment_dtype,
        weight_decay=cfg.weight_decay,
        mask=decays if cfg.decay_mask == "matrices" else None,
    )
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adamw) if cfg.clip_norm else adamw
