"""The Transformer against a plain numpy forward; what sees what; memory and precision options."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from support.numpy_model import numpy_forward
from support.slow_cases import slow_but
from support.tiny_transformer import BASE, COUNTED, SEGMENTS, VARIANTS, WHOLE, B, T, forward, parameters, tokens

from diffusionlm.config import MeshConfig, ModelConfig
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import make_mesh


@pytest.mark.parametrize("name", slow_but(VARIANTS, ("smdm", "gpt2", "qwen3", "window", "yarn")))
def test_the_forward_pass_is_the_papers(name):
    cfg = VARIANTS[name]
    params, ids = parameters(cfg), tokens()
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4], [3, 1, 4, 11, 5, 9, 2, 6]], np.int32)
    for segments, places in ((SEGMENTS, positions), (WHOLE, COUNTED)):
        hidden, logits = forward(cfg)(params, ids, segments, places)
        assert hidden.shape == (B, T, cfg.d_model) and logits.shape == (B, T, cfg.padded_vocab_size)
        for row in range(B):
            expected = numpy_forward(cfg, params, ids[row], segments[row], places[row])
            np.testing.assert_allclose(hidden[row], expected.hidden, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(logits[row], expected.logits, rtol=1e-5, atol=1e-5)


def test_rounded_tables_are_an_option_that_does_something():
    plain = {**parameters(BASE)}
    exact, _ = forward(BASE)(plain, tokens(), WHOLE, COUNTED)
    rounded, _ = forward(VARIANTS["bf16 tables"])(plain, tokens(), WHOLE, COUNTED)
    difference = np.abs(np.asarray(exact) - np.asarray(rounded)).max()
    assert 1e-5 < difference < 0.1


def test_biases_are_where_the_families_have_them():
    def biases(cfg):
        return {name.removesuffix("_bias") for name in parameters(cfg)["blocks"] if name.endswith("_bias")}

    assert biases(BASE) == set()
    assert biases(VARIANTS["dream"]) == {"q", "k", "v"}
    assert biases(VARIANTS["gpt2"]) == {"q", "k", "v", "o", "up", "down"}
    assert set(parameters(BASE)) == {"embed", "blocks", "final_norm", "head"}
    assert set(parameters(VARIANTS["gpt2"])) == {"embed", "positions", "blocks", "final_norm"}


# --- what sees what


@functools.cache
def influence_of(causal: bool):
    cfg = dataclasses.replace(BASE, causal=causal)
    ids = jnp.arange(T, dtype=jnp.int32)[None] + 7  # distinct, so that row 7 + j of the table is input j
    mix = jnp.asarray(np.random.default_rng(0).normal(size=cfg.d_model), jnp.float32)

    def outputs(embed, segments):
        return Transformer(cfg).apply({"params": {**parameters(cfg), "embed": embed}}, ids, segments)[0] @ mix

    return jax.jit(jax.jacrev(outputs))


def influence(causal: bool, segments) -> np.ndarray:
    """(T, T): the size of the gradient of output i with respect to the embedding of input j, for one sequence."""
    jacobian = influence_of(causal)(parameters(BASE)["embed"], segments)
    return np.linalg.norm(jacobian[:, 7 : 7 + T], axis=-1)


def test_every_output_depends_on_every_input():
    assert (influence(False, WHOLE[:1]) > 1e-6).all()


def test_a_causal_output_depends_on_its_past_alone():
    past = np.tril(np.ones((T, T), bool))
    size = influence(True, WHOLE[:1])
    assert (size[past] > 1e-6).all() and (size[~past] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_outputs_depend_on_their_own_document_alone(causal):
    seen = SEGMENTS[0][:, None] == SEGMENTS[0][None]
    if causal:
        seen &= np.tril(np.ones((T, T), bool))
    size = influence(causal, SEGMENTS[:1])
    assert (size[seen] > 1e-6).all() and (size[~seen] == 0).all()


def test_a_packed_document_is_as_good_as_alone():
    ids = tokens()
    places = np.array([[0, 1, 2, 0, 1, 2, 0, 0], np.arange(8)], np.int32)
    packed, _ = forward(BASE)(parameters(BASE), ids, SEGMENTS, places)
    model = Transformer(BASE)
    # Without segments and positions: all of one document, counted from 0.
    alone = jax.jit(model.apply)({"params": parameters(BASE)}, ids[:1, 3:6])
    np.testing.assert_allclose(packed[0, 3:6], alone[0], rtol=1e-5, atol=1e-5)


def test_rotary_positions_are_relative():
    """Shifting all positions changes nothing, and positions belong to tokens and not to places in the array."""
    ids = tokens()
    places = COUNTED
    here, _ = forward(BASE)(parameters(BASE), ids, WHOLE, places)
    later, _ = forward(BASE)(parameters(BASE), ids, WHOLE, places + 100)
    np.testing.assert_allclose(here, later, rtol=1e-4, atol=1e-4)
    order = np.random.default_rng(1).permutation(T)
    shuffled, _ = forward(BASE)(parameters(BASE), ids[:, order], WHOLE, places[:, order])
    np.testing.assert_allclose(here[:, order], shuffled, rtol=1e-5, atol=1e-5)
    unordered, _ = forward(BASE)(parameters(BASE), ids[:, order], WHOLE, places)
    assert np.abs(np.asarray(unordered) - np.asarray(shuffled)).max() > 1e-2


# --- options that must not change the numbers


@functools.cache
def value_and_grad(cfg: ModelConfig):
    model = Transformer(cfg)

    def loss(params, tokens):
        hidden = model.apply({"params": params}, tokens, jnp.asarray(SEGMENTS))
        return jnp.sin(model.apply({"params": params}, hidden, method=Transformer.head)).sum() / 100

    return jax.value_and_grad(loss)


@pytest.fixture(scope="module")
def without_remat():
    return jax.jit(value_and_grad(BASE))(parameters(BASE), tokens())


def primitives(jaxpr) -> list[str]:
    inner = [name for e in jaxpr.eqns for part in jaxprs_in_params(e.params) for name in primitives(part)]
    return [e.primitive.name for e in jaxpr.eqns] + inner


def recomputes(cfg: ModelConfig) -> bool:
    result = primitives(jax.make_jaxpr(value_and_grad(cfg))(parameters(cfg), tokens()).jaxpr)
    return any("remat" in name or "checkpoint" in name for name in result)


@pytest.mark.slow
@pytest.mark.parametrize(
    "remat", ["dots", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("attention", "full"))]
)
def test_remat_changes_memory_and_nothing_else(remat, without_remat):
    cfg = dataclasses.replace(BASE, remat=remat)
    chex.assert_trees_all_equal_shapes(parameters(cfg), parameters(BASE))
    result = jax.jit(value_and_grad(cfg))(parameters(BASE), tokens())
    chex.assert_trees_all_close(result, without_remat, rtol=1e-5, atol=1e-6)
    assert recomputes(cfg) and not recomputes(BASE)


@pytest.mark.parametrize("name", slow_but(["smdm", "gpt2"], ("smdm",)))
def test_bfloat16_is_close_and_only_where_it_belongs(name):
    cfg = VARIANTS[name]
    exact_hidden, exact_logits = forward(cfg)(parameters(cfg), tokens(), SEGMENTS, COUNTED)
    half = dataclasses.replace(cfg, dtype="bfloat16")
    hidden, logits = forward(half)(parameters(cfg), tokens(), SEGMENTS, COUNTED)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    for rough, exact in ((hidden, exact_hidden), (logits, exact_logits)):
        error = np.linalg.norm(np.asarray(rough, np.float32) - np.asarray(exact)) / np.linalg.norm(exact)
        assert 1e-4 < error < 0.03  # a rounding is 2^-9; a few dozen of them add up
    grads = jax.eval_shape(value_and_grad(half), parameters(cfg), tokens())[1]
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))


@pytest.mark.slow
def test_gradients_of_many_positions_are_summed_in_float32():
    """Half of all inputs may be one id, the mask's: in bfloat16, adding one to 256 gives 256 again."""
    cfg = dataclasses.replace(VARIANTS["gpt2"], causal=False, n_layers=1)
    mix = jnp.asarray(np.random.default_rng(0).normal(size=cfg.d_model), jnp.float32)
    same = jnp.full((512, 8), 3, jnp.int32)

    def gradients(dtype):
        model = Transformer(dataclasses.replace(cfg, dtype=dtype))
        loss = lambda p: (model.apply({"params": p}, same).astype(jnp.float32) @ mix).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(parameters(cfg))

    exact, rough = gradients("float32"), gradients("bfloat16")
    for path, expected in jax.tree_util.tree_leaves_with_path(exact):
        result = functools.reduce(lambda tree, key: tree[key.key], path, rough)
        error = np.linalg.norm(np.asarray(result) - np.asarray(expected))
        # The keys' bias moves all scores of a query alike, so its gradient is 0 but for rounding.
        if path[-1].key != "k_bias":
            assert error < 0.05 * np.linalg.norm(expected), jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dtype",
    [(name, "bfloat16") for name in ("dream", "bf16 tables", "gpt2", "qwen3", "window", "dynamic", "yarn")]
    + [
        pytest.param(name, dtype, marks=pytest.mark.slow)
        for name, dtype in (
            ("smdm", "bfloat16"),
            ("grouped", "bfloat16"),
            ("linear", "bfloat16"),
            ("llama3", "bfloat16"),
            ("smdm", "float32"),
        )
    ],
)
def test_no_dtype_is_promoted_by_accident(name, dtype):
    cfg = dataclasses.replace(VARIANTS[name], dtype=dtype)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(value_and_grad(cfg), parameters(cfg), tokens())


@pytest.mark.parametrize("name", ["smdm", "gpt2"])
def test_a_sampler_may_hold_parameters_in_bfloat16(name):
    cfg = dataclasses.replace(VARIANTS[name], dtype="bfloat16")
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), parameters(cfg))
    with jax.numpy_dtype_promotion("strict"):
        hidden, logits = jax.eval_shape(forward(cfg), params, tokens(), SEGMENTS, COUNTED)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32


# --- sharding constraints


def test_sharding_constraints_are_there_under_a_mesh_and_only_then():
    """Under `with mesh:` instead of `jax.set_mesh` logical constraints would silently vanish."""

    def constraints():
        return primitives(jax.make_jaxpr(value_and_grad(BASE))(parameters(BASE), tokens()).jaxpr).count(
            "sharding_constraint"
        )

    assert constraints() == 0
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        # Forward: embedding table and rows, q, k, v, MLP width, twice the stream, logits; and their transposes.
        assert constraints() >= 18
