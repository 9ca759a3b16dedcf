"""The look-up of rows and its gradient, against sums in float64, on meshes and in slabs."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.slow_cases import thinned

from diffusionlm.config import MeshConfig, ModelConfig
from diffusionlm.model import embedding
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import make_mesh, unbox

V, D, B, T = 16, 8, 8, 5
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(V, D)).astype(np.float32)
IDS = RNG.choice([0, 1, 7, 8, 15], size=(B, T)).astype(np.int32)  # the first and last of every part among them
WEIGHT = RNG.normal(size=(B, T, D)).astype(np.float32)


def gradient(dtype="float32"):
    def loss(table, ids):
        return (embedding.look_up(table, ids, dtype) * jnp.asarray(WEIGHT, dtype)).sum()

    return jax.jit(jax.grad(loss))


def expected():
    grad = np.zeros((V, D))
    np.add.at(grad, IDS, WEIGHT.astype(np.float64))
    return grad


def test_rows_are_those_of_the_table():
    np.testing.assert_array_equal(embedding.look_up(TABLE, IDS, "float32"), TABLE[IDS])
    assert embedding.look_up(TABLE, IDS, "bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("sizes", "slab"),
    thinned(
        itertools.product(
            [None, (2, 2, 2), (1, 4, 2), (8, 1, 1), (1, 1, 8), (1, 8, 1), (2, 4, 1)],
            [embedding.SLAB, 2 * V * D // 3, V * D // 4, 1],
        ),
        every=3,
    ),
)
def test_the_gradient_of_a_row_is_the_sum_over_its_places(sizes, slab, monkeypatch):
    monkeypatch.setattr(embedding, "SLAB", slab)
    if not sizes:
        np.testing.assert_allclose(gradient()(TABLE, IDS), expected(), rtol=1e-5, atol=1e-6)
        return
    mesh = make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        table = jax.device_put(TABLE, NamedSharding(mesh, PartitionSpec("tensor", "fsdp")))
        ids = jax.device_put(IDS, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        np.testing.assert_allclose(jax.device_get(gradient()(table, ids)), expected(), rtol=1e-5, atol=1e-6)


def test_rows_that_no_axis_divides_are_counted_once():
    """As positions are: one row for the whole batch."""
    places = np.arange(T, dtype=np.int32)[None]
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        result = jax.jit(jax.grad(lambda table: (embedding.look_up(table, places, "float32", None) * 3).sum()))(TABLE)
    np.testing.assert_array_equal(jax.device_get(result), np.where(np.arange(V)[:, None] < T, 3.0, 0.0) * np.ones(D))


def test_a_gradient_of_bfloat16_is_summed_in_float32():
    """257 times 1: in bfloat16 the sum would stop at 256."""
    ids = np.zeros((1, 257), np.int32)
    ones = jax.grad(lambda table: embedding.look_up(table, ids, "bfloat16").astype(jnp.float32).sum())(TABLE)
    np.testing.assert_array_equal(ones[0], 257.0)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2), (8, 1, 1)])
def test_a_row_of_ids_for_a_whole_batch_has_the_gradient_of_all_its_rows(sizes):
    """The ids are as positions are: one row, of which every row of the batch gets a copy."""
    ids = IDS[:1]
    grad = np.zeros((V, D))
    np.add.at(grad, np.broadcast_to(ids, (B, T)), WEIGHT.astype(np.float64))

    def loss(table):
        return (embedding.look_up(table, ids, "float32", None, B) * WEIGHT).sum()

    with jax.set_mesh(make_mesh(MeshConfig(*sizes))) if sizes else contextlib.nullcontext():
        result = jax.device_get(jax.jit(jax.grad(loss))(TABLE))
    np.testing.assert_allclose(result, grad, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_gradients_of_learned_positions_are_summed_over_the_batch_in_float32():
    """A model that counts the positions itself has the gradient of one that is given them for every row."""
    cfg = ModelConfig(
        d_model=8,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        head_dim=8,
        d_ff=8,
        vocab_size=16,
        max_length=4,
        positions="learned",
        dtype="bfloat16",
    )
    model, rows = Transformer(cfg), 512
    tokens = np.random.default_rng(1).integers(0, 16, (rows, 4)).astype(np.int32)
    positions = np.broadcast_to(np.arange(4, dtype=np.int32), (rows, 4))
    params = unbox(jax.jit(model.init)(jax.random.key(0), tokens[:1])["params"])

    @jax.jit
    @jax.grad
    def gradient(params, positions):
        hidden = model.apply({"params": params}, tokens, None, positions)
        return (hidden.astype(jnp.float32) ** 3).sum() / hidden.size

    counted, explicit = gradient(params, None)["positions"], gradient(params, positions)["positions"]
    np.testing.assert_allclose(counted, explicit, rtol=1e-4, atol=1e-4 * np.abs(explicit).max())
