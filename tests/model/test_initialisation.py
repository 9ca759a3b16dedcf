"""The parameters that a Transformer starts with, and the ids that it never predicts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from support.tiny_transformer import BASE

from diffusionlm.model.spec import suppression_mask
from diffusionlm.model.transformer import Transformer


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
