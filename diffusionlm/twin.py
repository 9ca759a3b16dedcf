"""The autoregressive twin of a model or an experiment: the same trunk and data, with causal attention and no masks."""

import dataclasses

from diffusionlm.config import Config, DiffusionConfig, ModelConfig
from diffusionlm.errors import UserError

SUFFIX = "_arm"  # of a twin's name


def arm_twin(cfg: ModelConfig) -> ModelConfig:
    """Return the autoregressive model on the same trunk: causal, and without the input row of [MASK]."""
    return dataclasses.replace(cfg, causal=True, mask_row=False)


def autoregressive_twin(cfg: Config) -> Config:
    """Make the autoregressive twin of an experiment: the same trunk, data, tokens and optimizer.

    Settings of masked diffusion are dropped. Where the experiment begins with autoregressive batches, the twin has
    their learning rate.

    Raises:
      UserError: the experiment is autoregressive itself.
    """
    if cfg.objective == "arm":
        raise UserError(f"{cfg.name!r} is autoregressive itself, so it has no twin {cfg.name + SUFFIX!r}")
    old = cfg.diffusion
    return dataclasses.replace(
        cfg,
        name=cfg.name + SUFFIX,
        objective="arm",
        model=arm_twin(cfg.model),
        diffusion=DiffusionConfig(random_length=old.random_length, normalization=old.normalization),
        optim=dataclasses.replace(cfg.optim, peak_lr=cfg.optim.arm_peak_lr or cfg.optim.peak_lr, arm_peak_lr=0.0),
    )
