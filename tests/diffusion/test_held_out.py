"""The noise of held-out records: its laws, and that a record and a draw address it.

Statistical tests run on fixed seeds, so they always pass or always fail; thresholds are 1e-4 (or 5 sigma) a statistic.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from diffusionlm.diffusion.corruption import corrupt_held_out

MASK = 50
B, T, N = 8, 16, 3000


def tokens_and_segments(rows: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, MASK, (rows, T)).astype(np.int32)
    return tokens, np.ones((rows, T), np.int32)


@functools.cache
def held_out_masks(records: int, batch_size: int, draws: int) -> np.ndarray:
    """Masks of identical whole records, (draws, records, T)."""
    tokens, ones = tokens_and_segments(batch_size)

    def batch(number, draw):
        record_B = number * batch_size + jnp.arange(batch_size)
        return corrupt_held_out(MASK, tokens, ones, ones == 1, record_B, draw).masked_BxT

    every = jax.vmap(jax.vmap(batch, in_axes=(0, None)), in_axes=(None, 0))
    return np.asarray(jax.jit(every)(jnp.arange(records // batch_size), jnp.arange(draws))).reshape(draws, records, T)


def test_the_noise_of_a_held_out_record_does_not_depend_on_the_batch_size():
    np.testing.assert_array_equal(held_out_masks(48, 8, 3), held_out_masks(48, 16, 3))
    masks = held_out_masks(48, 8, 3)
    assert len({mask.tobytes() for mask in masks.reshape(-1, T)}) > 100  # other records and draws, other masks


def test_every_count_of_a_held_out_record_is_equally_likely_and_so_is_every_position():
    masks = held_out_masks(16, 8, N)
    counts = np.stack([(masks.sum(-1) == n).sum(0) for n in range(1, T + 1)])
    assert (counts.sum(0) == N).all()
    for record in range(masks.shape[1]):
        assert stats.chisquare(counts[:, record]).pvalue > 1e-4, record
        # Positions of one mask add up to its count n, so each count's own variance is n(T-n)/(T(T-1)) a position.
        n = masks[:, record].sum(-1).astype(float)
        variance = (n * (T - n) / (T * (T - 1))).sum()
        statistic = ((masks[:, record].sum(0) - n.sum() / T) ** 2).sum() / variance
        assert stats.chi2.sf(statistic, T - 1) > 1e-4, record


def test_any_stretch_of_held_out_records_has_its_counts_evenly_spread():
    """Steps of the golden ratio g leave no gap longer than g**2 / m of a turn after m of them (three-gap theorem)."""
    m = math.ceil(2.62 * T)
    counts = held_out_masks(96, 8, 20).sum(-1)
    for first in (0, 17, 96 - m):
        for of_draw in counts[:, first : first + m]:
            assert set(of_draw.tolist()) == set(range(1, T + 1))


def test_draws_on_held_out_records_are_independent():
    masks = held_out_masks(16, 8, N)
    counts = masks.sum(-1)
    assert abs(np.corrcoef(counts[:-1, 0], counts[1:, 0])[0, 1]) < 5 / math.sqrt(N)
    # Given the counts, which positions are masked is independent too.
    excess = masks - counts[..., None] / T
    together = (excess[:-1] * excess[1:]).sum(-1)
    assert abs(together.mean()) < 5 * together.std() / math.sqrt(together.size)


def test_held_out_noise_follows_the_scored_positions():
    """Exactly n of the N maskable positions, weight N/n, and the rest stays as it is."""
    tokens, segments = tokens_and_segments(B)
    segments[:, 12:] = 0
    maskable = np.arange(T)[None] >= np.arange(B)[:, None]
    out = corrupt_held_out(MASK, tokens, segments, jnp.asarray(maskable), jnp.arange(B), jnp.int32(0))
    scored = maskable & (segments != 0)
    np.testing.assert_array_equal(out.scored_BxT, scored)
    assert not (np.asarray(out.masked_BxT) & ~scored).any()
    n = np.asarray(out.masked_BxT).sum(1)
    assert (n >= 1).all()
    np.testing.assert_allclose(out.weight_B, scored.sum(1) / n, rtol=1e-6)
    np.testing.assert_array_equal(out.tokens_BxT, np.where(out.masked_BxT, MASK, tokens))
