"""Training that turns an autoregressive model into a diffusion model: attention that opens, and the shift."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from support.numpy_model import numpy_forward
from support.random_params import make_params
from support.slow_cases import slow_but

from diffusionlm.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from diffusionlm.config_data import ANSWER
from diffusionlm.diffusion import noise
from diffusionlm.diffusion.corruption import Corrupted, corrupt_held_out
from diffusionlm.diffusion.objectives import arm_targets, mdm_targets
from diffusionlm.model.attention import annealed_mask
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.presets import arm_twin
from diffusionlm.training import programs
from diffusionlm.training import step as train_step
from diffusionlm.training.state import create_state

B, T, V, N = 8, 12, 29, 10
MODEL = ModelConfig(
    d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, vocab_size=V, max_length=T, head_chunk=16
)
CFG = Config(
    model=MODEL,
    diffusion=DiffusionConfig(alignment="shifted", anneal_steps=N),
    optim=OptimConfig(schedule="constant", peak_lr=0.01, warmup_steps=0),
    data=DataConfig(sequence_length=T, batch_size=B),
    run=RunConfig(steps=20, seed=3),
).validate()


def with_diffusion(**changes):
    return dataclasses.replace(CFG, diffusion=dataclasses.replace(CFG.diffusion, **changes))


@functools.cache
def params():
    return jax.tree.map(lambda x: 3 * x, make_params(MODEL, sharpness=1))


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    return {"tokens": tokens, "segment_ids": np.ones((B, T + 1), np.int32)}


# --- attention that opens


def test_attention_opens_by_one_nth_a_batch():
    """min(1, (n + 1) / N): never exactly causal, and full from batch N - 1 on."""
    wide = dataclasses.replace(CFG, data=dataclasses.replace(CFG.data, sequence_length=300))
    later = ~np.tri(300, dtype=bool)
    draw = jax.jit(lambda n: train_step.annealed_attention(wide, n))
    for n in (0, 3, 8):
        found = np.asarray(draw(jnp.int32(n)))
        assert found[~later].all()
        share = (n + 1) / N
        assert abs(found[later].mean() - share) < 4 * np.sqrt(share * (1 - share) / later.sum())
    for n in (N - 1, N, 10 * N):
        assert np.asarray(draw(jnp.int32(n))).all()
    assert train_step.annealed_attention(with_diffusion(anneal_steps=0), jnp.int32(0)) is None


def test_every_batch_and_seed_has_a_mask_of_its_own_and_the_same_on_any_mesh():
    masks = {}
    for seed in (3, 4):
        cfg = dataclasses.replace(CFG, run=dataclasses.replace(CFG.run, seed=seed))
        for n in (1, 2):
            masks[seed, n] = np.asarray(jax.jit(lambda n, cfg=cfg: train_step.annealed_attention(cfg, n))(n))
    assert len({mask.tobytes() for mask in masks.values()}) == 4
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        there = jax.jit(lambda n: train_step.annealed_attention(CFG, n))(jnp.int32(2))
    np.testing.assert_array_equal(there, masks[3, 2])


@pytest.mark.slow
def test_a_closed_mask_is_causal_attention_and_an_open_one_full():
    tokens = jnp.asarray(batch()["tokens"][:, :T])
    for allowed, causal in ((np.tri(T, dtype=bool), True), (np.ones((T, T), bool), False)):
        twin = dataclasses.replace(MODEL, causal=causal)
        found, alone = (jax.jit(Transformer(cfg).apply) for cfg in (MODEL, twin))
        np.testing.assert_allclose(
            found({"params": params()}, tokens, allowed_TxT=jnp.asarray(allowed)),
            alone({"params": params()}, tokens),
            atol=1e-4,
        )


@pytest.mark.slow
def test_nothing_passes_a_closed_edge_in_any_layer():
    """The derivative of a position's state by another's input is 0 unless a path of open edges leads there."""
    rng = np.random.default_rng(0)
    allowed = np.tri(T, dtype=bool) | (rng.random((T, T)) < 0.1)
    tokens = jnp.asarray(batch()["tokens"][:1, :T])
    reach = np.linalg.matrix_power(allowed.astype(int), MODEL.n_layers) > 0
    assert not reach.all()

    # Not sharpened: weights of attention are far from 0.
    flat = {"params": jax.tree.map(lambda x: x / 3, params())}
    states = jax.jit(lambda tokens: Transformer(MODEL).apply(flat, tokens, allowed_TxT=jnp.asarray(allowed))[0])
    before = np.asarray(states(tokens))
    for j in range(T):
        changed = (np.asarray(states(tokens.at[0, j].set((tokens[0, j] + 1) % V))) != before).any(-1)
        np.testing.assert_array_equal(changed, reach[:, j])


@pytest.mark.slow
@pytest.mark.parametrize("arm_steps", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_is_autoregressive_then_that_of_its_mask_and_then_that_of_full_attention(arm_steps):
    """Losses of batches against those of the twin, of a mask that is written down, and of no mask."""
    mesh, given = make_mesh(MeshConfig(), jax.devices()[:1]), jax.device_put(batch())
    cfg = with_diffusion(arm_steps=arm_steps).validate()
    twin = dataclasses.replace(CFG, objective="arm", model=dataclasses.replace(MODEL, causal=True))
    with jax.set_mesh(mesh):
        state = create_state(cfg, mesh)
        kept = jax.tree.map(np.array, state.params)
        step = programs.make_train_step(cfg, mesh)

        @functools.partial(jax.jit, static_argnums=0)
        def loss(cfg, n, allowed):
            full = train_step.targets(cfg, given, n)
            return train_step.weighted_loss(cfg, kept, full, segmented=False, share=0.5, allowed_TxT=allowed)[0]

        def loss_of_step(n):
            now = jax.tree.map(lambda x: jnp.array(x, copy=True), state).replace(next_index=jnp.int32(n))
            return float(step(now, given, np.int32(n))[1]["loss"])

        for n in range(arm_steps):
            assert loss_of_step(n) == pytest.approx(float(loss(twin, n, None)), rel=1e-6)
        for n in (0, 2, N - 1, N + 3):
            index = jnp.int32(arm_steps + n)
            key = noise.annealing_key(cfg.run.seed, index)
            mask = None if n >= N - 1 else annealed_mask(key, T, (n + 1) / N)
            assert loss_of_step(arm_steps + n) == pytest.approx(float(loss(CFG, index, mask)), rel=1e-6)
            if n < N - 1:
                assert loss_of_step(arm_steps + n) != pytest.approx(float(loss(CFG, index, None)), rel=1e-4)


# --- the shift


@pytest.mark.slow
def test_with_nothing_masked_and_nothing_open_it_is_the_cross_entropy_of_the_twin():
    """To the bit: the same program sees the same numbers."""
    tokens = jnp.asarray(batch()["tokens"][:, :T])
    ones = jnp.ones((B, T), jnp.int32)
    asked = jnp.broadcast_to(jnp.arange(T) > 0, (B, T))  # all but the first token count, and none is hidden
    full = mdm_targets(CFG.diffusion, tokens, Corrupted(tokens, asked, asked, ones, jnp.ones((B,))))
    tri = jnp.tri(T, dtype=bool)
    found = train_step.weighted_loss(CFG, params(), full, segmented=False, share=1.0, allowed_TxT=tri)

    twin = dataclasses.replace(CFG, objective="arm", model=arm_twin(MODEL), diffusion=DiffusionConfig())
    alone = arm_targets(jnp.pad(tokens, ((0, 0), (0, 1))), jnp.pad(ones, ((0, 0), (0, 1))), segmented=False)
    expected = train_step.weighted_loss(twin, params(), alone, segmented=False, share=1.0)
    assert float(found[0]) == float(expected[0])
    # The sums are by masking rate, which is 1 in the one and 0 in the other.
    np.testing.assert_array_equal(found[1][:, -1], expected[1][:, 0])
    assert not found[1][:, :-1].any() and not expected[1][:, 1:].any()

    logits = np.stack([numpy_forward(twin.model, params(), row, np.ones(T), np.arange(T)).logits for row in tokens])
    log_p = logits[:, :-1, :V] - special.logsumexp(logits[:, :-1, :V], axis=-1, keepdims=True)
    nats = -np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, None], axis=-1)
    assert float(found[0]) == pytest.approx(nats.mean(), rel=1e-5)


@pytest.mark.slow
def test_the_shifted_loss_in_dream_s_form():
    """Logits moved one place to the right against labels in place, in float64; weights are those of the bound."""
    cfg, given = with_diffusion(anneal_steps=0), batch()
    draw = jax.jit(train_step.targets, static_argnums=0)
    full = draw(cfg, given, jnp.int32(5))
    loss = jax.jit(lambda params, full: train_step.weighted_loss(cfg, params, full, segmented=False, share=0.5))
    found, _ = loss(params(), full)
    plain = draw(with_diffusion(anneal_steps=0, alignment="same"), given, jnp.int32(5))

    inputs, tokens = np.asarray(full.inputs_BxT), given["tokens"][:, :T]
    masked = inputs == V
    assert masked.any() and not masked[:, 0].any()
    np.testing.assert_array_equal(inputs[:, 1:], plain.inputs_BxT[:, 1:])  # noise does not know of the alignment
    seen = np.asarray(plain.weight_BxT)
    weight = np.where(masked, seen * B * T / (B * (T - 1)), 0)  # per scored token, of which there are fewer
    logits = np.stack([numpy_forward(MODEL, params(), row, np.ones(T), np.arange(T)).logits for row in inputs])
    moved = np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)[..., :V]
    log_p = moved - special.logsumexp(moved, axis=-1, keepdims=True)
    nats = -np.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    assert float(found) == pytest.approx((weight * nats).sum(), rel=1e-5)


def test_the_first_token_of_a_text_is_never_masked_nor_scored():
    cfg = dataclasses.replace(CFG, data=dataclasses.replace(CFG.data, packing="segments"))
    given = batch()
    given["segment_ids"][::2, 5:] = 2
    given["segment_ids"][:, 10:] = 0
    first = np.zeros((B, T), bool)
    first[:, 0] = first[::2, 5] = True
    hidden = np.zeros((B, T), bool)
    draw = jax.jit(lambda n: train_step.targets(cfg, given, n))
    for n in range(12):
        full = draw(jnp.int32(n))
        masked = np.asarray(full.inputs_BxT) == V
        hidden |= masked
        asked = np.asarray(full.weight_BxT) > 0
        np.testing.assert_array_equal(asked[:, :-1], masked[:, 1:])  # by the position before
        assert not asked[:, -1].any()
        np.testing.assert_array_equal(
            np.where(asked, full.labels_BxT, 0)[:, :-1], (given["tokens"][:, 1:T] * masked[:, 1:])
        )
    np.testing.assert_array_equal(hidden, ~first & (given["segment_ids"][:, :T] != 0))


@pytest.mark.slow
def test_the_evaluation_asks_the_position_before():
    """The bound with exactly n masks, L/n times the nats of the masked tokens, in float64."""
    cfg = with_diffusion(anneal_steps=0)
    given, lengths = batch(), jnp.ones((V,), jnp.int32)
    found = jax.jit(functools.partial(train_step.eval_step, cfg))(params(), given, lengths, 0, 1)
    same = with_diffusion(anneal_steps=0, alignment="same")
    asked = jax.jit(functools.partial(train_step.eval_step, same))(params(), given, lengths, 0, 1)
    assert float(found["tokens"]) == float(asked["tokens"]) == B * (T - 1)
    assert float(found["bytes"]) == float(asked["bytes"])
    tokens, ones = given["tokens"][:, :T], np.ones((B, T), np.int32)
    maskable = jnp.asarray(ones.cumsum(1) > 1)
    noisy = corrupt_held_out(V, jnp.asarray(tokens), jnp.asarray(ones), maskable, jnp.arange(B), jnp.int32(1))
    masked = np.asarray(noisy.masked_BxT)
    logits = [
        numpy_forward(MODEL, params(), np.where(m, V, row), np.ones(T), np.arange(T)).logits[:, :V]
        for m, row in zip(masked, tokens, strict=True)
    ]
    log_p = np.stack(logits) - special.logsumexp(logits, axis=-1, keepdims=True)
    nats = -np.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    expected = (masked[:, 1:] * nats).sum(1) * (T - 1) / masked.sum(1)
    assert float(found["nats"]) == pytest.approx(expected.sum(), rel=1e-5)


@pytest.mark.slow
def test_what_an_answer_without_a_prompt_begins_with_is_not_scored():
    examples = dataclasses.replace(CFG.data, packing="examples")
    cfg = dataclasses.replace(with_diffusion(anneal_steps=0), data=examples)
    given = batch() | {"segment_ids": np.full((B, T + 1), ANSWER, np.int32)}
    found = jax.jit(functools.partial(train_step.eval_step, cfg))(params(), given, jnp.ones((V,), jnp.int32), 0, 1)
    assert float(found["tokens"]) == B * (T - 1)


@pytest.mark.parametrize("normalization", slow_but(["tokens", "masked_tokens"], ("tokens",)))
def test_a_cross_entropy_of_one_costs_one_a_token_and_about_two_a_masked_token(normalization):
    """DiffuLLaMA divides by the masked tokens, half of all, what the bound divides by all."""
    cfg = DiffusionConfig(alignment="shifted", normalization=normalization)
    big = Config(diffusion=cfg, data=DataConfig(sequence_length=1024, batch_size=160))
    ones = jnp.ones((160, 1025), jnp.int32)
    given = {"tokens": ones, "segment_ids": ones}
    draw = jax.jit(lambda given, n: train_step.targets(big, given, n).weight_BxT.sum())
    cost = np.mean([float(draw(given, n)) for n in range(4)])
    assert cost == pytest.approx({"tokens": 1.0, "masked_tokens": 2.0}[normalization], abs=0.06)
