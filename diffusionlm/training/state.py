"""The state of a training run: one dataclass, and its layout on a mesh."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from diffusionlm.config import Config, ModelConfig, OptimConfig
from diffusionlm.diffusion.noise import INITIALISATION, stream_key
from diffusionlm.model import lora
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.bits import in_32_bits
from diffusionlm.parallel.mesh import tree_shardings, unbox
from diffusionlm.training import optimizer
from diffusionlm.training.bad_batches import Guard, new_guard
from diffusionlm.tree_types import Params


@struct.dataclass
class TrainState:
    """All state that a step changes."""

    step: jax.Array  # int32 scalar, optimizer steps taken
    next_index: jax.Array  # int32 scalar, the next batch to train on; a skipped batch advances this alone
    params: Params  # float32, stacked over layers
    opt_state: optax.OptState  # of the parameters that are trained
    guard: Guard


def abstract_state(cfg: Config, mesh: Mesh) -> TrainState:
    """Return the shapes, dtypes and shardings of the state, without making it."""
    return _abstract_state(cfg.model, cfg.optim, mesh)


@functools.lru_cache(maxsize=4)
def _abstract_state(model: ModelConfig, optim: OptimConfig, mesh: Mesh) -> TrainState:
    """Return `abstract_state`, traced once for runs of one model and optimizer.

    Moments take the shardings of their parameters explicitly: left to itself, XLA replicates them.
    """
    boxed = jax.eval_shape(lambda: _boxed_state(model, optim, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        unbox(boxed),
        tree_shardings(boxed, mesh),
    )


@in_32_bits
def create_state(cfg: Config, mesh: Mesh) -> TrainState:
    """Return the initial state, made in place on the mesh: no device ever holds more than its share."""
    with jax.set_mesh(mesh):
        return _initialisation(cfg.model, cfg.optim, mesh)(stream_key(cfg.run.seed, INITIALISATION))


@functools.lru_cache(maxsize=2)
def _initialisation(model: ModelConfig, optim: OptimConfig, mesh: Mesh) -> jax.stages.Wrapped:
    """Return the program that makes the initial state of all runs of one model and optimizer."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, _abstract_state(model, optim, mesh))
    return jax.jit(lambda key: unbox(_boxed_state(model, optim, key)), out_shardings=shardings)


def _boxed_state(model: ModelConfig, optim: OptimConfig, key: jax.Array) -> TrainState:
    """Return a fresh state whose parameters, and so whose moments, carry the names of their dimensions."""
    params = Transformer(model).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    zero = jnp.zeros((), jnp.int32)
    trained, _ = lora.split(model, params)
    optimize = optimizer.build(optim, optax.constant_schedule(0.0))  # the state of a schedule is its step, not its rate
    return TrainState(zero, zero, params, optimize.init(trained), new_guard())
