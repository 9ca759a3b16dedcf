"""Fixtures of the tests of loaded models."""

import pytest
from support.random_params import make_params
from support.tiny_pretrained import MODEL, sidecar

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.pretrained.loading import load


@pytest.fixture(scope="module")
def params():
    return make_params(MODEL)


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
