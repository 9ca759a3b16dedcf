"""Counts of FLOPs and bytes against the matmuls of traced programs, XLA's cost analysis and published numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend import core as jex
from support.matmul_flops import GPT2_LIKE, TINY, VARIANTS, matmul_flops, programs, unrolled
from support.slow_cases import slow_but

from diffusionlm import flops, presets
from diffusionlm.config import MeshConfig, ModelConfig, OptimConfig
from diffusionlm.errors import UserError
from diffusionlm.model.attention import attention_mask
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import make_mesh, tree_shardings
from diffusionlm.training import optimizer


@pytest.mark.parametrize("variant", slow_but(VARIANTS, ("mdm", "gpt2")))
def test_counts_equal_the_matmuls_of_the_forward_pass(variant):
    cfg, B, T = dataclasses.replace(TINY, **VARIANTS[variant]), 2, 12
    forward, _, args = programs(cfg, B, T)
    parts = flops.forward(cfg, T)
    assert sum(p.size for p in jax.tree.leaves(args[0])) == flops.parameters(cfg).stored
    assert matmul_flops(unrolled(forward, args).jaxpr) == B * sum(parts.values())
    # Weights that have adapters have no gradient, nor has the head, unless it is the embedding.
    frozen = parts["qkv"] + parts["out"] + parts["mlp"] + (0 if cfg.tied_head else parts["head"])
    assert flops.train(cfg, T, "model") == 3 * sum(parts.values()) - (frozen if cfg.lora_rank else 0)


@pytest.mark.parametrize("window", [1, 5, 11, 12, 40])
def test_a_window_counts_as_many_keys_as_it_is_wide(window):
    """The mask has fewer at the start of a text only: T W - W (W - 1) / 2 pairs of T W."""
    T = 12
    cfg = dataclasses.replace(TINY, causal=True, sliding_window=window)
    pairs = int(np.asarray(attention_mask(T, True, 1, window, None)).sum())
    width = min(window, T)
    full, less = (flops.forward(c, T) for c in (dataclasses.replace(cfg, sliding_window=0), cfg))
    for part in ("attention_scores", "attention_values"):
        assert less[part] == full[part] * width // T
        assert less[part] == 2 * cfg.n_layers * cfg.n_heads * cfg.head_dim * (pairs + width * (width - 1) // 2)
    assert all(less[part] == full[part] for part in less if not part.startswith("attention"))


def test_the_head_is_counted_where_labels_are_predicted():
    whole, half = (flops.train(TINY, 12, "model", predicted=share) for share in (1.0, 0.5))
    assert whole - half == 3 * flops.forward(TINY, 12)["head"] // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smdm_6m", "gpt2", "tinyllama_1b", "llada_8b", "dream_7b"])
def test_presets_at_full_size(name):
    cfg = presets.get(name)
    forward, _, (params, tokens) = programs(cfg, B=1, T=1024)
    assert sum(p.size for p in jax.tree.leaves(params)) == flops.parameters(cfg).stored
    assert matmul_flops(jax.make_jaxpr(forward)(params, tokens).jaxpr) == sum(flops.forward(cfg, 1024).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"d_model": 256, "n_heads": 4, "n_kv_heads": 4, "d_ff": 1024},
        {"d_model": 256, "n_heads": 4, "n_kv_heads": 1, "d_ff": 1024, "causal": True, "mask_row": False},
        {"d_model": 512, "n_heads": 8, "n_kv_heads": 8, "d_ff": 2048, **GPT2_LIKE},
    ],
    ids=["mdm", "grouped-query arm", "gpt2"],
)
def test_xla_counts_the_same_within_one_percent(fields):
    cfg, B, T = ModelConfig(n_layers=2, head_dim=64, vocab_size=1000, max_length=64, **fields), 2, 64
    forward, _, args = programs(cfg, B, T)
    compiled = jax.jit(jex.jaxpr_as_fun(unrolled(forward, args))).lower(*jax.tree.leaves(args)).compile()
    counted = B * sum(flops.forward(cfg, T).values())
    # XLA adds the elementwise operations, so its count can only be higher.
    assert counted <= compiled.cost_analysis()["flops"] <= 1.01 * counted


# SMDM's train_mdm.py: optimizer steps of 256 x 2048 tokens that a budget of 1e20 FLOPs buys.
@pytest.mark.parametrize(("name", "steps"), [("smdm_6m", 5_050_076), ("smdm_170m", 187_107), ("smdm_1028m", 30_932)])
def test_6nd_gives_the_steps_of_smdm(name, steps):
    assert int(1e20 / (256 * flops.train(presets.get(name), 2048, "6nd"))) == steps


def test_unknown_convention_is_a_user_error():
    with pytest.raises(UserError, match="unknown FLOP convention '6ND'; use one of 6nd, model"):
        flops.train(TINY, 12, "6ND")


def test_only_adapters_and_embedding_have_moments_and_gradients():
    cfg = dataclasses.replace(TINY, lora_rank=3)
    params = nn.unbox(jax.eval_shape(lambda: Transformer(cfg).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))))
    names = {name: leaf.size for name, leaf in params["params"]["blocks"].items() if "lora" in name}
    assert len(names) == 2 * 7  # of q, k, v, o, gate, up, down: one in, one out
    trained = sum(names.values()) + params["params"]["embed"].size
    assert flops.parameters(cfg).trained == trained
    assert flops.memory(cfg, OptimConfig()).optimizer == 8 * trained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_the_sharded_training_state(dtype):
    settings = OptimConfig(first_moment_dtype=dtype)
    mesh = make_mesh(MeshConfig(fsdp=8))
    boxed = jax.eval_shape(lambda: Transformer(TINY).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]
    per_device = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(s.shard_shape(p.shape), p.dtype),
        nn.unbox(boxed),
        tree_shardings(boxed, mesh),
    )

    def nbytes(tree):
        return sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(tree) if jnp.issubdtype(p.dtype, jnp.floating))

    memory = flops.memory(TINY, settings, shards=8)
    gains = 4 * (2 * TINY.n_layers + 1) * TINY.d_model  # they are not split, and `memory` counts them as split
    assert memory.params == memory.gradients == nbytes(per_device) - gains * 7 // 8
    moments = nbytes(
        jax.eval_shape(optimizer.build(settings, optimizer.learning_rate(settings, 1000)).init, per_device)
    )
    assert memory.optimizer == moments - (2 if dtype == "float32" else 1.5) * gains * 7 // 8
    assert memory.total == memory.params + memory.optimizer + memory.gradients
