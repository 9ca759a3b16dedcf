"""The parts of a run: autoregressive at first, then attention that opens up, then full attention.

A part is a range of batches, not of steps, so the host knows the part of a batch without asking the devices. Each part
is a run by itself, with a compiled program of its own.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from diffusionlm.config import Config

Part = Literal["autoregressive", "opening", "full"]


def is_autoregressive(cfg: Config) -> bool:
    """Return True if a run never trains diffusion."""
    return cfg.objective == "arm" or cfg.diffusion.arm_steps >= cfg.run.steps


def part_of(cfg: Config, batch_index: int) -> Part:
    """Return the part that a batch belongs to; attention is full when the last edge opens."""
    if is_autoregressive(cfg) or batch_index < cfg.diffusion.arm_steps:
        return "autoregressive"
    opening = batch_index + 1 - cfg.diffusion.arm_steps < cfg.diffusion.anneal_steps
    return "opening" if opening else "full"


def parts(cfg: Config) -> Iterator[Part]:
    """Yield the parts of a run that have batches, in their order."""
    first, opening = cfg.diffusion.arm_steps, max(cfg.diffusion.anneal_steps - 1, 0)
    if is_autoregressive(cfg) or first:
        yield "autoregressive"
    if opening:
        yield "opening"
    if not is_autoregressive(cfg) and first + opening < cfg.run.steps:
        yield "full"


def ends_as_autoregressive(cfg: Config, next_batch: int) -> bool:
    """Return True if no batch before `next_batch` trained diffusion: the network is an autoregressive model then."""
    return is_autoregressive(cfg) or (cfg.diffusion.arm_steps > 0 and next_batch <= cfg.diffusion.arm_steps)


def opens_at(cfg: Config, next_batch: int) -> bool:
    """Return True if `next_batch` is the first that trains diffusion, after others."""
    return 0 < next_batch == cfg.diffusion.arm_steps < cfg.run.steps


def config_of(cfg: Config, part: Part) -> Config:
    """Return the run that a part is by itself.

    The autoregressive part of a run is an autoregressive run of `diffusion.arm_steps` steps, learning rates included:
    its parameters at the end are those of that run, bit for bit. The later parts keep `diffusion.arm_steps`, from which
    their learning rates and their attention count.
    """
    if cfg.objective == "arm":
        return cfg
    if part == "autoregressive":
        return replace(
            cfg,
            objective="arm",
            model=replace(cfg.model, causal=True),
            diffusion=replace(cfg.diffusion, arm_steps=0, anneal_steps=0, weighting="bound", prompt_dropout=0.0),
            optim=replace(cfg.optim, peak_lr=cfg.optim.arm_peak_lr or cfg.optim.peak_lr, arm_peak_lr=0.0),
            run=replace(cfg.run, steps=cfg.diffusion.arm_steps),
        )
    if part == "full":
        return replace(cfg, diffusion=replace(cfg.diffusion, anneal_steps=0))
    return cfg
