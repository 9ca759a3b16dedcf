"""The state of a training run: one dataclass, and how it lies on a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusionlm import optim
from diffusionlm.config import Config
from diffusionlm.corruption import INITIALISATION, stream_key
from diffusionlm.model import Transformer
from diffusionlm.sharding import tree_shardings


@struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # int32 scalar, optimizer steps taken
    next_index: jax.Array  # int32 scalar, the next batch to train on; a skipped batch advances this alone
    params: Any  # float32 tree, stacked over layers
    opt_state: Any  # of optim.build


def init_state(cfg: Config, key: jax.Array) -> TrainState:
    """A fresh state with plain (unboxed) arrays."""
    params = nn.unbox(Transformer(cfg.model).init(key, jnp.zeros((1, 1), jnp.int32))["params"])
    opt_state = optim.build(cfg.optim, cfg.run.steps).init(params)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, params, opt_state)


def param_shardings(cfg: Config, mesh: Mesh) -> Any:
    """NamedShardings of the parameters, from their logical axis names."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(lambda t: Transformer(cfg.model).init(jax.random.key(0), t)["params"], tokens)
    return tree_shardings(boxed, mesh)


def abstract_state(cfg: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it.

    Moments take the shardings of their parameters explicitly: left to itself, XLA replicates them.
    """
    shapes = jax.eval_shape(lambda: init_state(cfg, jax.random.key(0)))
    params = param_shardings(cfg, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_utils.tree_map_params(
        optim.build(cfg.optim, cfg.run.steps),
        lambda _, sharding: sharding,
        shapes.opt_state,
        params,
        transform_non_params=lambda _: replicated,
    )
    shardings = TrainState(replicated, replicated, params, opt_state)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def create_state(cfg: Config, mesh: Mesh) -> TrainState:
    """The initial state, made in place on the mesh: no device ever holds more than its share."""
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(cfg, mesh))
    with jax.set_mesh(mesh):
        key = stream_key(cfg.run.seed, INITIALISATION)
        return jax.jit(lambda key: init_state(cfg, key), out_shardings=shardings)(key)
