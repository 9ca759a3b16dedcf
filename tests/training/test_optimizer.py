"""Learning rates of the papers, the weight-decay mask, clipping, and AdamW and Muon by their definitions."""

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
    return np.asarray(jax.jit(optim.learning_rate(cfg, steps))(np.asarray(at, np.int32)))


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
    chain = optim.build(cfg, optim.learning_rate(cfg, 10))
    params = {
        "norm": {"scale": np.ones((2, 3)), "bias": np.ones((2, 3))},
        "q": np.ones((2, 3)),
        "q_bias": np.ones((2, 3)),
    }
    params = jax.tree.map(jnp.float32, params)
    updates, _ = jax.jit(chain.update)(jax.tree.map(jnp.zeros_like, params), chain.init(params), params)
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
    chain = optim.build(cfg, optim.learning_rate(cfg, 4))
    params = {"kernel": jnp.asarray(param, jnp.float32)}
    state, update = chain.init(params), jax.jit(chain.update)
    for g in grads:
        updates, state = update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
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
    chain = optim.build(cfg, optim.learning_rate(cfg, 10))
    params = {"a": jnp.zeros((1, 1)), "b": jnp.zeros((1, 1))}
    _, state = chain.update({"a": jnp.full((1, 1), 3.0), "b": jnp.full((1, 1), 4.0)}, chain.init(params), params)
    moments = optax.tree.get(state, "mu")
    np.testing.assert_allclose([moments["a"][0, 0], moments["b"][0, 0]], [0.5 * 0.6, 0.5 * 0.8], rtol=1e-6)


D, H, K, F = 6, 2, 5, 4
SHAPES = {"q": (D, H, K), "k": (D, 1, K), "v": (D, 1, K), "o": (H, K, D), "up": (D, F), "gate": (D, F), "down": (F, D)}


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz steps of Muon's published quintic, on a matrix of Frobenius norm 1."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def muon_by_hand(cfg: OptimConfig, param: np.ndarray, grads: list[np.ndarray]) -> np.ndarray:
    """Nesterov momentum of a matrix, made orthogonal, at a root mean square of 0.2 (Moonlight, Eq. 4)."""
    m = np.zeros_like(param)
    for step, g in enumerate(grads):
        m = 0.95 * m + 0.05 * g
        ahead = 0.95 * m / (1 - 0.95 ** (step + 2)) + 0.05 * g / (1 - 0.95 ** (step + 1))
        update = 0.2 * max(param.shape) ** 0.5 * orthogonal(ahead)
        param = param - cfg.peak_lr * (update + cfg.weight_decay * param)
    return param


@pytest.mark.slow
def test_muon_makes_the_matrix_of_each_layer_orthogonal_and_leaves_the_rest_to_adamw():
    """Heads and their widths are one side of a matrix, and no layer sees another."""
    cfg = OptimConfig(
        name="muon", schedule="constant", peak_lr=0.1, warmup_steps=0, weight_decay=0.3, eps=1e-3, clip_norm=0.0
    )
    rng, L, steps = np.random.default_rng(0), 3, 3
    shapes = {"blocks": {name: (L, *shape) for name, shape in SHAPES.items()}, "embed": (8, D), "head": (D, 8)}
    shapes["blocks"]["attention_norm"] = {"scale": (L, D)}
    draw = lambda: jax.tree.map(lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda x: isinstance(x, tuple))  # noqa: E731
    start, grads = draw(), [draw() for _ in range(steps)]
    chain = optim.build(cfg, optim.learning_rate(cfg, steps))
    params = jax.tree.map(jnp.float32, start)
    state, update = jax.jit(chain.init)(params), jax.jit(chain.update)
    for g in grads:
        updates, state = update(jax.tree.map(jnp.float32, g), state, params)
        params = optax.apply_updates(params, updates)
    for name, shape in SHAPES.items():
        rows = D if shape[0] == D else shape[0] * (shape[1] if len(shape) == 3 else 1)
        for layer in range(L):
            at = lambda tree: tree["blocks"][name][layer].reshape(rows, -1)  # noqa: B023, E731
            expected = muon_by_hand(cfg, at(start), [at(g) for g in grads])
            np.testing.assert_allclose(at(params), expected, rtol=1e-4, atol=1e-5, err_msg=name)
    rate = lambda step: 0.1  # noqa: E731
    for name in ("embed", "head"):
        expected = adamw_by_hand(cfg, rate, start[name], [g[name] for g in grads])
        np.testing.assert_allclose(params[name], expected, rtol=1e-4, atol=1e-5)
    scale = lambda tree: tree["blocks"]["attention_norm"]["scale"]  # noqa: E731
    undecayed = OptimConfig(schedule="constant", peak_lr=0.1, weight_decay=0.0, eps=1e-3, clip_norm=0.0)
    expected = adamw_by_hand(undecayed, rate, scale(start), [scale(g) for g in grads])
    np.testing.assert_allclose(scale(params), expected, rtol=1e-4, atol=1e-5)


def test_muon_keeps_the_singular_vectors_of_a_gradient_and_makes_its_values_alike():
    """The first update is U S V^T of the gradient's U and V, with S near 1 (0.7 to 1.2 for the published quintic)."""
    cfg = OptimConfig(name="muon", schedule="constant", peak_lr=1.0, warmup_steps=0, weight_decay=0.0)
    chain, g = optim.build(cfg, optim.learning_rate(cfg, 1)), np.random.default_rng(1).normal(size=(1, 6, 9))
    params = {"up": jnp.zeros(g.shape, jnp.float32)}
    updates, state = jax.jit(chain.update)({"up": jnp.asarray(g, jnp.float32)}, chain.init(params), params)
    u, _, vt = np.linalg.svd(g[0], full_matrices=False)
    inner = -u.T @ np.asarray(updates["up"][0], np.float64) @ vt.T / (0.2 * 3)
    np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-4)
    assert (np.diag(inner) > 0.65).all() and (np.diag(inner) < 1.25).all()
    moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim == 3]
    assert moments == [(1, 6, 9)]  # there is one moment, not two
