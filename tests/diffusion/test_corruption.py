"""The forward process: the laws of times, masks and lengths, and that noise is addressed and not streamed.

Statistical tests run on fixed seeds, so they always pass or always fail; thresholds are 1e-4 (or 5 sigma) a statistic.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats
from support.slow_cases import slow_but

from diffusionlm.config import DiffusionConfig, MeshConfig
from diffusionlm.diffusion.corruption import (
    corrupt,
    mask_probability_and_weight,
    pad_to_longest,
    sample_u,
)
from diffusionlm.diffusion.noise import noise_key
from diffusionlm.parallel.mesh import make_mesh

MASK = 50
B, T, N = 8, 16, 3000
KINDS = ["iid", "stratified", "antithetic"]

# Few configurations that together have everything, because compiling one costs a second.
LAWS = {
    "iid": DiffusionConfig(time_sampling="iid"),
    "stratified": DiffusionConfig(time_sampling="stratified", random_length=0.3),
    "antithetic": DiffusionConfig(time_sampling="antithetic", random_length=0.3),
    "discrete cosine": DiffusionConfig(schedule="cosine", timesteps=4),
    "exact count": DiffusionConfig(mask_sampling="exact_count"),
}
MEAN_MASKED = {  # the mean over uniform u of the masking probability
    "iid": 0.5,
    "stratified": 0.5,
    "antithetic": 0.5,
    "discrete cosine": np.sin(np.pi / 8 * np.arange(1, 5)).mean(),
    "exact count": (1 + T) / 2 / T,
}


def tokens_and_segments(rows: int = B, length: int = T) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, MASK, (rows, length)).astype(np.int32)
    return tokens, np.ones((rows, length), np.int32)


@functools.cache
def corruptor(cfg: DiffusionConfig):
    """(tokens, segments, maskable, seed, batch indices) to the corruptions of the batch under every index."""

    def many(tokens, segments, maskable, seed, indices):
        return jax.lax.map(lambda i: corrupt(cfg, MASK, tokens, segments, maskable, noise_key(seed, i)), indices)

    return jax.jit(many)


def draw(name, tokens=None, segments=None, maskable=None, seed=7, start=0):
    """N independent corruptions of one batch; arrays (N, B, ...) as numpy."""
    clean, ones = tokens_and_segments()
    tokens = clean if tokens is None else tokens
    segments = ones if segments is None else segments
    maskable = np.ones(tokens.shape, bool) if maskable is None else maskable
    out = corruptor(LAWS[name])(tokens, segments, maskable, seed, np.arange(start, start + N, dtype=np.int32))
    return jax.tree.map(np.asarray, out)


plain_draw = functools.cache(draw)


@functools.cache
def times(kind: str, n: int = 4000) -> np.ndarray:
    """`n` independent draws of the times of a batch, (n, B)."""
    cfg = DiffusionConfig(time_sampling=kind)

    def one(key):
        key_batch, key_examples = jax.random.split(key)
        return sample_u(cfg, key_batch, jax.random.split(key_examples, B))

    keys = jax.random.split(jax.random.key(3), n)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(keys), np.float64)


# --- times


@pytest.mark.parametrize("kind", slow_but(KINDS, ("antithetic",)))
def test_the_time_of_every_example_is_uniform(kind):
    u = times(kind)
    assert (u > 0).all() and (u <= 1).all()
    for example in range(B):
        assert stats.kstest(u[:, example], "uniform").pvalue > 1e-4, example


@pytest.mark.parametrize("kind", KINDS)
def test_successive_batches_have_independent_times(kind):
    u = times(kind)
    correlation = np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]
    assert abs(correlation) < 5 / math.sqrt(len(u))


def test_iid_times_are_independent_within_a_batch():
    correlation = np.corrcoef(times("iid").T)
    np.testing.assert_array_less(np.abs(correlation - np.eye(B)), 5 / math.sqrt(4000))


@pytest.mark.parametrize("kind", ["stratified", "antithetic"])
def test_every_stratum_has_one_time(kind):
    strata = np.ceil(times(kind) * B)
    np.testing.assert_array_equal(np.sort(strata, axis=1), np.broadcast_to(np.arange(1, B + 1), strata.shape))


def test_every_order_of_the_strata_is_equally_likely():
    """Seen through which example holds the first stratum and which the second."""
    strata = np.ceil(times("stratified") * B).astype(int)
    first, second = (strata == 1).argmax(1), (strata == 2).argmax(1)
    counts = np.zeros((B, B))
    np.add.at(counts, (first, second), 1)
    assert (counts.diagonal() == 0).all()
    assert stats.chisquare(counts[~np.eye(B, dtype=bool)]).pvalue > 1e-4


def test_antithetic_times_come_in_pairs():
    u = times("antithetic")
    np.testing.assert_allclose(u[:, ::2] + u[:, 1::2], 1.0, atol=1e-6)
    lower_first = u[:, ::2] < 0.5
    share = lower_first.mean(0)
    np.testing.assert_array_less(np.abs(share - 0.5), 5 * 0.5 / math.sqrt(len(u)))
    # One coin a pair, not one a batch.
    correlation = np.corrcoef(lower_first.T.astype(float))
    np.testing.assert_array_less(np.abs(correlation - np.eye(B // 2)), 5 / math.sqrt(len(u)))


@pytest.mark.parametrize("kind", ["stratified", "antithetic"])
def test_stratified_means_are_less_noisy_than_independent_ones(kind):
    decreasing = lambda u: np.exp(-3 * u).mean(1).var()  # noqa: E731
    assert decreasing(times(kind)) < decreasing(times("iid")) / 10


# --- masks


@pytest.mark.parametrize("name", slow_but(LAWS, ("exact count",)))
def test_every_position_is_masked_as_often_as_the_schedule_says(name):
    corrupted, mean = plain_draw(name), MEAN_MASKED[name]
    scored = corrupted.scored_BxT.sum(0)
    rate = corrupted.masked_BxT.sum(0) / scored
    np.testing.assert_array_less(np.abs(rate - mean), 5 * np.sqrt(mean * (1 - mean) / scored))


@pytest.mark.parametrize("name", slow_but(KINDS, ("antithetic",)))
def test_masks_are_independent_bernoulli_given_the_time(name):
    """The weight 1/t reveals t; the number of masks then is Binomial(kept length, t)."""
    corrupted = plain_draw(name)
    t = 1 / corrupted.weight_B.astype(np.float64)
    inner = (t > 0.05) & (t < 0.95)
    length = corrupted.scored_BxT.sum(-1)
    z = (corrupted.masked_BxT.sum(-1) - length * t) / np.sqrt(length * t * (1 - t))
    n = inner.sum()
    assert abs(z[inner].mean()) < 5 / math.sqrt(n)
    assert abs(np.square(z[inner]).mean() - 1) < 5 * math.sqrt(2 / n)
    for low in np.arange(0.05, 0.95, 0.1):
        bin_ = inner & (t >= low) & (t < low + 0.1)
        assert abs(z[bin_].mean()) < 5 / math.sqrt(bin_.sum()), low


def test_masked_ids_are_replaced_and_the_others_kept():
    tokens, _ = tokens_and_segments()
    tokens[:, 3] = MASK  # text that contains the mask id is text
    corrupted = draw("iid", tokens)
    np.testing.assert_array_equal(corrupted.tokens_BxT, np.where(corrupted.masked_BxT, MASK, tokens[None]))
    np.testing.assert_array_equal(corrupted.masked_BxT, plain_draw("iid").masked_BxT)
    assert corrupted.tokens_BxT.dtype == np.int32 and corrupted.weight_B.dtype == np.float32


def test_examples_have_noise_of_their_own():
    masked = plain_draw("iid").masked_BxT[:50].reshape(-1, T)
    assert len({row.tobytes() for row in masked}) > 300  # of 400; the rest are nearly all clean or nearly all masked


def test_times_below_the_cut_are_one_reconstruction_step():
    cfg = DiffusionConfig(t_min=0.01)
    probability, weight = mask_probability_and_weight(cfg, jnp.array([0.001, 0.009, 0.02, 0.5, 1.0]))
    np.testing.assert_allclose(probability, [0.01, 0.01, 0.02, 0.5, 1.0], rtol=1e-6)
    # Share of the draws x weight = 1 below the cut; 1/t above it.
    np.testing.assert_allclose(weight, [1 / 0.01, 1 / 0.01, 1 / 0.02, 2.0, 1.0], rtol=1e-6)


@pytest.mark.slow
def test_discrete_time_lives_on_its_grid():
    u = jnp.asarray(np.random.default_rng(0).uniform(1e-9, 1, 1000).astype(np.float32))
    probability, weight = map(np.asarray, mask_probability_and_weight(DiffusionConfig(timesteps=5), u))
    np.testing.assert_allclose(probability, np.ceil(5 * np.asarray(u)) / 5, rtol=1e-6)
    # T (alpha_s - alpha_t) / (1 - alpha_t) = 5 * (1/5) / t.
    np.testing.assert_allclose(weight, 1 / probability, rtol=1e-5)
    ends = mask_probability_and_weight(DiffusionConfig(timesteps=5), jnp.array([1e-9, 1.0]))[0]
    np.testing.assert_allclose(ends, [0.2, 1.0], rtol=1e-6)


# --- exact counts


def test_exact_count_draws_every_subset_equally_often():
    """n uniform on 1..4, and every subset of size n alike (LLaDA, Eq. 14); rows of one batch are not independent."""
    maskable = np.zeros((B, T), bool)
    maskable[:, [1, 4, 5, 11]] = True
    corrupted = draw("exact count", maskable=maskable)
    for row in range(2):
        masked = corrupted.masked_BxT[:, row][:, maskable[row]]
        counts = dict.fromkeys(itertools.product([False, True], repeat=4), 0)
        for subset in map(tuple, masked.tolist()):
            counts[subset] += 1
        assert counts.pop((False,) * 4) == 0
        expected = [N / (4 * math.comb(4, sum(subset))) for subset in counts]
        assert stats.chisquare(list(counts.values()), expected).pvalue > 1e-4
        np.testing.assert_allclose(corrupted.weight_B[:, row], 4 / masked.sum(1), rtol=1e-6)


def test_exact_counts_are_stratified_and_antithetic():
    count = plain_draw("exact count").masked_BxT.sum(-1)
    strata = np.sort(-(-count // (T // B)), axis=1)
    np.testing.assert_array_equal(strata, np.broadcast_to(np.arange(1, B + 1), strata.shape))
    np.testing.assert_array_equal(count[:, ::2] + count[:, 1::2], T + 1)


def test_exact_count_counts_only_what_is_scored():
    kept = np.array([16, 9, 5, 2, 1, 0, 16, 3])
    segments = (np.arange(T)[None] < kept[:, None]).astype(np.int32)
    maskable = np.broadcast_to(np.arange(T) > 0, (B, T))
    corrupted = draw("exact count", segments=segments, maskable=maskable)
    total = np.maximum(kept - 1, 0)
    count = corrupted.masked_BxT.sum(-1)
    np.testing.assert_array_equal(corrupted.scored_BxT.sum(-1), np.broadcast_to(total, count.shape))
    assert (count.max(0) == total).all() and (count.min(0) == np.minimum(total, 1)).all()
    np.testing.assert_allclose(corrupted.weight_B, total / np.maximum(count, 1), rtol=1e-6)  # 0 for an empty row


# --- what may be masked


@pytest.mark.parametrize("name", ["antithetic", "exact count"])
def test_padding_and_protected_positions_stay_clean_and_unscored(name):
    tokens, segments = tokens_and_segments()
    segments[:, 12:], segments[3] = 0, 0
    maskable = np.random.default_rng(1).random((B, T)) < 0.5
    corrupted = draw(name, tokens, segments, maskable)
    allowed = (segments != 0) & maskable
    assert not corrupted.masked_BxT[:, ~allowed].any()
    assert not corrupted.scored_BxT[:, ~allowed].any()
    assert corrupted.masked_BxT[:, allowed].any(0).all()
    assert (corrupted.tokens_BxT == tokens)[:, ~allowed].all()
    # A prompt is seen by the others: it keeps its segment. Only the tail that is cut off goes, and it is not scored.
    kept = np.arange(T) < (plain_draw(name).segment_ids_BxT != 0).sum(-1)[..., None]
    np.testing.assert_array_equal(corrupted.segment_ids_BxT, segments * kept)
    np.testing.assert_array_equal(corrupted.scored_BxT, allowed & kept)
    assert np.isfinite(corrupted.weight_B).all()


# --- random length


@pytest.mark.parametrize("name", slow_but(LAWS, ("stratified",)))
def test_what_is_cut_off_is_a_tail_of_padding(name):
    corrupted = plain_draw(name)
    kept = corrupted.segment_ids_BxT != 0
    length = kept.sum(-1)
    np.testing.assert_array_equal(kept, np.arange(T) < length[..., None])
    np.testing.assert_array_equal(corrupted.scored_BxT, kept)
    assert length.min() >= 1 and not (corrupted.masked_BxT & ~kept).any()
    if LAWS[name].random_length == 0:
        assert (length == T).all()


@pytest.mark.parametrize("name", ["stratified", "antithetic"])
def test_random_length_cuts_the_stated_fraction_to_a_uniform_length(name):
    length = (plain_draw(name).segment_ids_BxT != 0).sum(-1)
    correlation = np.corrcoef(length.T)
    np.testing.assert_array_less(np.abs(correlation - np.eye(B)), 5 / math.sqrt(N))
    fraction = 0.3 * (1 - 1 / T)  # a cut to the full length is none
    assert abs((length < T).mean() - fraction) < 5 * math.sqrt(fraction * (1 - fraction) / length.size)
    assert stats.chisquare(np.bincount(length[length < T], minlength=T)[1:]).pvalue > 1e-4


@pytest.mark.parametrize("name", ["stratified", "antithetic"])
def test_length_and_time_are_independent(name):
    corrupted = plain_draw(name)
    length = (corrupted.segment_ids_BxT != 0).sum(-1)
    for example in range(B):
        correlation = np.corrcoef(length[:, example], 1 / corrupted.weight_B[:, example])[0, 1]
        assert abs(correlation) < 5 / math.sqrt(N)


# --- addressing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stratified", "antithetic", "exact count"])
def test_the_mesh_does_not_change_a_bit(name):
    """Eight devices, and no loop around it, against one device."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    batch = jax.device_put(tokens_and_segments(), split)
    with jax.set_mesh(mesh):
        f = jax.jit(lambda t, s, i: corrupt(LAWS[name], MASK, t, s, None, noise_key(7, i)), out_shardings=split)
        for index in range(8):
            eight = jax.tree.map(np.asarray, f(*batch, jnp.int32(index)))
            alone = jax.tree.map(lambda x, i=index: x[i], plain_draw(name))
            jax.tree.map(np.testing.assert_array_equal, alone, eight)


def test_noise_depends_on_the_seed_and_the_batch_index_alone():
    first, shifted, reseeded = plain_draw("antithetic"), draw("antithetic", start=5), draw("antithetic", seed=8)
    jax.tree.map(np.testing.assert_array_equal, first, draw("antithetic"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[5:], b[:-5]), first, shifted)
    assert len({batch.tobytes() for batch in first.weight_B}) == N
    assert not (first.weight_B == reseeded.weight_B).any(1).any()
    # Seed s with index k is not seed k with index s.
    assert not np.array_equal(first.weight_B[8], reseeded.weight_B[7])


def test_with_independent_times_an_example_does_not_depend_on_its_mates_or_its_text():
    """Not even on how many mates there are."""
    tokens, segments = tokens_and_segments()
    part = jax.jit(lambda t, s: corrupt(LAWS["iid"], MASK, t, s, None, noise_key(7, 0)))(
        (tokens[:6] + 1) % MASK, segments[:6]
    )
    np.testing.assert_array_equal(plain_draw("iid").masked_BxT[0, :6], part.masked_BxT)
    np.testing.assert_array_equal(plain_draw("iid").weight_B[0, :6], part.weight_B)


@pytest.mark.parametrize("name", slow_but(["stratified", "antithetic", "exact count"], ("exact count",)))
def test_padding_a_mate_changes_nothing_for_the_others(name):
    tokens, segments = tokens_and_segments()
    tokens[2], segments[2] = 0, 0
    full, padded = plain_draw(name), draw(name, tokens, segments)
    others = np.arange(B) != 2
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, others], b[:, others]), full, padded)
    assert not padded.masked_BxT[:, 2].any()


# --- prompts and answers


def test_padding_counts_up_to_the_longest_example_of_the_batch():
    parts = jnp.array([[1, 2, 2, 0, 0, 0], [1, 1, 1, 2, 0, 0], [1, 2, 0, 0, 0, 0]], jnp.int32)
    segments, answers = pad_to_longest(parts)
    np.testing.assert_array_equal(segments, [[1, 1, 1, 1, 0, 0]] * 3)
    np.testing.assert_array_equal(answers, [[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0]])
    alone, _ = pad_to_longest(parts[2:])
    np.testing.assert_array_equal(alone, [[1, 1, 0, 0, 0, 0]])


@pytest.mark.slow
def test_padding_is_a_matter_of_the_rows_that_are_padded_together():
    """LLaDA pads within a mini-batch: rows of another one change nothing."""
    lengths = np.array([3, 2, 5, 1, 4, 6])
    parts = np.where(np.arange(8)[None] < lengths[:, None], 2, 0)
    parts[:, 0] = 1
    for group, longest in ((1, lengths), (2, [3, 3, 5, 5, 6, 6]), (3, [5, 5, 5, 6, 6, 6]), (6, [6] * 6), (0, [6] * 6)):
        segments, answers = pad_to_longest(jnp.asarray(parts, jnp.int32), group)
        expected = np.arange(8)[None] < np.array(longest)[:, None]
        np.testing.assert_array_equal(segments, expected)
        np.testing.assert_array_equal(answers, expected & (np.arange(8) > 0))
        assert segments.dtype == jnp.int32


@pytest.mark.slow
def test_padding_in_pairs_leaves_most_of_the_loss_to_answers():
    """Lengths are log-normal, and each example weighs the same, so EOS after EOS has the mean share of its row."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(150), 0.9, 256).astype(int), 2, 4096)
    parts = jnp.asarray(np.where(np.arange(4096)[None] < lengths[:, None], 2, 0), jnp.int32)
    share = {}
    for group in (0, 1, 2):
        _, answers = pad_to_longest(parts, group)
        share[group] = float(np.mean(1 - lengths / np.asarray(answers).sum(1)))
    assert share[1] == 0 and share[2] == pytest.approx(0.27, abs=0.01) and share[0] == pytest.approx(0.90, abs=0.01)
