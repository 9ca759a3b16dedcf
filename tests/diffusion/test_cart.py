"""The weights of CART, against sums over visible tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusionlm.config import DiffusionConfig
from diffusionlm.diffusion.corruption import Corrupted
from diffusionlm.diffusion.objectives import cart_weights, mdm_targets


def corrupted_rows(seed, probability, length=40, rows=6):
    rng = np.random.default_rng(seed)
    segments = np.ones((rows, length), np.int32)
    segments[1, 15:] = 2
    segments[0, -7:] = 0
    masked = (rng.random((rows, length)) < probability) & (segments != 0)
    masked[1, 15:] = True  # a text of masks beside one that has visible tokens
    tokens = jnp.zeros((rows, length), jnp.int32)
    return Corrupted(tokens, jnp.asarray(masked), jnp.asarray(segments != 0), jnp.asarray(segments), jnp.ones((rows,)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_cart_weights_are_the_sums_over_visible_tokens(p):
    for probability in (0.0, 0.4, 1.0):
        inputs = corrupted_rows(1, probability)
        masked, segments = np.asarray(inputs.masked_BxT), np.asarray(inputs.segment_ids_BxT)
        expected = np.zeros(masked.shape)
        for b, i in zip(*masked.nonzero(), strict=True):
            for j in range(masked.shape[1]):
                if segments[b, j] == segments[b, i] and not masked[b, j]:
                    expected[b, i] += 0.5 * p * (1 - p) ** (abs(i - j) - 1)
        result = jax.jit(cart_weights, static_argnums=1)(inputs, p)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-7)


def test_cart_weights_are_about_one_minus_t_and_take_the_place_of_the_bound_s():
    for t in (0.2, 0.7):
        inputs = corrupted_rows(2, t, length=4000)
        weight = np.asarray(jax.jit(cart_weights, static_argnums=1)(inputs, 0.3))
        assert weight[2:][np.asarray(inputs.masked_BxT)[2:]].mean() == pytest.approx(1 - t, abs=0.02)
        assert 0 <= weight.min() and weight.max() <= 1
    cfg = DiffusionConfig(weighting="cart", cart_p=0.3, normalization="masked_tokens")
    inputs = dataclasses.replace(inputs, weight_B=7 * inputs.weight_B)
    result = jax.jit(lambda inputs: mdm_targets(cfg, inputs.tokens_BxT, inputs).weight_BxT)(inputs)
    np.testing.assert_allclose(result, weight / np.asarray(inputs.masked_BxT).sum(), rtol=1e-6)
