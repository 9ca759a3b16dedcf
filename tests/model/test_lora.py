"""Low-rank adapters: nothing at first, the chain rule of the weight they stand for, and all else frozen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from support.random_params import draw_params

from diffusionlm.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig
from diffusionlm.model import lora
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.training import programs
from diffusionlm.training import step as train_step
from diffusionlm.training.state import abstract_state, create_state

B, T, V, R = 8, 8, 29, 3
PLAIN = ModelConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24, vocab_size=V, max_length=T, head_chunk=16
)
GPT2 = dataclasses.replace(
    PLAIN, norm="layernorm", positions="learned", mlp="gelu", linear_bias=True, tied_head=True, n_kv_heads=4
)
CFG = Config(
    model=dataclasses.replace(PLAIN, lora_rank=R),
    optim=OptimConfig(schedule="constant", peak_lr=0.01, warmup_steps=0),
    data=DataConfig(sequence_length=T, batch_size=B),
    run=RunConfig(steps=20, seed=3),
).validate()
TOKENS = np.random.default_rng(0).integers(0, V, (B, T + 1)).astype(np.int32)
BATCH = {"tokens": TOKENS, "segment_ids": np.ones_like(TOKENS)}


@functools.cache
def parameters(cfg):
    return nn.unbox(jax.jit(Transformer(cfg).init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"])


def states(cfg, params):
    return jax.jit(Transformer(cfg).apply)({"params": params}, jnp.asarray(TOKENS[:, :T]))


def with_random_ups(params):
    """Adapters that have learnt something."""

    def one(path, leaf):
        noise = np.random.default_rng(len(jax.tree_util.keystr(path))).normal(size=leaf.shape).astype(np.float32)
        return 0.1 * noise if path[-1].key.endswith(lora.UP) else leaf

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plain", [pytest.param(PLAIN, id="llama"), pytest.param(GPT2, id="gpt2", marks=pytest.mark.slow)]
)
def test_an_adapter_is_the_low_rank_matrix_that_merging_adds(plain):
    """W + 2 down @ up, by its definition; before anything is learnt it adds nothing."""
    cfg = dataclasses.replace(plain, lora_rank=R)
    params = parameters(cfg)
    fresh = lora.merge(params)
    assert jax.tree.structure(fresh) == jax.tree.structure(draw_params(plain))
    np.testing.assert_array_equal(states(cfg, params), states(plain, fresh))
    learnt = with_random_ups(params)
    merged = lora.merge(learnt)
    blocks = learnt["blocks"]
    for name in {"q", "k", "v", "o", "up", "down"} | ({"gate"} if plain.mlp == "swiglu" else set()):
        for layer in range(cfg.n_layers):
            down, up = np.asarray(blocks[name + lora.DOWN][layer]), np.asarray(blocks[name + lora.UP][layer])
            added = 2 * down.reshape(-1, R) @ up.reshape(R, -1)
            assert np.abs(added).max() > 0.01
            expected = np.asarray(blocks[name][layer]).reshape(added.shape) + added
            np.testing.assert_allclose(merged["blocks"][name][layer].reshape(added.shape), expected, atol=1e-6)
    np.testing.assert_allclose(states(cfg, learnt), states(plain, merged), atol=1e-4)
    assert np.abs(np.asarray(states(cfg, learnt)) - np.asarray(states(plain, fresh))).max() > 0.1
    half = lora.merge(jax.tree.map(lambda x: x.astype(jnp.bfloat16), learnt))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half)} == {"bfloat16"}


@pytest.mark.slow
def test_gradients_of_adapters_are_those_of_the_weight_by_the_chain_rule():
    params = with_random_ups(parameters(CFG.model))
    plain = dataclasses.replace(CFG, model=PLAIN)
    full = jax.jit(lambda batch: train_step.targets(CFG, batch, 0))(BATCH)
    (loss, _), grads = jax.jit(lambda params: train_step.loss_and_grads(CFG, params, full))(params)
    (whole, _), of_weights = jax.jit(lambda params: train_step.loss_and_grads(plain, params, full))(lora.merge(params))
    assert float(loss) == pytest.approx(float(whole), rel=1e-5)
    np.testing.assert_allclose(grads["embed"], of_weights["embed"], atol=1e-5)
    for name in ("q", "o", "gate", "down"):
        for layer in range(2):
            down = np.asarray(params["blocks"][name + lora.DOWN][layer]).reshape(-1, R)
            up = np.asarray(params["blocks"][name + lora.UP][layer]).reshape(R, -1)
            weight = np.asarray(of_weights["blocks"][name][layer]).reshape(len(down), -1)
            for suffix, expected in ((lora.DOWN, 2 * weight @ up.T), (lora.UP, 2 * down.T @ weight)):
                grad = np.asarray(grads["blocks"][name + suffix][layer]).reshape(expected.shape)
                np.testing.assert_allclose(grad, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_step_changes_adapters_and_embedding_alone(microbatches):
    cfg = dataclasses.replace(CFG, run=dataclasses.replace(CFG.run, microbatches=microbatches))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = create_state(cfg, mesh)
        before = jax.tree.map(np.array, state.params)
        after, metrics = programs.make_train_step(cfg, mesh)(state, jax.device_put(BATCH), np.int32(0))
    assert metrics["applied"] == 1

    def compare(path, old, new):
        # The first step moves only the ups: where they are 0, no gradient comes through to the downs.
        learns = path[-1].key == "embed" or path[-1].key.endswith(lora.UP)
        if not path[-1].key.endswith(lora.DOWN):
            assert (np.asarray(new) != old).any() == learns, path

    jax.tree_util.tree_map_with_path(compare, before, after.params)
    moments = [path for path, _ in jax.tree_util.tree_leaves_with_path(after.opt_state)]
    names = {str(path[-1].key) for path in moments if isinstance(path[-1], jax.tree_util.DictKey)}
    assert names and all(name == "embed" or name.endswith((lora.DOWN, lora.UP)) for name in names)


@pytest.mark.slow
def test_adapters_lie_on_the_mesh_with_the_dimensions_of_their_weights():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    blocks = abstract_state(CFG, mesh).params["blocks"]
    for name in ("q", "k", "o", "up", "down"):
        weight, down, up = (blocks[name + end].sharding.spec for end in ("", lora.DOWN, lora.UP))
        assert down[-1] is None and up[1] is None
        assert (*down[:-1], *up[2:]) == tuple(weight)
