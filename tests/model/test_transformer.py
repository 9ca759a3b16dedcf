"""The Transformer against a plain numpy forward; what sees what; memory and precision options; initialisation."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params
from support.numpy_model import numpy_forward
from support.slow_cases import slow_but

from diffusionlm.config import DiffusionConfig, MeshConfig, ModelConfig
from diffusionlm.config_model import RopeScaling
from diffusionlm.diffusion.corruption import corrupt
from diffusionlm.diffusion.cross_entropy import cross_entropy
from diffusionlm.diffusion.noise import noise_key
from diffusionlm.diffusion.objectives import mdm_targets
from diffusionlm.model.spec import suppression_mask
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import make_mesh

B, T = 2, 8
BASE = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8, d_ff=24, vocab_size=60, max_length=12, head_chunk=8
)
GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "linear_bias": True, "tied_head": True}
SCALINGS = {  # with pairs on either side of each ramp, and texts of 8 that are longer than the first training's
    "linear": RopeScaling("linear", factor=3),
    "dynamic": RopeScaling("dynamic", factor=3, original_length=5),
    "llama3": RopeScaling("llama3", factor=3, original_length=150, high_freq_factor=5),
    "yarn": RopeScaling("yarn", factor=3, original_length=400, beta_fast=20),
}
VARIANTS = {
    "smdm": BASE,  # RMSNorm, rotary, SwiGLU, no biases, its own head
    "grouped": dataclasses.replace(BASE, n_kv_heads=2, rope_theta=500000.0),
    "dream": dataclasses.replace(BASE, qkv_bias=True, norm_eps=1e-2),
    "bf16 tables": dataclasses.replace(BASE, rope_bf16_tables=True),
    "gpt2": dataclasses.replace(BASE, causal=True, mask_row=False, **GPT2),
    "qwen3": dataclasses.replace(BASE, qk_norm=True, n_kv_heads=2, norm_eps=1e-2),
    "window": dataclasses.replace(BASE, causal=True, sliding_window=3),
    **{kind: dataclasses.replace(BASE, rope_scaling=scaling) for kind, scaling in SCALINGS.items()},
}
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)


def tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, (B, T)).astype(np.int32)


@functools.cache
def parameters(cfg: ModelConfig):
    """Random values for every parameter, gains and biases too, so that each matters."""
    shapes = nn.unbox(jax.eval_shape(Transformer(cfg).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + 0.3 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


COUNTED = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
WHOLE = np.ones((B, T), np.int32)


@functools.cache
def forward(cfg: ModelConfig):
    """Jitted (params, tokens, segment ids, positions) -> hidden states, logits."""
    model = Transformer(cfg)

    def run(params, tokens, segments, positions):
        hidden = model.apply({"params": params}, tokens, segments, positions)
        return hidden, model.apply({"params": params}, hidden, method=Transformer.head)

    return jax.jit(run)


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


# --- no position sees its own clean token through a mask


@functools.cache
def masked_loss():
    """Jitted (params, clean tokens) -> total loss and (inputs, hidden states, cross-entropies) of a corrupted batch."""
    cfg, model = DiffusionConfig(), Transformer(BASE)

    def run(params, clean):
        ones = jnp.ones((B, T), jnp.int32)
        corrupted = corrupt(cfg, BASE.vocab_size, clean, ones, None, noise_key(0, 1))
        targets = mdm_targets(cfg, clean, corrupted)
        hidden = model.apply({"params": params}, targets.inputs_BxT, targets.segment_ids_BxT)
        head = lambda h: model.apply({"params": params}, h, method=Transformer.head)  # noqa: E731
        nll = cross_entropy(head, hidden, targets.labels_BxT, jnp.asarray(suppression_mask(BASE, ())), 4)
        return (nll * targets.weight_BxT).sum(), (targets.inputs_BxT, hidden, nll, corrupted.masked_BxT)

    return jax.jit(jax.value_and_grad(run, has_aux=True))


@pytest.mark.slow
def test_a_token_under_a_mask_changes_its_label_and_nothing_else():
    params, clean = parameters(BASE), tokens()
    (loss, (inputs, hidden, nll, masked)), _ = masked_loss()(params, clean)
    masked = np.asarray(masked)
    assert 0 < masked.sum() < masked.size
    b, t = np.argwhere(masked)[0]
    other = clean.copy()
    other[b, t] = (clean[b, t] + 1) % BASE.vocab_size
    (other_loss, (other_inputs, other_hidden, other_nll, _)), _ = masked_loss()(params, other)
    np.testing.assert_array_equal(inputs, other_inputs)
    np.testing.assert_array_equal(hidden, other_hidden)
    assert other_loss != loss
    assert np.argwhere(np.asarray(nll) != np.asarray(other_nll)).tolist() == [[b, t]]


def test_a_token_in_sight_changes_every_prediction_of_its_sequence_and_is_not_scored():
    params, clean = parameters(BASE), tokens()
    (_, (_, hidden, _, masked)), _ = masked_loss()(params, clean)
    b, t = np.argwhere(~np.asarray(masked))[0]
    other = clean.copy()
    other[b, t] = (clean[b, t] + 1) % BASE.vocab_size
    (_, (_, other_hidden, _, _)), _ = masked_loss()(params, other)
    changed = (np.asarray(hidden) != np.asarray(other_hidden)).any(-1)
    assert changed[b].all() and not changed[1 - b].any()


def test_the_embedding_of_a_token_under_a_mask_gets_no_gradient():
    params = parameters(BASE)
    clean = np.arange(B * T, dtype=np.int32).reshape(B, T)  # every token once
    (_, (_, _, _, masked)), grads = masked_loss()(params, clean)
    size = np.linalg.norm(np.asarray(grads["embed"]), axis=-1)
    np.testing.assert_array_equal(size[clean[np.asarray(masked)]], 0.0)
    assert (size[clean[~np.asarray(masked)]] > 0).all()
    assert size[BASE.vocab_size] > 0  # the mask row learns
    assert (size[B * T : BASE.vocab_size] == 0).all() and (size[BASE.vocab_size + 1 :] == 0).all()


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


# --- initialisation and suppression


@pytest.fixture(scope="module")
def initial():
    cfg = dataclasses.replace(BASE, d_model=64, n_layers=3, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=48)
    variables = jax.jit(lambda k: nn.unbox(Transformer(cfg).init(k, jnp.zeros((1, 1), jnp.int32))))(jax.random.key(0))
    return cfg, variables["params"]


@pytest.mark.slow
def test_every_matrix_starts_as_smdm_documents_it(initial):
    """sqrt(2/(5 d)) whatever the fan-in; 1/(sqrt(d) layers) for what is added to the stream."""
    cfg, params = initial
    into, onto = np.sqrt(2 / (5 * cfg.d_model)), 1 / (np.sqrt(cfg.d_model) * cfg.n_layers)
    blocks = params["blocks"]
    expected = {name: (blocks[name], into) for name in ("q", "k", "v", "up", "gate")}
    expected |= {name: (blocks[name], onto) for name in ("o", "down")}
    expected |= {name: (params[name], into) for name in ("embed", "head")}
    assert len(expected) == len(jax.tree.leaves(params)) - 3  # the three norms
    for name, (value, std) in expected.items():
        x = np.asarray(value).ravel() / std
        assert abs(x.mean()) < 5 / np.sqrt(x.size), name
        assert abs(np.square(x).mean() - 1) < 5 * np.sqrt(2 / x.size), name
        assert abs((x**4).mean() - 3) < 5 * np.sqrt(96 / x.size), name  # normal, and not truncated
    for norm in (blocks["attention_norm"], blocks["mlp_norm"], params["final_norm"]):
        np.testing.assert_array_equal(norm["scale"], 1.0)


@pytest.mark.slow
def test_layers_start_different(initial):
    _, params = initial
    for name, value in params["blocks"].items():
        if not name.endswith("norm"):
            for i, j in ((0, 1), (0, 2), (1, 2)):
                a, b = np.ravel(value[i]), np.ravel(value[j])
                assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(a.size), name


def test_suppression_names_padding_rows_and_the_listed():
    cfg = dataclasses.replace(BASE, vocab_size=130)
    suppressed = suppression_mask(cfg, (5, 129))
    assert suppressed.shape == (256,) and suppressed.dtype == bool
    assert np.flatnonzero(~suppressed).tolist() == [i for i in range(130) if i not in (5, 129)]
    assert np.flatnonzero(~suppression_mask(cfg, ())).tolist() == list(range(130))
