"""The vocabulary projection and its loss: against float64, in chunks, for counted positions only, on meshes."""

import functools
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec
from support.slow_cases import slow_but, thinned

from diffusionlm.config import MeshConfig
from diffusionlm.diffusion.cross_entropy import (
    cross_entropy,
    head_chunk,
    head_turns,
    slowest_share,
    weighted_cross_entropy,
)
from diffusionlm.parallel.mesh import make_mesh

V, PADDED = 13, 16  # tokens, and columns of the head
SUPPRESSED = (np.arange(PADDED) >= V) | (np.arange(PADDED) == 4)
B, T, D = 8, 11, 6  # a prime length, so that no chunk divides it


@functools.cache
def case():
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(D, PADDED)).astype(np.float32)
    labels = rng.choice(np.flatnonzero(~SUPPRESSED), (B, T)).astype(np.int32)
    return hidden, head, labels


def definition(hidden, head, labels):
    """-log softmax(logits)[label] of the tokens that may be predicted, and the softmax, in float64."""
    logits = np.where(SUPPRESSED, -np.inf, hidden.astype(np.float64) @ head.astype(np.float64))
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(p, labels[..., None], -1)[..., 0]), p


# --- one number a position


@pytest.mark.parametrize("chunk", [1, 24, 40, B * T])
def test_it_is_minus_log_softmax_without_the_suppressed(chunk):
    hidden, head, labels = case()
    nll = jax.jit(lambda h, y: cross_entropy(lambda h: h @ head, h, y, jnp.asarray(SUPPRESSED), chunk))(hidden, labels)
    np.testing.assert_allclose(nll, definition(*case())[0], rtol=1e-5, atol=1e-6)
    assert nll.dtype == jnp.float32


def test_chunks_are_of_tokens_on_each_device():
    """8 rows over 4 devices and 6 tokens at a time: 3 positions of the 2 rows of each."""
    hidden, labels = jnp.zeros((8, 12, D)), jnp.zeros((8, 12), jnp.int32)
    seen = []

    def head(h):
        seen.append(h.shape)
        return h @ case()[1]

    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        jax.eval_shape(lambda: cross_entropy(head, hidden, labels, jnp.asarray(SUPPRESSED), 6))
    assert set(seen) == {(8, 3, D)}


# --- the sums of training, with their gradients

RNG = np.random.default_rng(5)
COUNTED = {
    "half": RNG.random((B, T)) < 0.5,
    "none": np.zeros((B, T), bool),
    "all": np.ones((B, T), bool),
    "one": np.arange(B * T).reshape(B, T) == 37,
    "whole rows": np.repeat(np.arange(B)[:, None] % 3 == 0, T, axis=1),
    "the last device's": np.repeat(np.arange(B)[:, None] >= B - 2, T, axis=1),
}
WEIGHT = RNG.gamma(1.0, size=(B, T)).astype(np.float32)


def sums(hidden, head, labels, weight, counted, chunk, share):
    return weighted_cross_entropy(hidden, head, labels, weight, counted, jnp.asarray(SUPPRESSED), chunk, share)


@functools.cache
def jitted():
    return jax.jit(jax.value_and_grad(sums, argnums=(0, 1), has_aux=True), static_argnums=(5, 6))


def expected(counted):
    """The sums, and the gradients of the first by hidden states and head, in float64."""
    hidden, head, labels = case()
    nll, p = definition(hidden, head, labels)
    weight = np.where(counted, WEIGHT, 0).astype(np.float64)
    error = (p - (np.arange(PADDED) == labels[..., None])) * weight[..., None]
    grads = error @ head.astype(np.float64).T, np.einsum("btd,btv->dv", hidden.astype(np.float64), error)
    return ((weight * nll).sum(), np.array([[(nll * counted).sum()], [counted.sum()]])), grads


def arguments(name):
    """A case whose uncounted positions hold what must not be looked at."""
    hidden, head, labels = case()
    counted = COUNTED[name]
    hidden = np.where(counted[..., None], hidden, np.nan)
    labels = np.where(counted, labels, V)  # a suppressed id
    return hidden, head, labels, np.where(counted, WEIGHT, 0).astype(np.float32), counted


@pytest.mark.parametrize(("chunk", "share"), slow_but([(1000, 0.5), (1000, 1.0), (7, 0.5), (1, 1.0)], [(7, 0.5)]))
@pytest.mark.parametrize("name", COUNTED)
def test_sums_and_gradients_are_those_of_the_definition(name, chunk, share):
    """Whatever the usual share is said to be."""
    result = jitted()(*arguments(name), chunk, share)
    chex.assert_trees_all_close(result, expected(COUNTED[name]), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(result[1][1])[:, SUPPRESSED], 0.0)


@pytest.mark.parametrize(
    ("name", "sizes"),
    thinned(
        itertools.product(
            ["half", "the last device's", "none"], [(2, 2, 2), (1, 4, 2), (4, 2, 1), (1, 1, 8), (1, 2, 4)]
        ),
        every=4,
    ),
)
def test_meshes_change_nothing(sizes, name):
    """A tensor whose width of 6 or 16 columns no axis divides stays whole; all others are split."""
    mesh = make_mesh(MeshConfig(*sizes))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        placed = [x if x.shape == (D, PADDED) else jax.device_put(x, rows) for x in arguments(name)]
        result = jax.device_get(jitted()(*placed, 3, 0.5))
    chex.assert_trees_all_close(result, expected(COUNTED[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_groups_of_rows_are_summed_apart(sizes):
    """The nats and the counted positions of each, without weights; a group without rows has none."""
    hidden, head, labels, weight, counted = arguments("half")
    group = np.array([2, 0, 2, 4, 4, 4, 0, 2], np.int32)

    @jax.jit
    def compute(*inputs):
        return weighted_cross_entropy(*inputs[:-1], jnp.asarray(SUPPRESSED), 7, 0.5, inputs[-1], 5)[1]

    inputs = (hidden, head, labels, weight, counted, group)
    if sizes is None:
        found = compute(*inputs)
    else:
        mesh = make_mesh(MeshConfig(*sizes))
        rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        with jax.set_mesh(mesh):
            found = compute(*(x if x is head else jax.device_put(x, rows) for x in inputs))
    nll = definition(*case())[0]
    by_hand = [
        [sum(nll[b, t] for b in range(B) for t in range(T) if group[b] == g and counted[b, t]) for g in range(5)],
        [sum(int(counted[b, t]) for b in range(B) for t in range(T) if group[b] == g) for g in range(5)],
    ]
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)


def test_rows_that_no_axis_divides_are_counted_once():
    hidden, head, labels, weight, counted = (x if x.shape == (D, PADDED) else x[:3] for x in arguments("all"))
    alone = jitted()(hidden, head, labels, weight, counted, 3, 0.5)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        together = jitted()(hidden, head, labels, weight, counted, 3, 0.5)
    chex.assert_trees_all_close(jax.device_get(together), jax.device_get(alone), rtol=1e-5, atol=1e-5)


def test_gradients_scale_with_what_the_sum_goes_into():
    hidden, head, labels, weight, counted = arguments("half")
    tripled = jax.jit(jax.grad(lambda h, w: 3 * sums(h, w, labels, weight, counted, 7, 0.5)[0], argnums=(0, 1)))
    chex.assert_trees_all_close(
        tripled(hidden, head), jax.tree.map(lambda x: 3 * x, expected(counted)[1]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_in_bfloat16_the_sums_over_tokens_and_vocabulary_are_still_float32(sizes):
    """Against the float64 definition on rounded inputs: products of bfloat16, but no sum that stops growing."""
    hidden, head, labels = (np.asarray(x, jnp.bfloat16).astype(np.float32) if x.ndim > 2 else x for x in case())
    head = np.asarray(head, jnp.bfloat16).astype(np.float32)
    many, weight = np.repeat(hidden, 64, axis=1), np.full((B, T * 64), 1 / 64, np.float32)
    labels = np.repeat(labels, 64, axis=1)
    counted = np.ones_like(weight, bool)
    nll, p = definition(many, head, labels)
    grad_head = np.einsum("btd,btv->dv", many, (p - (np.arange(PADDED) == labels[..., None])) / 64)
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))) if sizes else jax.default_device(jax.devices()[0]):
        (loss, _), (grad_hidden, result) = jitted()(
            jnp.asarray(many, jnp.bfloat16), head, labels, weight, counted, 4, 1
        )
    assert grad_hidden.dtype == jnp.bfloat16 and result.dtype == jnp.float32
    np.testing.assert_allclose(loss, nll.sum() / 64, rtol=1e-5)
    np.testing.assert_allclose(result, grad_head, rtol=1e-2, atol=2e-2)


def equations(jaxpr, inside=()):
    """Every equation of a jaxpr, with the names of the primitives that it lies in."""
    for equation in jaxpr.eqns:
        yield inside, equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner, (*inside, equation.primitive.name))


def traced(sizes, chunk):
    with jax.set_mesh(make_mesh(MeshConfig(*sizes))):
        grad = jax.value_and_grad(sums, argnums=(0, 1), has_aux=True)
        return list(equations(jax.make_jaxpr(grad, static_argnums=(5, 6))(*arguments("half"), chunk, 0.5).jaxpr))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8)])
def test_collectives_are_few_and_the_gradient_is_reduced_once(sizes):
    """In the loop two numbers a position at most, and only where the vocabulary is split; no logits."""
    C = 3
    collectives = [
        ("while" in inside, equation.primitive.name, equation.outvars[0].aval.shape)
        for inside, equation in traced(sizes, C)
        if equation.primitive.name in ("psum", "pmax", "all_gather", "reduce_scatter", "psum_invariant", "all_to_all")
    ]
    data, fsdp, tensor = sizes
    result = [name_and_shape for in_loop, *name_and_shape in collectives if in_loop]
    assert result == ([["all_gather", (2, tensor, C)]] if tensor > 1 else []), result
    columns = PADDED // tensor
    reductions = [shape for _, name, shape in collectives if name != "all_gather" and shape[-1:] == (columns,)]
    assert len(reductions) == (data > 1) + (fsdp > 1), collectives


def test_without_gradients_none_are_accumulated():
    """Evaluation does the projection alone: no array of the size of the head or of all hidden states is summed up."""

    def carried(function):
        jaxpr = jax.make_jaxpr(function, static_argnums=(5, 6))(*arguments("half"), 3, 0.5).jaxpr
        loops = [equation for _, equation in equations(jaxpr) if equation.primitive.name == "while"]
        return {variable.aval.shape for loop in loops for variable in loop.outvars}

    gradients = {(B * T, D), (D, PADDED)}
    assert gradients <= carried(jax.value_and_grad(sums, argnums=(0, 1), has_aux=True))
    assert not gradients & carried(sums)


def test_logits_exist_for_one_chunk_at_a_time():
    columns = PADDED // 2

    def most(chunk):
        shapes = [v.aval.shape for _, equation in traced((4, 1, 2), chunk) for v in equation.outvars]
        return max(math.prod(s) for s in shapes if s and s[-1] == columns and s != (D, columns))

    assert most(1000) == 13 * columns  # of 22 positions on each device half and an eighth more: the test can see them
    assert most(3) == 3 * columns


@pytest.mark.parametrize(("rows", "share", "slowest"), [(1, 0.5, 1.0), (2, 0.5, 0.5), (3, 0.5, 2 / 3), (5, 1.0, 1.0)])
def test_a_row_without_its_antithetic_partner_may_be_masked_whole(rows, share, slowest):
    """2 of 3 rows: a pair of which half is masked, and one more."""
    assert slowest_share(rows, share) == pytest.approx(slowest)


@pytest.mark.parametrize(("rows", "most_of_all"), [(1, 1.0), (2, 0.57), (3, 0.76), (4, 0.57), (5, 0.68)])
def test_the_head_of_the_slowest_device_is_never_dearer_than_all_positions(rows, most_of_all):
    length, most = 2048, 2048
    chunk, turns = head_chunk(rows, length, most, 0.5), head_turns(rows, length, most, 0.5)
    assert turns * chunk <= most_of_all * rows * length
