"""The parameters that a diffusion model begins with, from those of an autoregressive model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from support.random_params import draw_params

from diffusionlm.config import ModelConfig
from diffusionlm.model.conversion import convert_params
from diffusionlm.model.transformer import Transformer

B, T, V = 8, 12, 29
MODEL = ModelConfig(
    d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, vocab_size=V, max_length=T, head_chunk=16
)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_mask_row_begins_as_the_mean_and_all_else_is_kept(tied):
    source = dataclasses.replace(MODEL, causal=True, mask_row=False, tied_head=tied, vocab_size=128)
    target = dataclasses.replace(source, causal=False, mask_row=True)
    assert source.padded_vocab_size == 128 and target.padded_vocab_size == 256
    params = draw_params(source)
    converted = convert_params(source, target, params, {})
    expected = nn.unbox(
        jax.eval_shape(Transformer(target).init, jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]
    )
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, expected)
    np.testing.assert_array_equal(converted["embed"][:128], params["embed"])
    np.testing.assert_allclose(converted["embed"][128], np.asarray(params["embed"], np.float64).mean(0), atol=1e-6)
    assert not converted["embed"][129:].any()
    jax.tree.map(np.testing.assert_array_equal, converted["blocks"], params["blocks"])
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)), jnp.int32)
    before, after = (
        Transformer(cfg).apply({"params": p}, tokens, allowed_TxT=jnp.tri(T, dtype=bool), method=logits_of)
        for cfg, p in ((source, params), (target, converted))
    )
    np.testing.assert_array_equal(before[..., :128], after[..., :128])


def logits_of(model, tokens, allowed_TxT):
    return model.head(model(tokens, allowed_TxT=allowed_TxT))
