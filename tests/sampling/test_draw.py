"""Drawing tokens: the law, its tail, and what top-k and top-p keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from support.slow_cases import slow

from diffusionlm.sampling.draw import argmax, draw, smallest_kept

V = 50


LOGITS = np.random.default_rng(0).normal(scale=2.0, size=V).astype(np.float32)


def counts(logits, n=40_000, temperature=1.0, top_k=0, top_p=1.0, seed=0) -> np.ndarray:
    keys = jax.random.split(jax.random.key(seed), (1, n))
    rows = jnp.broadcast_to(jnp.asarray(logits), (1, n, len(logits)))
    tokens = jax.jit(draw)(keys, rows, jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p))
    return np.bincount(np.asarray(tokens)[0], minlength=len(logits))


def p_value(drawn: np.ndarray, law: np.ndarray) -> float:
    assert not drawn[law == 0].any()
    expected = law * drawn.sum()
    rare = expected < 10
    observed = np.append(drawn[~rare], drawn[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if (expected > 0).sum() == 1:
        return 1.0
    return stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue


def nucleus(p: np.ndarray, top_p: float) -> np.ndarray:
    """By sorting, as it is defined."""
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    return np.isin(np.arange(len(p)), kept)


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (0.5, 8, 0.6),
        *map(
            slow,
            (
                (1.0, 0, 1.0),
                (0.5, 0, 1.0),
                (0.5, 5, 1.0),
                (1.7, 5, 1.0),
                (1.0, 0, 0.8),
                (1.7, 0, 0.8),
                (1.0, 8, 0.6),
                (1.0, 500, 0.3),
                (1.7, 500, 0.3),
            ),
        ),
    ],
)
def test_the_law_of_the_draw(temperature, top_k, top_p):
    logits = LOGITS.astype(np.float64)
    if top_k and top_k < V:
        logits = np.where(logits >= np.sort(logits)[-top_k], logits, -np.inf)
    p = special.softmax(logits / temperature)
    if top_p < 1:
        p = np.where(nucleus(p, top_p), p, 0)
        p /= p.sum()
    assert p_value(counts(LOGITS, 40_000, temperature, top_k, top_p), p) > 1e-3


def test_temperature_zero_is_the_argmax():
    assert counts(LOGITS, 2000, temperature=0.0, top_k=3, top_p=0.2)[np.argmax(LOGITS)] == 2000


def test_a_nucleus_of_nothing_is_the_likeliest():
    assert counts(LOGITS, 2000, top_p=1e-50)[np.argmax(LOGITS)] == 2000


def test_what_is_forbidden_is_never_drawn():
    logits = LOGITS.copy()
    logits[np.argsort(-logits)[:10]] = -np.inf
    for settings in ({}, {"top_k": 45}, {"top_p": 0.999}):
        assert not counts(logits, 2000, **settings)[~np.isfinite(logits)].any()


def drawn_against_a_rare_rival(rival: float, n: int, seed: int = 0) -> int:
    """Return how often a token of log-odds -rival is drawn in n draws."""
    return int(drawn(jax.random.split(jax.random.key(seed), n >> 16), jnp.array([0.0, -rival])))


@jax.jit
def drawn(keys, logits):
    rows = jnp.broadcast_to(logits, (1, 1 << 16, 2))
    settings = jnp.float32(1), jnp.int32(0), jnp.float32(1)

    def some(key):
        return draw(jax.random.split(key, (1, 1 << 16)), rows, *settings).sum(dtype=jnp.int32)

    return jax.lax.map(some, keys).sum(dtype=jnp.int32)


@pytest.mark.slow
def test_the_tail_of_the_noise_is_there():
    """P(Gumbel > 16.6) = 6.2e-8, so 16.5 of 2**28 draws; float32's usual uniforms reach only 15.9 and give none."""

    def above(key, mode):
        return (jax.random.gumbel(key, (1 << 22,), jnp.float32, mode=mode) > 16.6).sum(dtype=jnp.int32)

    keys = jax.random.split(jax.random.key(0), 64)
    exceedances = {
        mode: int(jax.jit(lambda keys, mode=mode: jax.lax.map(lambda k: above(k, mode), keys).sum())(keys))
        for mode in ("low", "high")
    }
    assert exceedances["low"] == 0  # so the test can tell
    assert stats.binomtest(exceedances["high"], 1 << 28, -np.expm1(-np.exp(-16.6))).pvalue > 1e-3


ZIPF = 1 / np.arange(1.0, 4097)
ZIPF /= ZIPF.sum()
RARE = 1000  # ranks beyond hold 16% of it


@pytest.mark.slow
def test_the_tail_of_a_zipf_law_survives_a_small_reveal_rate():
    """4,096 tokens, and a step that reveals one position in 1,024: each of the rare tokens has 1e-7 or so.

    One categorical over tokens and the mask, with float32's usual noise, hardly ever reveals a rare token. Two stages
    must pass where it fails.
    """
    reveal, n, chunk = 1 / 1024, 1 << 18, 1 << 10
    naive = jnp.log(jnp.asarray(np.append(reveal * ZIPF, 1 - reveal), jnp.float32))

    def in_one(key):
        return jnp.argmax(naive[None] + jax.random.gumbel(key, (chunk, 4097), mode="low"), axis=-1)

    keys = jax.random.split(jax.random.key(0), n // chunk)
    tokens = np.asarray(jax.jit(lambda keys: jax.lax.map(in_one, keys))(keys)).ravel()
    shown = tokens[tokens < 4096]
    rare = float(ZIPF[RARE:].sum())
    assert stats.binomtest(int((shown >= RARE).sum()), n, reveal * rare).pvalue < 1e-3  # so the test can tell

    uniform = jax.random.uniform(jax.random.key(1), (1 << 24,))
    assert stats.binomtest(int((uniform < reveal).sum()), 1 << 24, reveal).pvalue > 1e-3
    drawn = counts(np.log(ZIPF), 1 << 16)
    assert stats.binomtest(int(drawn[RARE:].sum()), 1 << 16, rare).pvalue > 1e-3
    assert p_value(drawn, ZIPF) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, pytest.param(128, marks=pytest.mark.slow), 129, 300])
def test_two_levels_are_one_draw(size):
    """Also where the vocabulary is no multiple of a part, and where whole parts are forbidden."""
    logits = np.random.default_rng(size).normal(scale=2.0, size=size).astype(np.float32)
    logits[size // 3 : size // 3 + 140] = -np.inf if size > 200 else logits[size // 3 : size // 3 + 140]
    assert p_value(counts(logits, 20_000), special.softmax(logits.astype(np.float64))) > 1e-3
    rows = np.random.default_rng(1).integers(0, 4, (2, 50, size)).astype(np.float32)  # many ties: the first counts
    np.testing.assert_array_equal(argmax(jnp.asarray(rows)), rows.argmax(-1))


@pytest.mark.slow
def test_rare_tokens_are_drawn_as_often_as_they_should_be():
    n = 1 << 20
    for rival in (6.0, 9.0):
        p = 1 / (1 + np.exp(rival))
        assert stats.binomtest(drawn_against_a_rare_rival(rival, n), n, p).pvalue > 1e-3


@pytest.mark.parametrize("mass", [1, 3, 50])
def test_smallest_kept_is_the_kth_largest(mass):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, V)), jnp.float32)
    threshold = smallest_kept(x, jnp.ones_like(x), jnp.full((2, 3), float(mass)))
    np.testing.assert_array_equal(threshold, np.sort(np.asarray(x), -1)[..., -mass])


def test_smallest_kept_with_infinities_and_ties():
    x = jnp.array([[[2.0, -jnp.inf, 2.0, 0.0, -0.0, -3.0]]])
    for mass, expected in ((1, 2.0), (2, 2.0), (3, 0.0), (5, -3.0), (6, -jnp.inf)):
        threshold = smallest_kept(x, jnp.ones_like(x), jnp.full((1, 1), float(mass)))
        assert float(threshold[0, 0]) == expected, mass
