"""Learning rates of the papers, the weight-decay mask, clipping, and AdamW by its definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from diffusionlm.config import ModelConfig, OptimConfig
from diffusionlm.model.transformer import Transformer
from diffusionlm.training import optimizer as optim

LLADA = OptimConfig(
    schedule="wsd",
    peak_lr=4e-4,
    warmup_steps=2000,
    drop_step=228_882,
    drop_lr=1e-4,
    decay_steps=57_220,
    final_lr=1e-5,
)
LLADA_STEPS = 438_690


def rates(cfg: OptimConfig, steps: int, at) -> np.ndarray:
    return np.asarray(optim.learning_rate(cfg, steps)(jnp.asarray(at, jnp.int32)))


def test_lladas_schedule_has_its_golden_values():
    """LLaDA, Section 2.2: 0 to 4e-4 over 2000 steps, hold, 1e-4 from 1.2T tokens, to 1e-5 over the last 0.3T."""
    golden = {
        0: 0.0,
        1: 2e-7,
        1000: 2e-4,
        1999: 3.998e-4,
        2000: 4e-4,
        100_000: 4e-4,
        228_881: 4e-4,
        228_882: 1e-4,
        381_470: 1e-4,  # 438,690 - 57,220
        381_471: 1e-4 - 9e-5 / 57_220,
        410_080: 5.5e-5,  # half-way down
        438_689: 1e-5 + 9e-5 / 57_220,
        438_690: 1e-5,
        500_000: 1e-5,
    }
    np.testing.assert_allclose(rates(LLADA, LLADA_STEPS, list(golden)), list(golden.values()), rtol=2e-5, atol=1e-12)


def test_cosine_is_smdms():
    """min + (1 + cos(pi (s - w) / (S - w))) / 2 (peak - min) after a linear warm-up (SMDM, train_mdm.py)."""
    cfg = OptimConfig(schedule="cosine", peak_lr=2e-4, final_lr=2e-5, warmup_steps=100)
    at = np.array([0, 50, 99, 100, 101, 325, 550, 775, 999, 1000, 2000])
    s = np.clip(at, 100, 1000)
    expected = 2e-5 + (1 + np.cos(np.pi * (s - 100) / 900)) / 2 * (2e-4 - 2e-5)
    expected[:3] = 2e-4 * at[:3] / 100
    np.testing.assert_allclose(rates(cfg, 1000, at), expected, rtol=1e-5)
    assert expected[6] == pytest.approx(1.1e-4) and expected[9] == pytest.approx(2e-5)


def test_constant_and_plain_wsd():
    constant = OptimConfig(schedule="constant", peak_lr=3e-4, warmup_steps=10)
    np.testing.assert_allclose(rates(constant, 100, [0, 5, 10, 50, 100]), [0, 1.5e-4, 3e-4, 3e-4, 3e-4], rtol=1e-6)
    wsd = OptimConfig(schedule="wsd", peak_lr=3e-4, warmup_steps=10, decay_steps=20, final_lr=0.0)
    np.testing.assert_allclose(
        rates(wsd, 100, [5, 10, 79, 80, 90, 100]), [1.5e-4, 3e-4, 3e-4, 3e-4, 1.5e-4, 0.0], rtol=1e-5, atol=1e-12
    )
    held = OptimConfig(schedule="wsd", peak_lr=3e-4, warmup_steps=10)
    np.testing.assert_allclose(rates(held, 100, [10, 99, 100]), 3e-4, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_without_warmup_the_first_step_has_the_peak(schedule):
    cfg = OptimConfig(schedule=schedule, peak_lr=1e-3, final_lr=1e-4, warmup_steps=0)
    np.testing.assert_allclose(rates(cfg, 50, [0]), [1e-3], rtol=1e-6)


def test_a_warmup_of_the_whole_run_ends_at_the_peak():
    cfg = OptimConfig(schedule="cosine", peak_lr=1e-3, final_lr=1e-4, warmup_steps=50)
    np.testing.assert_allclose(rates(cfg, 50, [25, 50]), [5e-4, 1e-3], rtol=1e-6)


GPT2 = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "linear_bias": True}


@pytest.mark.parametrize("variant", [{}, {"qkv_bias": True}, GPT2])
def test_gains_and_biases_are_not_decayed_though_they_are_stacked(variant):
    """Stacked over the layers they have two dimensions, as a matrix has."""
    cfg = ModelConfig(
        d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=24, vocab_size=60, max_length=8, **variant
    )
    shapes = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params = nn.unbox(shapes)["params"]
    decayed = optim.decays(params)
    spared = {"final_norm", "attention_norm", "mlp_norm"} | {
        f"{name}_bias" for name in ("q", "k", "v", "o", "up", "down")
    }
    for path, decays in jax.tree_util.tree_leaves_with_path(decayed):
        assert decays == (not spared & {key.key for key in path}), jax.tree_util.keystr(path)
    assert jax.tree.structure(decayed) == jax.tree.structure(params)


@pytest.mark.parametrize("decay_mask", ["matrices", "all"])
def test_decay_without_a_gradient(decay_mask):
    """AdamW then moves a parameter by -lr * decay * parameter and by nothing else."""
    cfg = OptimConfig(schedule="constant", peak_lr=0.01, warmup_steps=0, weight_decay=0.5, decay_mask=decay_mask)
    chain = optim.build(cfg, 10)
    params = {
        "norm": {"scale": np.ones((2, 3)), "bias": np.ones((2, 3))},
        "q": np.ones((2, 3)),
        "q_bias": np.ones((2, 3)),
    }
    params = jax.tree.map(jnp.float32, params)
    updates, _ = chain.update(jax.tree.map(jnp.zeros_like, params), chain.init(params), params)
    spared = 0.0 if decay_mask == "matrices" else -0.01 * 0.5
    np.testing.assert_allclose(updates["q"], -0.01 * 0.5, rtol=1e-6)
    for update in (updates["norm"]["scale"], updates["norm"]["bias"], updates["q_bias"]):
        np.testing.assert_allclose(update, spared, rtol=1e-6)


def adamw_by_hand(cfg: OptimConfig, lr, param: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
    """Loshchilov and Hutter, Algorithm 2, with bias correction and decay decoupled from the moments."""
    m = v = np.zeros_like(param)
    for step, g in enumerate(grads):
        norm = np.sqrt((g**2).sum())
        if cfg.clip_norm and norm > cfg.clip_norm:
            g = g * cfg.clip_norm / norm
        m = cfg.beta1 * m + (1 - cfg.beta1) * g
        v = cfg.beta2 * v + (1 - cfg.beta2) * g**2
        m_hat, v_hat = m / (1 - cfg.beta1 ** (step + 1)), v / (1 - cfg.beta2 ** (step + 1))
        param = param - lr(step) * (m_hat / (np.sqrt(v_hat) + cfg.eps) + cfg.weight_decay * param)
    return param


@pytest.mark.parametrize(
    ("clip_norm", "dtype", "tolerance"),
    [(0.0, "float32", 1e-5), (0.5, "float32", 1e-5), (100.0, "float32", 1e-5), (0.5, "bfloat16", 2e-2)],
)
def test_four_steps_are_adamws(clip_norm, dtype, tolerance):
    cfg = OptimConfig(
        schedule="cosine",
        peak_lr=0.1,
        final_lr=0.01,
        warmup_steps=2,
        weight_decay=0.3,
        eps=1e-3,
        clip_norm=clip_norm,
        first_moment_dtype=dtype,
    )
    rng = np.random.default_rng(0)
    param, grads = rng.normal(size=(3, 4)), [rng.normal(size=(3, 4)) for _ in range(4)]
    chain = optim.build(cfg, 4)
    params = {"kernel": jnp.asarray(param, jnp.float32)}
    state = chain.init(params)
    for g in grads:
        updates, state = chain.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    lr = lambda s: 0.1 * s / 2 if s < 2 else 0.01 + (1 + math.cos(math.pi * (s - 2) / 2)) / 2 * 0.09  # noqa: E731
    np.testing.assert_allclose(params["kernel"], adamw_by_hand(cfg, lr, param, grads), rtol=tolerance)
    assert (
        optax.tree.get(state, "mu")["kernel"].dtype == dtype
        and optax.tree.get(state, "nu")["kernel"].dtype == "float32"
    )


def test_the_norm_that_is_clipped_is_that_of_all_parameters_together():
    """(3, 4) has norm 5 over both tensors; each alone would have been cut differently."""
    cfg = OptimConfig(clip_norm=1.0, beta1=0.5, warmup_steps=0)
    chain = optim.build(cfg, 10)
    params = {"a": jnp.zeros((1, 1)), "b": jnp.zeros((1, 1))}
    _, state = chain.update({"a": jnp.full((1, 1), 3.0), "b": jnp.full((1, 1), 4.0)}, chain.init(params), params)
    moments = optax.tree.get(state, "mu")
    np.testing.assert_allclose([moments["a"][0, 0], moments["b"][0, 0]], [0.5 * 0.6, 0.5 * 0.8], rtol=1e-6)
