"""AdamW with a learning-rate schedule, a weight-decay mask and clipping, from optax."""

from typing import Any

import jax
import optax

from diffusionlm.config import OptimConfig


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Step (0-based) to learning rate: linear warm-up from 0, then cosine, WSD or constant.

    WSD (warm-up, stable, decay) with `drop_step` is LLaDA's (arXiv 2502.09992, Section 2.2): hold the peak, drop once
    to `drop_lr`, and decay linearly to `final_lr` over the last `decay_steps`.
    """
    warmup = optax.linear_schedule(0.0, cfg.peak_lr, max(cfg.warmup_steps, 1))
    pieces, ends = [warmup] if cfg.warmup_steps else [], [cfg.warmup_steps] if cfg.warmup_steps else []
    if cfg.schedule == "cosine":
        rest = max(steps - cfg.warmup_steps, 1)
        pieces.append(optax.cosine_decay_schedule(cfg.peak_lr, rest, cfg.final_lr / max(cfg.peak_lr, 1e-30)))
    else:
        pieces.append(optax.constant_schedule(cfg.peak_lr))
    if cfg.schedule == "wsd":
        held = cfg.peak_lr
        if cfg.drop_step:
            held = cfg.drop_lr
            pieces.append(optax.constant_schedule(held))
            ends.append(cfg.drop_step)
        if cfg.decay_steps:
            pieces.append(optax.linear_schedule(held, cfg.final_lr, cfg.decay_steps))
            ends.append(steps - cfg.decay_steps)
    return optax.join_schedules(pieces, ends)


def decays(params: Any) -> Any:
    """True for matrices and embeddings, False for norm gains and biases, as a tree like `params`."""

    def matrix(path: tuple[Any, ...], _: Any) -> bool:
        name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]  # below it there may be a box
        return name != "scale" and not name.endswith("bias")

    return jax.tree_util.tree_map_with_path(matrix, params)


def build(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer; its state's moments have the shapes of the parameters."""
    adamw = optax.adamw(
        learning_rate(cfg, steps),
        b1=cfg.beta1,
        b2=cfg.beta2,
        eps=cfg.eps,
        mu_dtype=cfg.first_moment_dtype,
        weight_decay=cfg.weight_decay,
        mask=decays if cfg.decay_mask == "matrices" else None,
    )
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adamw) if cfg.clip_norm else adamw
