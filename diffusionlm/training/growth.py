"""Runs that grow: the same run with more steps, where no step that it has taken depends on their number."""

import math

from etils import epath

from diffusionlm.config import Config
from diffusionlm.errors import UserError


def fixed_steps(cfg: Config) -> float:
    """Return how many steps a run begins with whose learning rates do not depend on `run.steps`; infinity: all.

    A first, autoregressive part has a schedule of its own length, and the warm-up has one too. Where the learning rate
    counts batches, so does this.
    """
    if cfg.diffusion.arm_steps >= cfg.run.steps:  # with more steps, the batches after those train diffusion
        return cfg.diffusion.arm_steps
    first, optim = max(cfg.diffusion.arm_steps, cfg.run.continued_steps), cfg.optim
    if optim.schedule == "cosine":
        return first + optim.warmup_steps
    if optim.schedule == "wsd" and optim.decay_steps:
        return max(first, cfg.run.steps - optim.decay_steps)
    return math.inf


def require_may_grow(recorded: Config, cfg: Config, workdir: epath.Path, taken: int) -> None:
    """Refuse to make a run longer whose learning rates so far would have been others.

    Args:
      recorded: the run as it is.
      cfg: the same run with more steps.
      workdir: its directory.
      taken: the steps that it has taken, or batches where its learning rate counts those.

    Raises:
      UserError: it must not grow.
    """
    if taken <= fixed_steps(recorded):
        return
    old, new, schedule = recorded.run.steps, cfg.run.steps, cfg.optim.schedule
    since = f"from step {fixed_steps(recorded):.0f} on its learning rates (optim.schedule={schedule}) lead to that end"
    raise UserError(
        f"{workdir} holds this run with run.steps={old}, and {since}, so after {taken} steps it cannot grow to {new}; "
        f"begin a new run from its whole state: --run.continue_from {workdir} with another --workdir"
    )
