"""The options that make a run shorter: what is counted in steps shrinks with the number of steps."""

from collections.abc import Mapping
from typing import Any

from diffusionlm.config import Config
from diffusionlm.config_io import flat, with_fields
from diffusionlm.errors import UserError
from diffusionlm.registry import experiments

PARTS = ("diffusion.arm_steps", "diffusion.anneal_steps", "optim.warmup_steps", "optim.decay_steps", "optim.drop_step")


def shortened(recipe: Config, steps: int) -> dict[str, int]:
    """Return the fields of a run with fewer steps, whose parts have the proportions that they have in a recipe.

    Rounding down keeps parts that fit into one another in a recipe within one another.

    Args:
      recipe: the longer run.
      steps: the number of steps of the shorter one.
    """
    values = flat(recipe)
    parts = {name: values[name] * steps // recipe.run.steps for name in PARTS}
    if recipe.diffusion.arm_steps:  # without autoregressive batches it would be another kind of run
        parts["diffusion.arm_steps"] = max(1, parts["diffusion.arm_steps"])
    return {"run.steps": steps} | parts


def validate(cfg: Config) -> Config:
    """Return a valid config; a refusal of too few steps gives the options that work.

    Raises:
      UserError: as of `Config.validate`.
    """
    try:
        return cfg.validate()
    except UserError as error:
        if (changes := _changes(cfg)) is None:
            raise
        options = " ".join(f"--{name} {value}" for name, value in changes.items())
        raise UserError(f"{error}; with the proportions of {cfg.name}, that is {options}") from error


def _changes(cfg: Config) -> Mapping[str, Any] | None:
    """Return the fields that make a config valid which its recipe would be with more steps; None if others must change.

    Parts that were given stay as they are.
    """
    if not isinstance(cfg.name, str) or not isinstance(cfg.run.steps, int) or not experiments.knows(cfg.name):
        return None
    recipe = experiments.get(cfg.name)
    if not 1 <= cfg.run.steps < recipe.run.steps:
        return None
    there, here = flat(recipe), flat(cfg)
    parts = {name: value for name, value in shortened(recipe, cfg.run.steps).items() if here[name] == there[name]}
    changes = {"run.steps": cfg.run.steps} | {name: value for name, value in parts.items() if value != there[name]}
    if "optim.warmup_steps" in changes:  # each part of the run warms up
        first = changes.get("diffusion.arm_steps", cfg.diffusion.arm_steps)
        room = [length for length in (first, cfg.run.steps - first) if length > 0]
        changes["optim.warmup_steps"] = min(changes["optim.warmup_steps"], *room)
    try:
        with_fields(cfg, changes)
    except UserError:
        return None
    return changes
