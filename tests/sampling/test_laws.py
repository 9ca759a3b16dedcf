"""The laws of what the denoising loop generates, against enumeration, with the exact conditionals as the denoiser."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support.oracles import Oracle

from diffusionlm.config import DiffusionConfig
from diffusionlm.diffusion import schedules
from diffusionlm.sampling import loop
from diffusionlm.sampling.canvas import Canvas
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.device_settings import Settings
from diffusionlm.sampling.state import Job, initial_state

V, L = 3, 3
SEQUENCES = np.array(list(itertools.product(range(V), repeat=L)))
JOINT = np.random.default_rng(0).dirichlet(np.full(V**L, 0.3))


def oracle(tokens_BxT, segment_ids_BxT, masked_BxT):
    """log p(x_i = v | what is not masked), from the joint."""
    sequences_XxT = jnp.asarray(SEQUENCES, jnp.int32)
    agrees_BxX = (masked_BxT[:, None] | (tokens_BxT[:, None] == sequences_XxT[None])).all(-1)
    weight_BxX = jnp.where(agrees_BxX, jnp.asarray(JOINT, jnp.float32)[None], 0.0)
    is_v_XxTxV = jax.nn.one_hot(sequences_XxT, V, dtype=jnp.float32)
    return jnp.log(jnp.einsum("bx,xtv->btv", weight_BxX, is_v_XxTxV) + 1e-30)


@functools.cache
def conditional(state: tuple[int, ...]) -> np.ndarray:
    """p(x_i = v | the revealed tokens of `state`), (L, V); a masked position is V."""
    agrees = [all(s in (V, x) for s, x in zip(state, sequence, strict=True)) for sequence in SEQUENCES]
    weight = JOINT * agrees / (JOINT * agrees).sum()
    return np.stack([[weight[SEQUENCES[:, i] == v].sum() for v in range(V)] for i in range(L)])


def ancestral_law(alphas: list[float], temperature: float = 1.0) -> np.ndarray:
    """The law of ancestral sampling on a grid of alphas (1's last), by enumerating every path."""
    law = {(V,) * L: 1.0}
    for alpha_t, alpha_s in itertools.pairwise(alphas):
        reveal = (alpha_s - alpha_t) / (1 - alpha_t)
        after: dict[tuple[int, ...], float] = {}
        for state, mass in law.items():
            p = conditional(state) ** (1 / temperature)
            p /= p.sum(-1, keepdims=True)
            options = [
                [(V, 1 - reveal)] + [(v, reveal * p[i, v]) for v in range(V)] if token == V else [(token, 1.0)]
                for i, token in enumerate(state)
            ]
            for choice in itertools.product(*options):
                new = tuple(v for v, _ in choice)
                after[new] = after.get(new, 0.0) + mass * math.prod(q for _, q in choice)
        law = after
    return np.array([law.get(tuple(sequence), 0.0) for sequence in SEQUENCES.tolist()])


@functools.partial(jax.jit, static_argnames="schedule")
def denoise_with_oracle(canvas, key, settings, schedule):
    built = schedules.build(DiffusionConfig(schedule=schedule))
    job = Job(Oracle(oracle, V), built, jnp.zeros(V, bool), canvas, key, settings)
    return loop.denoise(job, initial_state(canvas)).tokens_BxT


def oracle_counts(strategy: str, steps: int, schedule="linear", temperature=1.0, seed=0, **rules) -> np.ndarray:
    """Return how often each sequence comes out of the loop."""
    shape = (10_000, L)
    rows = jnp.arange(shape[0], dtype=jnp.int32)
    ones = jnp.ones(shape, jnp.int32)
    canvas = Canvas(V * ones, ones > 0, ones, 0 * ones, rows)
    settings = make_settings(strategy, steps, temperature, **rules)
    tokens = np.asarray(denoise_with_oracle(canvas, jax.random.key(seed), settings, schedule))
    assert tokens.max() < V
    return np.bincount(tokens @ (V ** np.arange(L)[::-1]), minlength=V**L)


def make_settings(strategy: str, steps: int, temperature: float = 1.0, **rules) -> Settings:
    sampling = SamplingConfig(length=steps, steps=steps, strategy=strategy, temperature=temperature, **rules)
    return Settings.from_config(sampling.resolve(autoregressive=False))


def p_value(counts: np.ndarray, law: np.ndarray) -> float:
    """Chi-square of counts against a law, with its rare outcomes pooled."""
    order = np.argsort(law)
    expected, observed = law[order] * counts.sum(), counts[order]
    pooled = max(1, int((np.cumsum(expected) < 10).sum()) + 1)
    expected = np.concatenate([[expected[:pooled].sum()], expected[pooled:]])
    observed = np.concatenate([[observed[:pooled].sum()], observed[pooled:]])
    return stats.chisquare(observed, expected).pvalue


ALPHAS = {"linear": lambda t: 1 - t, "cosine": lambda t: 1 - np.cos(np.pi / 2 * (1 - t))}  # as MD4 writes them


def grid(schedule: str, steps: int) -> list[float]:
    alphas = [float(ALPHAS[schedule](1 - i / steps)) for i in range(steps + 1)]
    return alphas[:-1] + [1.0]


@pytest.mark.parametrize("schedule", [pytest.param("linear", marks=pytest.mark.slow), "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ancestral_follows_its_enumerated_finite_step_law(schedule, steps):
    assert p_value(oracle_counts("ancestral", steps, schedule), ancestral_law(grid(schedule, steps))) > 1e-3


@pytest.mark.slow
def test_ancestral_approaches_the_joint_as_steps_grow():
    distance = [np.abs(ancestral_law(grid("linear", steps)) - JOINT).sum() / 2 for steps in (1, 4, 16, 256)]
    assert distance == sorted(distance, reverse=True) and distance[0] > 0.05 and distance[-1] < 0.003
    assert p_value(oracle_counts("ancestral", 64), ancestral_law(grid("linear", 64))) > 1e-3
    assert p_value(oracle_counts("ancestral", 1), JOINT) < 1e-9  # so the test has the power to tell


@pytest.mark.slow
def test_the_last_step_reveals_what_a_schedule_never_would():
    # The geometric schedule leaves a token masked with probability 1e-4 at t = 0; 30,000 positions would show it.
    oracle_counts("ancestral", 1, "geometric")


@pytest.mark.slow
def test_one_token_a_step_from_left_to_right_keeps_the_joint():
    assert p_value(oracle_counts("left_to_right", L, seed=1), JOINT) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "fixed_count", "entropy", "margin"])
def test_orders_that_do_not_look_at_the_draw_keep_the_joint(strategy):
    """One token a step; which position comes next is independent of the token that it then gets."""
    assert p_value(oracle_counts(strategy, L, seed=2), JOINT) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["low_confidence", "confidence_threshold"])
def test_confidence_in_the_drawn_token_bends_the_joint(strategy):
    """A position is kept where a likely token was drawn and drawn anew where not: likely tokens win."""
    counts = oracle_counts(strategy, L, seed=2)
    assert p_value(counts, JOINT) < 1e-9
    assert counts[np.argmax(JOINT)] / counts.sum() > JOINT.max() * 1.1


def remdm_law(steps: int, cap: float) -> np.ndarray:
    """ReMDM-cap on the linear schedule, by enumerating every path."""
    law = {(V,) * L: 1.0}
    for i in range(steps):
        alpha_t, alpha_s = i / steps, (i + 1) / steps
        sigma = min(cap, (1 - alpha_s) / alpha_t) if alpha_t else 0.0
        reveal = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        after: dict[tuple[int, ...], float] = {}
        for state, mass in law.items():
            p = conditional(state)
            options = [
                [(V, 1 - reveal)] + [(v, reveal * p[j, v]) for v in range(V)]
                if token == V
                else [(token, 1 - sigma), (V, sigma)]
                for j, token in enumerate(state)
            ]
            for choice in itertools.product(*options):
                new = tuple(v for v, _ in choice)
                after[new] = after.get(new, 0.0) + mass * math.prod(q for _, q in choice)
        law = after
    return np.array([law.get(tuple(sequence), 0.0) for sequence in SEQUENCES.tolist()])


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps, cap", [(3, 0.3), *(pytest.param(*values, marks=pytest.mark.slow) for values in ((6, 0.5), (4, 0.0)))]
)
def test_remdm_follows_its_enumerated_law(steps, cap):
    counts = oracle_counts("remdm", steps, seed=3, remask=cap)
    assert p_value(counts, remdm_law(steps, cap)) > 1e-3
    if cap == 0:
        np.testing.assert_allclose(remdm_law(steps, cap), ancestral_law(grid("linear", steps)), atol=1e-12)


@pytest.mark.slow
def test_temperature_divides_the_logits():
    assert p_value(oracle_counts("ancestral", 2, temperature=0.5), ancestral_law(grid("linear", 2), 0.5)) > 1e-3
