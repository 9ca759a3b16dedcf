"""The state of a training run: one dataclass, and its layout on a mesh."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from diffusionlm.config import Config
from diffusionlm.diffusion.noise import INITIALISATION, stream_key
from diffusionlm.model import lora
from diffusionlm.model.transformer import Transformer
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


@functools.lru_cache(maxsize=4)
def abstract_state(cfg: Config, mesh: Mesh) -> TrainState:
    """Return the shapes, dtypes and shardings of the state, without making it.

    Moments take the shardings of their parameters explicitly: left to itself, XLA replicates them.
    """
    boxed = jax.eval_shape(lambda: _boxed_state(cfg, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        unbox(boxed),
        tree_shardings(boxed, mesh),
    )


def create_state(cfg: Config, mesh: Mesh) -> TrainState:
    """Return the initial state, made in place on the mesh: no device ever holds more than its share."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, mesh))
    with jax.set_mesh(mesh):
        key = stream_key(cfg.run.seed, INITIALISATION)
        return jax.jit(lambda key: init_state(cfg, key), out_shardings=shardings)(key)


def init_state(cfg: Config, key: jax.Array) -> TrainState:
    """Return a fresh state of plain arrays."""
    return unbox(_boxed_state(cfg, key))


def _boxed_state(cfg: Config, key: jax.Array) -> TrainState:
    """Return a fresh state whose parameters, and so whose moments, carry the names of their dimensions."""
    params = Transformer(cfg.model).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    zero = jnp.zeros((), jnp.int32)
    trained, _ = lora.split(cfg.model, params)
    optimize = optimizer.build(cfg.optim, optimizer.learning_rate(cfg.optim, cfg.run.steps))
    return TrainState(zero, zero, params, optimize.init(trained), new_guard())
