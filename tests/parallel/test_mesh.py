"""Meshes, the mesh axes of every dimension, the rows of a process, and moments that lie where their parameters lie."""

import dataclasses
import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusionlm.compile_check import hlo
from diffusionlm.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig
from diffusionlm.errors import UserError
from diffusionlm.parallel.mesh import (
    batch_sharding,
    check_batch,
    constrain,
    global_array,
    local_rows,
    make_mesh,
    partition_spec,
)
from diffusionlm.training import optimizer
from diffusionlm.training import state as train_state

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
SIZES = {"d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 24}
CONFIG = Config(
    model=ModelConfig(**SIZES, vocab_size=100, max_length=8, qkv_bias=True),
    data=DataConfig(sequence_length=8, batch_size=8),
    optim=OptimConfig(warmup_steps=0),
    run=RunConfig(steps=10, seed=3),
)


# --- meshes


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((1, 4, -1), (1, 4, 2)),
        ((2, 4, 1), (2, 4, 1)),
        ((-1, 8, 1), (1, 8, 1)),
    ],
)
def test_the_mesh_has_the_shape_that_was_asked_for(sizes, shape):
    mesh = make_mesh(MeshConfig(*sizes))
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
    assert sorted(d.id for d in mesh.devices.flat) == [d.id for d in jax.devices()]


def test_a_mesh_may_use_some_of_the_devices():
    mesh = make_mesh(MeshConfig(), jax.devices()[2:4])
    assert mesh.devices.shape == (1, 2, 1) and list(mesh.devices.flat) == jax.devices()[2:4]


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (16, 1, 1), (1, -1, 3)])
def test_a_mesh_that_does_not_fit_says_so_in_one_line(sizes):
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(*sizes))
    message = str(error.value)
    for name, size in zip(("data", "fsdp", "tensor"), sizes, strict=True):
        assert f"mesh.{name}={size}" in message
    assert "8 device" in message and "\n" not in message


class Chip:
    """A device of a slice, as far as the layout looks at it."""

    platform, device_kind, process_index = "cpu", "cpu", 0

    def __init__(self, index: int, slice_index: int):
        self.id, self.slice_index = index, slice_index


def test_slices_lie_along_the_data_axis():
    chips = [Chip(i, i // 4) for i in range(8)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), chips)
    assert [[d.slice_index for d in row] for row in mesh.devices[:, :, 0]] == [[0] * 4, [1] * 4]
    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2), chips)
    assert [[d.slice_index for d in row] for row in mesh.devices[:, 0]] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(UserError, match="mesh.data=1 must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=8), chips)


# --- partition specs


@pytest.mark.parametrize(
    "shape, logical, spec",
    [
        ((64, 32), ("vocab", "embed"), P("tensor", "fsdp")),
        ((16, 4, 8), ("embed", "heads", None), P("fsdp", "tensor", None)),
        ((16, 2, 8), ("embed", "kv_heads", None), P("fsdp", "tensor", None)),
        ((2, 24, 16), ("layers", "mlp", "embed"), P(None, "tensor", "fsdp")),
        ((8, 5, 16), ("batch", None, None), P(("data", "fsdp"), None, None)),
        ((8, 16), ("batch", "embed"), P(("data", "fsdp"), None)),  # an axis splits one dimension only
        ((16,), ("embed",), P("fsdp")),
        ((), (), P()),
    ],
)
def test_dimensions_are_split_over_the_axes_of_the_rules(shape, logical, spec):
    assert partition_spec(shape, logical, MESH) == spec


def test_what_does_not_divide_is_not_split():
    assert partition_spec((16, 9, 8), ("embed", "heads", None), MESH) == P("fsdp", None, None)
    # data x fsdp = 4 does not divide 6, data = 2 does.
    assert partition_spec((6, 5), ("batch", None), MESH) == P("data", None)
    assert partition_spec((3, 5), ("batch", None), {"data": 2, "fsdp": 3, "tensor": 1}) == P("fsdp", None)
    assert partition_spec((7, 5), ("batch", None), MESH) == P(None, None)
    assert partition_spec((8, 16), ("batch", "embed"), {"data": 1, "fsdp": 1, "tensor": 1}) == P(None, None)


def test_a_dropped_axis_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            partition_spec((2048, 5634), ("embed", "mlp"), {"data": 1, "fsdp": 8, "tensor": 4})  # LLaDA-1B
        partition_spec((1, 5), ("batch", None), {"data": 8, "fsdp": 1, "tensor": 1})  # the batch of an init
    (record,) = caplog.records
    message = record.getMessage()
    assert "tensor=4" in message and "mlp=5634" in message


def test_a_name_for_every_dimension():
    with pytest.raises(ValueError):
        partition_spec((4, 4), ("embed",), MESH)


def test_constrain_is_nothing_without_a_mesh_and_a_sharding_under_one():
    x = jnp.zeros((8, 4, 16))
    assert constrain(x, "batch", None, "mlp") is x
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, "batch", None, "mlp"))(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), None, "tensor")), 3)


# --- rows of a batch


@pytest.mark.parametrize("sizes", [(1, 8, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize("batch", [8, 16])
def test_rows_and_back(sizes, batch):
    mesh = make_mesh(MeshConfig(*sizes))
    rows = local_rows(mesh, batch)
    # In order, without overlap, and here, where every device is this process's, without gaps.
    assert rows == [(i, i + batch // len(rows)) for i in range(0, batch, batch // len(rows))]
    assert len(rows) == sizes[0] * sizes[1]
    whole = np.arange(batch * 5, dtype=np.int32).reshape(batch, 5)
    local = np.concatenate([whole[start:stop] for start, stop in rows])
    array = global_array(mesh, batch, rows, local)
    assert array.sharding.is_equivalent_to(batch_sharding(mesh, batch), 2)
    np.testing.assert_array_equal(array, whole)
    for shard in array.addressable_shards:
        assert shard.data.shape == (batch // len(rows), 5)
        np.testing.assert_array_equal(shard.data, whole[shard.index])


def test_a_batch_that_does_not_divide_is_held_whole():
    mesh = make_mesh(MeshConfig(8, 1, 1))
    assert local_rows(mesh, 3) == [(0, 3)]
    whole = np.arange(6, dtype=np.int32).reshape(3, 2)
    np.testing.assert_array_equal(global_array(mesh, 3, [(0, 3)], whole), whole)


def test_local_rows_may_start_anywhere():
    """A process in the middle of a pod: its rows come packed, without those of the others."""
    mesh = make_mesh(MeshConfig(2, 1, 1), jax.devices()[:2])
    packed = np.array([[40, 41], [50, 51], [0, 1], [10, 11]], np.int32)  # rows 4, 5 and then 0, 1 of the batch
    array = global_array(mesh, 4, [(2, 4), (0, 2)], packed)
    np.testing.assert_array_equal(array, packed[[2, 3, 0, 1]])


def test_a_batch_must_be_split_evenly():
    """A batch that is not split would be computed whole by every device."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    for batch, parts in ((4, 1), (16, 4), (24, 3), (8, 2)):
        check_batch(mesh, batch, parts)
    for batch, parts in ((6, 1), (8, 4), (2, 1)):
        with pytest.raises(UserError) as error:
            check_batch(mesh, batch, parts)
        message = str(error.value)
        assert f"data.batch_size={batch}" in message and f"run.microbatches={parts}" in message
        assert "mesh.data=2" in message and "mesh.fsdp=2" in message and f"multiple of {4 * parts}" in message


# --- the state on a mesh

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 2), "all": (2, 2, 2), "one": (1, 1, 1)}


def mesh_of(name: str):
    sizes = MESHES[name]
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


def trees_of(state):
    """The parameters and the two moments of AdamW."""
    return state.params, optax.tree.get(state.opt_state, "mu"), optax.tree.get(state.opt_state, "nu")


@pytest.mark.parametrize("name", MESHES)
def test_moments_are_to_be_split_as_their_parameters_are(name):
    abstract = train_state.abstract_state(CONFIG, mesh_of(name))
    params, *moments = (jax.tree.map(lambda a: (a.shape, a.sharding), tree) for tree in trees_of(abstract))
    for moment in moments:
        assert moment == params
    for scalar in (abstract.step, abstract.next_index, *optax.tree.get_all_with_path(abstract.opt_state, "count")):
        leaf = scalar[1] if isinstance(scalar, tuple) else scalar
        assert leaf.shape == () and leaf.dtype == jnp.int32 and leaf.sharding.is_fully_replicated


def test_every_matrix_is_split_over_fsdp_and_tensor():
    """Or a model that fits a pod on paper does not fit it."""
    abstract = train_state.abstract_state(CONFIG, mesh_of("all"))
    block = jax.tree.map(lambda a: a.sharding.spec, abstract.params["blocks"])
    assert block["q"] == P(None, "fsdp", "tensor", None) and block["k"] == P(None, "fsdp", "tensor", None)
    assert block["o"] == P(None, "tensor", None, "fsdp") and block["down"] == P(None, "tensor", "fsdp")
    assert block["up"] == block["gate"] == P(None, "fsdp", "tensor")
    assert block["q_bias"] == P(None, "tensor", None) and block["mlp_norm"]["scale"] == P(None, None)
    assert abstract.params["embed"].sharding.spec == P("tensor", "fsdp")
    assert abstract.params["head"].sharding.spec == P("fsdp", "tensor")


@functools.cache
def real_state(name: str, seed: int = 3):
    """With few parameters, as each costs a quarter of a second to compile the initialisation of."""
    model = ModelConfig(**SIZES, vocab_size=100, max_length=8, mlp="gelu", tied_head=True)
    cfg = dataclasses.replace(CONFIG, model=model, run=RunConfig(steps=10, seed=seed))
    mesh = mesh_of(name)
    return train_state.create_state(cfg, mesh), train_state.abstract_state(cfg, mesh)


@pytest.mark.slow
def test_the_real_state_is_what_the_abstract_one_says():
    state, abstract = real_state("all")
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for real, planned in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (real.shape, real.dtype) == (planned.shape, planned.dtype)
        assert real.sharding.is_equivalent_to(planned.sharding, real.ndim)
        assert real.addressable_shards[0].data.shape == planned.sharding.shard_shape(real.shape)
    params, *moments = trees_of(state)
    assert params["blocks"]["q"].addressable_shards[0].data.shape == (2, 8, 2, 8)
    for moment in moments:
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(moment))
    assert int(state.step) == int(state.next_index) == 0


@pytest.mark.slow
def test_the_initial_parameters_depend_on_the_seed_and_not_on_the_mesh():
    """To the last bit of the normal quantile, whose vectorised form may round differently on a smaller shard."""
    split, alone, reseeded = (real_state(*key)[0].params for key in (("all",), ("one",), ("one", 4)))
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
    assert not np.isclose(alone["embed"], reseeded["embed"]).all(-1).any()


MUON = dataclasses.replace(CONFIG, optim=OptimConfig(name="muon", warmup_steps=0))
MUON_KINDS = ("muon", "adamw")  # the keys above the moments
MATRICES = ("q", "k", "v", "o", "up", "gate", "down")


def moments_of(state) -> dict[tuple[str, ...], list]:
    """The leaves of the optimizer that belong to a parameter, by its names."""
    moments = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        names = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key not in MUON_KINDS)
        moments.setdefault(names, []).append(leaf)
    del moments[()]  # counts and coefficients
    return moments


@pytest.mark.parametrize("name", MESHES)
def test_the_one_moment_of_a_matrix_under_muon_is_split_as_the_matrix_is(name):
    abstract = train_state.abstract_state(MUON, mesh_of(name))
    moments = moments_of(abstract)
    for path, param in jax.tree_util.tree_leaves_with_path(abstract.params):
        names = tuple(key.key for key in path)
        found = [(moment.shape, moment.sharding) for moment in moments.pop(names)]
        assert found == [(param.shape, param.sharding)] * (1 if names[-1] in MATRICES else 2)
    assert not moments


def compile_muon(cfg: Config, mesh: Mesh):
    """Return the program of one step of Muon on a mesh, and its shardings of parameters and optimizer."""
    layout = jax.tree.map(lambda a: a.sharding, train_state.abstract_state(cfg, mesh))
    optimize = optimizer.build(cfg.optim, optimizer.learning_rate(cfg.optim, 10))
    update = jax.jit(optimize.update, out_shardings=(layout.params, layout.opt_state))
    state = train_state.abstract_state(cfg, mesh)
    with jax.set_mesh(mesh):
        return update.lower(state.params, state.opt_state, state.params).compile(), layout


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 3, 4])
def test_muon_takes_the_same_step_on_every_mesh(layers):
    """Heads and widths that are split over devices are parts of one matrix; devices may not divide the layers."""
    cfg = dataclasses.replace(MUON, model=dataclasses.replace(MUON.model, n_layers=layers))
    rng = np.random.default_rng(0)
    shapes = jax.tree.map(lambda a: np.zeros(a.shape), train_state.abstract_state(cfg, mesh_of("one")).params)
    grads = [jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes) for _ in range(2)]

    def steps(name: str):
        program, layout = compile_muon(cfg, mesh_of(name))
        state = jax.device_put(optimizer.build(cfg.optim, lambda _: 0.0).init(grads[0]), layout.opt_state)
        params = jax.device_put(grads[0], layout.params)
        for each in grads:
            updates, state = program(jax.device_put(each, layout.params), state, params)
        return updates, state

    alone = steps("one")
    for name in ("fsdp", "tensor", "all"):
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(steps(name)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (4, 2)])
def test_muon_exchanges_matrices_before_and_after_its_iterations_alone(fsdp, tensor):
    """Five of them with three products each would gather whole stacks fifteen times and more."""
    mesh = make_mesh(MeshConfig(1, fsdp, tensor), jax.devices())
    cfg = dataclasses.replace(MUON, model=dataclasses.replace(MUON.model, n_layers=8))
    stacks = [train_state.abstract_state(cfg, mesh).params["blocks"][matrix] for matrix in MATRICES]
    held = sum(4 * math.prod(stack.sharding.shard_shape(stack.shape)) for stack in stacks)
    program, _ = compile_muon(cfg, mesh)
    moved = sum(c.runs * c.wire_bytes for c in hlo.analyse(program.as_text()).collectives)
    # The gradient before and after clipping, and the momentum, for which XLA sends what it is made of; then the new
    # momentum and the update. Each goes over one axis after the other.
    assert held / 2 < moved < 6 * (1 if tensor == 1 else 2) * held


def test_muon_leaves_a_tree_without_its_matrices_to_adamw_on_a_mesh():
    """As with LoRA, where only adapters are trained."""
    grads = {"q_lora_a": jnp.ones((2, 16, 4))}
    with jax.set_mesh(mesh_of("fsdp")):
        steps = {}
        for name in ("muon", "adamw"):
            optimize = optimizer.build(dataclasses.replace(MUON.optim, name=name), lambda _: 1e-3)
            steps[name] = optimize.update(grads, optimize.init(grads), grads)[0]["q_lora_a"]
    np.testing.assert_array_equal(steps["muon"], steps["adamw"])
