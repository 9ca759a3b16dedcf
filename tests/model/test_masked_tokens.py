"""No position sees its own clean token through a mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny_transformer import BASE, B, T, parameters, tokens

from diffusionlm.config import DiffusionConfig
from diffusionlm.diffusion.corruption import corrupt
from diffusionlm.diffusion.cross_entropy import cross_entropy
from diffusionlm.diffusion.noise import noise_key
from diffusionlm.diffusion.objectives import mdm_targets
from diffusionlm.model.spec import suppression_mask
from diffusionlm.model.transformer import Transformer


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
