"""TODO: one sentence."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusionlm.config import Config, OptimConfig, RunConfig
from diffusionlm.training.state import TrainState, abstract_state
from diffusionlm.training.step import Batch, Metrics, eval_step, train_step

# What the compiled step takes as data: runs that differ in nothing else, such as cells of a sweep, share a program.
_NUMBERS = {
    "run": ("seed", "steps"),
    "optim": ("peak_lr", "warmup_steps", "final_lr", "drop_step", "drop_lr", "decay_steps", "weight_decay"),
}


Numbers = dict[str, dict[str, Any]]  # section -> field -> scalar


def structure(cfg: Config) -> Config:
    """`cfg` with all at its default that a compiled step takes as data, or does not look at: one for each program."""
    numbers = {name: getattr(OptimConfig(), name) for name in _NUMBERS["optim"]}
    return Config(
        objective=cfg.objective,
        model=cfg.model,
        diffusion=cfg.diffusion,
        optim=replace(cfg.optim, **numbers),
        data=replace(cfg.data, path="", source="", tokenizer=""),
        run=RunConfig(microbatches=cfg.run.microbatches),
        safety=cfg.safety,
    )


def _numbers(cfg: Config) -> Numbers:
    """The values of the fields in `_NUMBERS`, as scalars of numpy."""

    def scalar(value: float) -> np.ndarray:
        whole = np.uint32 if value >= 1 << 31 else np.int32  # a seed has 32 bits
        return np.asarray(value, np.float32 if isinstance(value, float) else whole)

    return {
        section: {name: scalar(getattr(getattr(cfg, section), name)) for name in names}
        for section, names in _NUMBERS.items()
    }


def _with_numbers(cfg: Config, numbers: Numbers) -> Config:
    sections = {section: replace(getattr(cfg, section), **values) for section, values in numbers.items()}
    return replace(cfg, **sections)


@functools.lru_cache(maxsize=2)  # a sweep takes cells of one shape one after another
def train_program(cfg: Config, mesh: Mesh) -> Any:
    """The jitted step of all runs with this `structure`."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(cfg, mesh))

    def step(numbers: Numbers, state: TrainState, batch: Batch, batch_index: jax.Array) -> tuple[TrainState, Metrics]:
        return train_step(_with_numbers(cfg, numbers), state, batch, batch_index)

    return jax.jit(step, donate_argnums=1, out_shardings=(shardings, None))


@functools.lru_cache(maxsize=2)
def eval_program(cfg: Config) -> Any:
    def step(params: Any, batch: Batch, token_bytes_V: jax.Array, batch_index: jax.Array, draw: jax.Array) -> Metrics:
        return eval_step(cfg, params, batch, token_bytes_V, batch_index, draw)

    return jax.jit(step)


class TrainStep:
    """The compiled-on-first-use training step of one run; it consumes (donates) the state it is given."""

    def __init__(self, cfg: Config, mesh: Mesh):
        self._program = train_program(structure(cfg), mesh)
        self._annealed = cfg.diffusion.anneal_steps  # from there on attention is full, and the kernels know how
        full = structure(replace(cfg, diffusion=replace(cfg.diffusion, anneal_steps=0)))
        self._full_program = train_program(full, mesh)
        self._numbers, self._replicated = _numbers(cfg), NamedSharding(mesh, PartitionSpec())
        self._on_devices: Numbers | None = None

    def __call__(self, state: TrainState, batch: Batch, batch_index: jax.Array) -> tuple[TrainState, Metrics]:
        if self._on_devices is None:  # once, not with every step
            self._on_devices = jax.device_put(self._numbers, self._replicated)
        program = self._program if int(batch_index) + 1 < self._annealed else self._full_program
        return program(self._on_devices, state, batch, batch_index)

    def lower(self, state: Any, batch: Any, batch_index: Any) -> jax.stages.Lowered:
        """As `jax.jit`'s: the program for such arguments, which may be abstract."""
        return self._program.lower(self._numbers, state, batch, batch_index)


def make_train_step(cfg: Config, mesh: Mesh) -> TrainStep:
    """The training step of `cfg` on `mesh`."""
    return TrainStep(cfg, mesh)


def make_eval_step(cfg: Config) -> Callable[..., Metrics]:
    """The compiled-on-first-use evaluation step, with the arguments of `eval_step` after the first."""
    return eval_program(structure(cfg))
