"""Train states, sidecars and run directories for tests of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from diffusionlm import config, config_io
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.checkpoint.store import CheckpointManager
from diffusionlm.errors import UserError
from diffusionlm.training.bad_batches import new_guard
from diffusionlm.training.state import TrainState

# Arrays of 1 kB or less would go into Orbax's index, and the tests that damage files could not tell the two apart.
SHAPES = {"embed": (64, 64), "blocks": {"attention": (2, 64, 96), "mlp": (2, 64, 128)}, "final_norm": (64,)}
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.constant_schedule(1e-3), mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
)


def tree_of(make, shapes):
    return jax.tree.map(make, shapes, is_leaf=lambda shape: isinstance(shape, tuple))


def make_mesh(*sizes):
    names = ("data", "fsdp")[-len(sizes) :]
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def abstract_state(mesh):
    """Matrices split over fsdp along their first dimension that it divides, like the moments that belong to them."""

    def abstract(leaf):
        size = mesh.shape["fsdp"]
        split = next((i for i, n in enumerate(leaf.shape) if n % size == 0), None)
        spec = PartitionSpec() if split is None else PartitionSpec(*[None] * split, "fsdp")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    params = tree_of(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES)
    integer = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(integer, integer, params, jax.eval_shape(OPTIMIZER.init, params), jax.eval_shape(new_guard))
    return jax.tree.map(abstract, state)


def make_state(mesh, seed=0):
    """Every leaf random, so that no two can be exchanged, with the odd values of floating point among them."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if leaf.dtype == jnp.int32:
            value = rng.integers(1, 1000, leaf.shape, np.int32)
        else:
            value = rng.standard_normal(leaf.shape, np.float32)
            value.flat[:4] = (-0.0, 1e-42, np.inf, np.nextafter(np.float32(1), np.float32(2)))
        return jax.device_put(value, leaf.sharding)

    return jax.tree.map(fill, abstract_state(mesh))


def make_sidecar(**changes):
    model, diffusion = config_io.to_dict(config.ModelConfig()), config_io.to_dict(config.DiffusionConfig())
    return Sidecar(**{"objective": "mdm", "model": model, "diffusion": diffusion, "mask_id": 32000, **changes})


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def save_run(workdir, *steps, keep=10, keep_every=0):
    """A run directory with checkpoints at `steps`; returns the last state."""
    with CheckpointManager(workdir, keep, keep_every) as manager:
        for step in steps:
            state = make_state(make_mesh(8), seed=step)
            manager.save(step, state, make_sidecar(source={"step": step}))
    return state


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def data_file(item):
    """The file with the array data of an item."""
    return max(item.glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
