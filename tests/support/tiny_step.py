"""A tiny model, a batch for it, and its training step on any mesh: what the tests of the steps share."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from scipy import special

from diffusionlm.config import Config, DataConfig, DiffusionConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import global_array, local_rows, make_mesh
from diffusionlm.training import programs
from diffusionlm.training import step as train_step
from diffusionlm.training.bad_batches import new_guard
from diffusionlm.training.state import TrainState, abstract_state

B, T, V = 32, 8, 29
MDM = Config(
    objective="mdm",
    model=ModelConfig(
        d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, vocab_size=V, max_length=T, head_chunk=12
    ),
    diffusion=DiffusionConfig(random_length=0.3),
    # A large eps: Adam would otherwise blow up rounding errors of gradients near 0 to the size of a step.
    optim=OptimConfig(schedule="constant", peak_lr=0.02, warmup_steps=4, weight_decay=0.0, eps=1e-4),
    data=DataConfig(sequence_length=T, batch_size=B),
    run=RunConfig(steps=400, seed=1),
).validate()
ARM = dataclasses.replace(
    MDM, objective="arm", model=dataclasses.replace(MDM.model, causal=True, mask_row=False)
).validate()
CONFIGS = {"mdm": MDM, "arm": ARM}


def random_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Records of two documents and some padding."""
    rng = np.random.default_rng(seed)
    segments = np.ones((B, T + 1), np.int32)
    segments[::3, 4:] = 2
    segments[::5, 6:] = 0
    return {"tokens": rng.integers(0, V, (B, T + 1)).astype(np.int32), "segment_ids": segments}


def four_rows() -> dict[str, np.ndarray]:
    """Something to learn by heart: four records, eight times each."""
    tokens = np.tile(np.random.default_rng(1).integers(0, V, (4, T + 1)), (B // 4, 1)).astype(np.int32)
    return {"tokens": tokens, "segment_ids": np.ones_like(tokens)}


ALONE = (1, 1, 1)


@functools.cache
def mesh_of(sizes: tuple[int, int, int]):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])


@functools.cache
def host_state(objective: str) -> TrainState:
    """A state with random parameters and zero moments, as numpy: compiling the initialisation takes longer."""
    shapes = abstract_state(CONFIGS[objective], mesh_of(ALONE))
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return (mean + 0.25 * rng.normal(size=leaf.shape)).astype(np.float32)

    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    params = jax.tree_util.tree_map_with_path(draw, zeros.params)
    return zeros.replace(params=params, guard=jax.device_get(new_guard()))


@functools.cache
def placed_stepper(objective: str, sizes: tuple[int, int, int], microbatches: int):
    """`make_train_step` on a mesh, and the functions that put a host state and a host batch there."""
    cfg, mesh = CONFIGS[objective], mesh_of(sizes)
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, microbatches=microbatches)).validate()
    step = programs.make_train_step(cfg, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(cfg, mesh))
    rows = local_rows(mesh, B)

    def place_state(state):  # a copy, as the step consumes the state that it is given
        return jax.tree.map(lambda x, s: jax.device_put(jnp.array(np.asarray(x)), s), state, shardings)

    def place_batch(batch):
        packed = {name: np.concatenate([x[start:stop] for start, stop in rows]) for name, x in batch.items()}
        return {name: global_array(mesh, B, rows, x) for name, x in packed.items()}

    return mesh, step, place_state, place_batch


def run_step(objective, state, batch, index, sizes=ALONE, microbatches=1):
    mesh, step, place_state, place_batch = placed_stepper(objective, sizes, microbatches)
    with jax.set_mesh(mesh):
        return jax.device_get(step(place_state(state), place_batch(batch), jnp.int32(index)))


@functools.cache
def one_step(objective: str, sizes: tuple[int, int, int] = ALONE, microbatches: int = 1):
    return run_step(objective, host_state(objective), random_batch(), 0, sizes, microbatches)


@functools.cache
def targets_on(sizes: tuple[int, int, int]):
    mesh = mesh_of(sizes)
    batch = jax.device_put(random_batch(), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(lambda b: train_step.targets(MDM, b, jnp.int32(0)))(batch))


BYTES = np.random.default_rng(3).integers(1, 9, 128).astype(np.int32)  # of each token of the padded vocabulary


@functools.cache
def logits_of(objective: str):
    model = Transformer(CONFIGS[objective].model)

    def run(params, tokens, segments):
        hidden = model.apply({"params": params}, tokens, segments)
        return model.apply({"params": params}, hidden, method=Transformer.head)[..., :V]

    return jax.jit(run)


def nll_of(objective, params, inputs, segments, labels) -> np.ndarray:
    logits = np.asarray(logits_of(objective)(params, inputs, segments), np.float64)
    return special.logsumexp(logits, axis=-1) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]


def assert_same_gradients(actual, wanted):
    chex.assert_trees_all_close(actual, wanted, rtol=1e-4, atol=1e-6)
