"""JAX in 64 bits: refused in one line where a model is built, and undone by the context manager that the line names."""

import dataclasses

import jax
import numpy as np
import pytest
from support.random_params import make_params
from support.tiny_step import MDM, random_batch

from diffusionlm.errors import UserError
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.monte_carlo import estimate
from diffusionlm.model.spec import ModelSpec
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate
from diffusionlm.training.programs import make_train_step
from diffusionlm.training.state import create_state

PARAMS = make_params(MDM.model)
SPEC = ModelSpec.of(MDM)


def initialise():
    return create_state(dataclasses.replace(MDM, run=dataclasses.replace(MDM.run, seed=2)), make_mesh(MDM.mesh)).params


def train():
    mesh = make_mesh(MDM.mesh, jax.devices()[:1])
    with jax.enable_x64(False):
        state = create_state(MDM, mesh)
    with jax.set_mesh(mesh):
        return make_train_step(MDM, mesh)(state, random_batch(), np.int32(0))[0].params


def sample():
    return generate(PARAMS, SPEC, [[1, 2], [3]], SamplingConfig(length=4, strategy="ancestral", steps=3)).tokens


def score():
    return estimate(PARAMS, SPEC, [([1], [2, 3])], LikelihoodConfig(passes=8, draws=2))[0].log_likelihood


@pytest.mark.parametrize("entry", [initialise, train, sample, score], ids=lambda entry: entry.__name__)
def test_64_bits_are_refused_in_one_line_that_says_what_to_do(entry):
    expected = entry()
    with jax.enable_x64(True):
        with pytest.raises(UserError, match=r"^jax_enable_x64 is on, .* `with jax\.enable_x64\(False\):`") as error:
            entry()
        assert "\n" not in str(error.value)
        with jax.enable_x64(False):
            again = entry()
    assert jax.tree.structure(again) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
