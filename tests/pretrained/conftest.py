"""Fixtures of the tests of loaded models."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from support.tiny_pretrained import MODEL, sidecar

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.model.transformer import Transformer
from diffusionlm.pretrained.loading import load


@pytest.fixture(scope="module")
def params():
    params = nn.unbox(jax.jit(Transformer(MODEL).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return {**params, "head": params["head"] * 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory, params):
    path = tmp_path_factory.mktemp("model") / "model"
    checkpoint.save_params(path, params, sidecar())
    return load(path)


@pytest.fixture
def save(tmp_path, params):
    def save(**changes) -> str:
        path = tmp_path / "model"
        checkpoint.save_params(path, changes.pop("params", params), sidecar(**changes))
        return str(path)

    return save
