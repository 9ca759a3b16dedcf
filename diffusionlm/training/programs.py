"""The compiled programs of training and evaluation: which settings are part of a program, and which are its data.

Runs that differ in nothing but data, such as cells of a sweep, share a program.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusionlm import config_mixture
from diffusionlm.config import Config, OptimConfig, RunConfig
from diffusionlm.parallel.bits import in_32_bits
from diffusionlm.training.parts import Part, config_of, part_of
from diffusionlm.training.state import TrainState, abstract_state
from diffusionlm.training.step import Metrics, eval_step, train_step
from diffusionlm.training.targets import Batch
from diffusionlm.tree_types import Params

# Section -> fields that the compiled training step takes as data.
_NUMBERS = {
    "run": ("seed", "steps", "continued_steps"),
    "diffusion": ("arm_steps",),
    "optim": ("peak_lr", "warmup_steps", "final_lr", "drop_step", "drop_lr", "decay_steps", "weight_decay"),
}
Numbers = dict[str, dict[str, np.ndarray | jax.Array]]  # section -> field -> scalar


def make_train_step(cfg: Config, mesh: Mesh) -> "TrainStep":
    """Return the training step of `cfg` on `mesh`."""
    return TrainStep(cfg, mesh)


def make_eval_step(cfg: Config) -> Callable[..., Metrics]:
    """Return the evaluation step, compiled on first use; it takes the arguments of `eval_step` after the first."""
    shape = structure(cfg)
    return in_32_bits(eval_program(shape))


class TrainStep:
    """The training step of one run, compiled on first use; it consumes (donates) the state it is given.

    Each part of the run has a program of its own (`parts`).
    """

    def __init__(self, cfg: Config, mesh: Mesh):
        self._cfg, self._mesh, self._replicated = cfg, mesh, NamedSharding(mesh, PartitionSpec())
        self._programs: dict[Part, jax.stages.Wrapped] = {}
        self._on_devices: dict[Part, Numbers] = {}

    @in_32_bits
    def __call__(self, state: TrainState, batch: Batch, batch_index: np.int32) -> tuple[TrainState, Metrics]:
        """Take a step on batch `batch_index`."""
        part = part_of(self._cfg, int(batch_index))
        if part not in self._programs:  # once, not with every step
            cfg = config_of(self._cfg, part)
            shape = structure(cfg)
            self._programs[part] = train_program(shape, self._mesh)
            self._on_devices[part] = jax.device_put(_numbers(cfg), self._replicated)
        return self._programs[part](self._on_devices[part], state, batch, batch_index)

    @in_32_bits
    def lower(
        self, part: Part, state: TrainState, batch: Batch, batch_index: np.int32 | jax.ShapeDtypeStruct
    ) -> jax.stages.Lowered:
        """Lower the program of a part for such arguments, which may be abstract, as the method of `jax.jit` does."""
        cfg = config_of(self._cfg, part)
        shape = structure(cfg)
        return train_program(shape, self._mesh).lower(_numbers(cfg), state, batch, batch_index)


@functools.lru_cache(maxsize=3)  # a sweep takes cells of one shape one after another
def train_program(cfg: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """Return the jitted step of all runs with this `structure`."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(cfg, mesh))

    def step(numbers: Numbers, state: TrainState, batch: Batch, batch_index: jax.Array) -> tuple[TrainState, Metrics]:
        return train_step(_with_numbers(cfg, numbers), state, batch, batch_index)

    return jax.jit(step, donate_argnums=1, out_shardings=(shardings, None))


@functools.lru_cache(maxsize=2)
def eval_program(cfg: Config) -> jax.stages.Wrapped:
    """Return the jitted evaluation step of all runs with this `structure`."""

    def step(
        params: Params, batch: Batch, token_bytes_V: jax.Array, batch_index: jax.Array, draw: jax.Array
    ) -> Metrics:
        return eval_step(cfg, params, batch, token_bytes_V, batch_index, draw)

    return jax.jit(step)


def structure(cfg: Config) -> Config:
    """Return `cfg` with defaults for all that a program takes as data or does not look at; equal for one program."""
    numbers = {name: getattr(OptimConfig(), name) for name in _NUMBERS["optim"]}
    return Config(
        objective=cfg.objective,
        model=cfg.model,
        diffusion=replace(cfg.diffusion, arm_steps=0),
        optim=replace(cfg.optim, arm_peak_lr=0.0, **numbers),
        data=replace(cfg.data, **_without_places(cfg)),
        run=RunConfig(microbatches=cfg.run.microbatches, continued_steps=min(cfg.run.continued_steps, 1)),
        safety=cfg.safety,
    )


def _without_places(cfg: Config) -> dict[str, str | float]:
    """Return the fields of the data that no program looks at; of a mixture it knows the number of sources."""
    mixture = config_mixture.of_size(len(cfg.data.sources))
    return {"path": "", "source": "", "tokenizer": "", "mixture": mixture, "max_epochs": 0.0}


def _numbers(cfg: Config) -> Numbers:
    """Return the values of the fields in `_NUMBERS`, as NumPy scalars."""

    def scalar(value: float) -> np.ndarray:
        whole = np.uint32 if value >= 1 << 31 else np.int32  # a seed has 32 bits
        return np.asarray(value, np.float32 if isinstance(value, float) else whole)

    values: Numbers = {
        section: {name: scalar(getattr(getattr(cfg, section), name)) for name in names}
        for section, names in _NUMBERS.items()
    }
    if not cfg.run.continued_steps:  # whether a run goes on from another is part of the program
        del values["run"]["continued_steps"]
    return values


def _with_numbers(cfg: Config, numbers: Numbers) -> Config:
    return replace(cfg, **{name: replace(getattr(cfg, name), **values) for name, values in numbers.items()})
