"""Losses: on a language small enough to enumerate, the bound is the likelihood; normalisations.

The toy language has V = 5 tokens, L = 4 positions and a random joint law q. Its exact conditionals are the denoiser,
all 5^4 sequences and 2^4 masks are enumerated, and t is integrated by Gauss-Legendre quadrature: nothing is sampled.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.slow_cases import slow_but

from diffusionlm.config import Config, DiffusionConfig
from diffusionlm.diffusion import schedules
from diffusionlm.diffusion.corruption import Corrupted, corrupt, mask_probability_and_weight
from diffusionlm.diffusion.cross_entropy import cross_entropy
from diffusionlm.diffusion.noise import noise_key
from diffusionlm.diffusion.objectives import (
    arm_answer_targets,
    arm_targets,
    has_predecessor,
    mdm_targets,
    predicted_share,
)

V, L = 5, 4
PADDED = 8  # columns of the head: V tokens, a mask id and two rows of padding
SUPPRESSED = np.arange(PADDED) >= V
SEQUENCES = np.array(list(itertools.product(range(V), repeat=L)), np.int32)  # (X, L)
MASKS = np.array(list(itertools.product([False, True], repeat=L)))  # (M, L)
SIZES = MASKS.sum(1)

SCHEDULES = {
    "linear": DiffusionConfig(),
    "cosine": DiffusionConfig(schedule="cosine"),
    "square": DiffusionConfig(schedule="polynomial", polynomial_power=2.0),
    "root": DiffusionConfig(schedule="polynomial", polynomial_power=0.5),
    "geometric": DiffusionConfig(schedule="geometric"),
}


@functools.cache
def joint() -> np.ndarray:
    """q(x) of every sequence: far from independent, and nowhere 0."""
    q = np.random.default_rng(0).gamma(0.5, size=len(SEQUENCES)) + 1e-3
    return q / q.sum()


def conditionals(q: np.ndarray) -> np.ndarray:
    """log q(x_i = v | the tokens of x that the mask leaves), (X, M, L, V), by summing the joint."""
    table = q.reshape((V,) * L)
    logp = np.zeros((len(SEQUENCES), len(MASKS), L, V))
    for m, mask in enumerate(MASKS):
        for i in np.flatnonzero(mask):
            others = tuple(j for j in np.flatnonzero(mask) if j != i)
            marginal = np.log(table.sum(axis=others, keepdims=True))
            marginal -= np.log(np.exp(marginal).sum(axis=i, keepdims=True))
            seen = tuple(SEQUENCES[:, j] * (not mask[j]) for j in range(L) if j != i)
            logp[:, m, i] = np.moveaxis(marginal, i, -1)[seen]
    return logp


def library_nll(logp_XxMxLxV: np.ndarray) -> np.ndarray:
    """Cross-entropy of the clean token at every position under every mask, (X, M, L), by the library.

    The denoiser's logits carry an arbitrary constant, and huge values at the ids that must not be predicted.
    """
    X, M = logp_XxMxLxV.shape[:2]
    constant = np.random.default_rng(1).normal(size=(X, M, L, 1))
    logits = np.concatenate([logp_XxMxLxV + constant, np.full((X, M, L, PADDED - V), 50.0)], axis=-1)
    labels = np.broadcast_to(SEQUENCES[:X, None], (X, M, L)).reshape(-1, L)
    hidden = jnp.asarray(logits.reshape(-1, L, PADDED), jnp.float32)
    nll = jax.jit(lambda h, y: cross_entropy(lambda h: h, h, y, jnp.asarray(SUPPRESSED), 2))(hidden, labels)
    return np.asarray(nll).reshape(X, M, L)


@functools.cache
def exact_nll() -> np.ndarray:
    return library_nll(conditionals(joint()))


@functools.cache
def perturbed_nll() -> np.ndarray:
    """A denoiser that is a little wrong."""
    logp = conditionals(joint())
    logp += 0.3 * np.random.default_rng(2).normal(size=logp.shape)
    return library_nll(logp)


def bound(cfg: DiffusionConfig, nll: np.ndarray, nodes_u: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The mean over u of the library's loss, with all masks enumerated: nats of each sequence, (X,), in float64.

    `mdm_targets` gives nats per token of a batch; one batch here is a sequence under each of the 16 masks.
    """
    u = jnp.asarray(nodes_u, jnp.float32)
    probability_U, weight_U = mask_probability_and_weight(cfg, u)
    tokens = jnp.zeros((len(MASKS), L), jnp.int32)
    ones = jnp.ones((len(MASKS), L), jnp.int32)

    def token_weights(weight: jax.Array) -> jax.Array:
        weight_B = jnp.full((len(MASKS),), weight)
        targets = mdm_targets(cfg, tokens, Corrupted(tokens, jnp.asarray(MASKS), ones == 1, ones, weight_B))
        return targets.weight_BxT * len(MASKS)  # a mean over the masks becomes a sum, to be weighted by their law

    weights_UxMxL = np.asarray(jax.vmap(token_weights)(weight_U), np.float64)
    p = np.asarray(probability_U, np.float64)[:, None]
    law_UxM = p**SIZES * (1 - p) ** (L - SIZES)
    per_token = np.einsum("u,um,uml,xml->x", widths, law_UxM, weights_UxMxL, nll.astype(np.float64))
    return L * per_token


def continuous_nodes(t_min: float) -> tuple[np.ndarray, np.ndarray]:
    """One node for the constant part below t_min, Gauss-Legendre above it."""
    nodes, widths = np.polynomial.legendre.leggauss(80)
    half = (1 - t_min) / 2
    return np.append(t_min / 2, t_min + half * (nodes + 1)), np.append(t_min, half * widths)


def discrete_nodes(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The integrand is constant on each of the steps; filled up to 256 nodes, so that nothing is compiled again."""
    k = np.arange(256)
    return np.minimum((k + 0.5) / steps, 1.0), (k < steps) / steps


def reconstruction_excess(cfg: DiffusionConfig, nll: np.ndarray) -> np.ndarray:
    """Return the extra nats of the bound for one jump from t_min to clean text, (X,).

    With m the masking probability at t_min, E(m) = E[sum of CE over masked] is a polynomial sum_k a_k m^k. The jump
    costs E(m), and continuous time would cost the integral of E(m') / m' from 0 to m, which is sum_k a_k m^k / k. The
    excess, sum over k >= 2 of a_k m^k (1 - 1/k), is that of two or more tokens masked at once and of order m^2.
    """
    m = float(schedules.build(cfg).mask_probability(jnp.float32(cfg.t_min)))
    total_XxM = (nll * MASKS).sum(-1).astype(np.float64)
    excess = np.zeros(len(total_XxM))
    for size in range(1, L + 1):
        by_size = total_XxM[:, size == SIZES].sum(1)
        for j in range(L - size + 1):  # m^size (1 - m)^(L - size), expanded
            k = size + j
            excess += by_size * math.comb(L - size, j) * (-1) ** j * m**k * (1 - 1 / k)
    return excess


# --- the bound


@pytest.mark.parametrize("name", SCHEDULES)
def test_with_the_exact_denoiser_the_bound_is_the_likelihood_of_every_sequence(name):
    """t_min is small enough that two tokens masked at once (order t_min^2) are below single precision."""
    cfg = SCHEDULES[name]
    cfg = DiffusionConfig(**{**cfg.__dict__, "t_min": 1e-7 if name == "root" else 1e-4})
    nodes, widths = continuous_nodes(cfg.t_min)
    if name == "root":  # sqrt(t) is smooth in sqrt(t): nodes that gather at 0
        root, width = continuous_nodes(math.sqrt(cfg.t_min))
        nodes, widths = np.append(cfg.t_min / 2, root[1:] ** 2), np.append(cfg.t_min, 2 * root[1:] * width[1:])
    np.testing.assert_allclose(bound(cfg, exact_nll(), nodes, widths), -np.log(joint()), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "square", "geometric"])
def test_the_reconstruction_term_costs_what_it_should(name):
    """At a coarse cut the bound exceeds the likelihood by exactly the price of the last jump."""
    cfg = DiffusionConfig(**{**SCHEDULES[name].__dict__, "t_min": 0.3})
    excess = bound(cfg, exact_nll(), *continuous_nodes(cfg.t_min)) + np.log(joint())
    expected = reconstruction_excess(cfg, exact_nll())
    np.testing.assert_allclose(excess, expected, atol=1e-5)
    assert (joint() * expected).sum() > 1e-4 if name != "geometric" else True
    # The mean over q is a bound at any cut, even where a single sequence's need not be.
    assert (joint() * excess).sum() > -1e-6


@pytest.mark.parametrize("name", slow_but(SCHEDULES, ("cosine",)))
def test_the_discrete_bound_lies_above_the_entropy_and_comes_down_to_it(name):
    q = joint()
    entropy = -(q * np.log(q)).sum()
    gaps = []
    for steps in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        cfg = DiffusionConfig(**{**SCHEDULES[name].__dict__, "timesteps": steps})
        gaps.append((q * bound(cfg, exact_nll(), *discrete_nodes(steps))).sum() - entropy)
    gaps = np.array(gaps)
    assert (gaps > 0).all() and (np.diff(gaps) < 0).all()
    # One step predicts every token from nothing: the entropies of the four marginals.
    marginals = [q.reshape((V,) * L).sum(tuple(j for j in range(L) if j != i)) for i in range(L)]
    everything_at_once = sum(-(p * np.log(p)).sum() for p in marginals)
    assert gaps[0] == pytest.approx(everything_at_once - entropy, rel=1e-4)
    # A Riemann sum: the gap halves with the step (log(T)/T for sqrt(t), whose slope is infinite at 0).
    assert gaps[-1] / gaps[-2] == pytest.approx(0.5, abs=0.1 if name == "root" else 0.02)
    assert gaps[-1] < 0.03 * gaps[0]


def test_the_discrete_bound_with_its_hand_formula():
    """sum over steps of (m_t - m_s) / m_t E_t, written out for the linear schedule."""
    total_XxM = (exact_nll() * MASKS).sum(-1)
    t = np.arange(1, 6)[:, None] / 5
    law_TxM = t**SIZES * (1 - t) ** (L - SIZES)
    by_hand = ((1 / 5 / t) * (law_TxM @ total_XxM.T)).sum(0)
    np.testing.assert_allclose(bound(DiffusionConfig(timesteps=5), exact_nll(), *discrete_nodes(5)), by_hand, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_perturbed_denoiser_is_worse_on_average(name):
    q = joint()
    nodes = continuous_nodes(1e-4)
    cfg = DiffusionConfig(**{**SCHEDULES[name].__dict__, "t_min": 1e-4})
    exact, perturbed = (bound(cfg, nll, *nodes) for nll in (exact_nll(), perturbed_nll()))
    assert (q * perturbed).sum() > (q * exact).sum() + 0.01
    assert (perturbed < exact).any()  # on average only: some sequences gain


def test_the_schedule_does_not_change_the_bound_of_any_denoiser():
    values = []
    for name in ("linear", "cosine", "square", "geometric"):
        cfg = DiffusionConfig(**{**SCHEDULES[name].__dict__, "t_min": 1e-4})
        values.append(bound(cfg, perturbed_nll(), *continuous_nodes(cfg.t_min)))
    for other in values[1:]:
        np.testing.assert_allclose(other, values[0], rtol=5e-6, atol=5e-6)


@functools.cache
def exact_count_weights() -> dict[tuple[bool, ...], np.ndarray]:
    """Mask -> weights of its tokens, of every mask that occurs in a large batch."""
    cfg = DiffusionConfig(mask_sampling="exact_count")
    rows = jnp.zeros((512, L), jnp.int32)
    corrupted = jax.jit(lambda k: corrupt(cfg, V, rows, rows + 1, None, k))(noise_key(0, 0))
    weights = np.asarray(mdm_targets(cfg, rows, corrupted).weight_BxT) * 512
    of_mask = {}
    for mask, weight in zip(np.asarray(corrupted.masked_BxT), weights, strict=True):
        np.testing.assert_array_equal(of_mask.setdefault(tuple(mask.tolist()), weight), weight)
    return of_mask


@pytest.mark.slow
@pytest.mark.parametrize("nll", [exact_nll, perturbed_nll])
def test_the_exact_count_estimator_has_the_same_mean(nll):
    """Masks and weights as `corrupt` makes them; each subset of size n has probability 1 / (L * C(L, n))."""
    of_mask = exact_count_weights()
    assert set(of_mask) == set(map(tuple, MASKS[SIZES > 0].tolist()))
    total = np.zeros(len(SEQUENCES))
    for m, mask in enumerate(MASKS):
        if mask.any():
            probability = 1 / (L * math.comb(L, int(mask.sum())))
            total += probability * L * (nll()[:, m] * of_mask[tuple(mask.tolist())]).sum(1)
    linear = DiffusionConfig(t_min=1e-4)
    np.testing.assert_allclose(total, bound(linear, nll(), *continuous_nodes(1e-4)), rtol=5e-6, atol=5e-6)
    if nll is exact_nll:
        np.testing.assert_allclose(total, -np.log(joint()), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_uniform_predictor_costs_log_v_a_token(name):
    """It follows that the weights are normalised: the mean of weight x masked is 1."""
    uniform = library_nll(np.zeros((1, len(MASKS), L, V)))
    np.testing.assert_allclose(uniform, math.log(V), rtol=1e-6)
    cfg = DiffusionConfig(**{**SCHEDULES[name].__dict__, "t_min": 0.01})
    nodes, widths = continuous_nodes(cfg.t_min)
    assert bound(cfg, uniform, nodes, widths)[0] == pytest.approx(L * math.log(V), rel=1e-3 if name == "root" else 1e-5)


# --- targets and their normalisation


def corrupted_by_hand() -> tuple[jax.Array, Corrupted]:
    tokens = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]], jnp.int32)
    masked = jnp.array([[True, False, True, False], [False, True, False, False]])
    scored = jnp.array([[True, True, True, False], [True, True, False, False]])
    segments = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]], jnp.int32)
    return tokens, Corrupted(jnp.where(masked, 9, tokens), masked, scored, segments, jnp.array([2.0, 4.0]))


def test_mdm_targets_by_hand():
    tokens, corrupted = corrupted_by_hand()
    bound_ = mdm_targets(DiffusionConfig(), tokens, corrupted)  # 5 scored tokens
    np.testing.assert_allclose(bound_.weight_BxT, np.array([[2, 0, 2, 0], [0, 4, 0, 0]]) / 5, rtol=1e-6)
    masked = mdm_targets(DiffusionConfig(normalization="masked_tokens"), tokens, corrupted)  # 3 masked ones
    np.testing.assert_allclose(masked.weight_BxT, np.array([[2, 0, 2, 0], [0, 4, 0, 0]]) / 3, rtol=1e-6)
    for targets in (bound_, masked):
        np.testing.assert_array_equal(targets.inputs_BxT, [[9, 2, 9, 4], [5, 9, 7, 8]])
        np.testing.assert_array_equal(targets.labels_BxT, tokens)
        np.testing.assert_array_equal(targets.segment_ids_BxT, corrupted.segment_ids_BxT)
        np.testing.assert_array_equal(targets.counted_BxT, corrupted.masked_BxT)
        assert targets.weight_BxT.dtype == targets.counted_BxT.dtype == jnp.float32


@pytest.mark.parametrize("normalization", ["tokens", "masked_tokens", "examples"])
def test_a_batch_without_scored_tokens_weighs_nothing(normalization):
    tokens, corrupted = corrupted_by_hand()
    nothing = jnp.zeros(tokens.shape, bool)
    empty = corrupted.replace(masked_BxT=nothing, scored_BxT=nothing)
    weights = mdm_targets(DiffusionConfig(normalization=normalization), tokens, empty).weight_BxT
    np.testing.assert_array_equal(weights, 0.0)


@pytest.mark.slow
def test_masked_tokens_is_about_twice_the_bound():
    """At a cross-entropy of 1 for every token the bound is 1 and DiffuLLaMA's loss 2, as E[t] = 1/2."""
    rows = jnp.ones((512, 256), jnp.int32)
    sums = {}
    for normalization in ("tokens", "masked_tokens"):
        cfg = DiffusionConfig(normalization=normalization, time_sampling="stratified")

        def one(cfg=cfg):
            return mdm_targets(cfg, rows, corrupt(cfg, 7, rows, rows, None, noise_key(0, 0))).weight_BxT.sum()

        sums[normalization] = float(jax.jit(one)())
    assert sums["tokens"] == pytest.approx(1.0, abs=0.02)
    assert sums["masked_tokens"] == pytest.approx(2.0, abs=0.05)


def test_arm_targets_by_hand():
    tokens = jnp.array([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]], jnp.int32)
    segments = jnp.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]], jnp.int32)
    whole = arm_targets(tokens, (segments != 0).astype(jnp.int32), segmented=False)
    np.testing.assert_array_equal(whole.inputs_BxT, [[10, 11, 12, 13], [20, 21, 22, 23]])
    np.testing.assert_array_equal(whole.labels_BxT, [[11, 12, 13, 14], [21, 22, 23, 24]])
    np.testing.assert_array_equal(whole.counted_BxT, [[1, 1, 1, 1], [1, 1, 0, 0]])
    np.testing.assert_allclose(whole.weight_BxT, np.array([[1, 1, 1, 1], [1, 1, 0, 0]]) / 6, rtol=1e-6)
    parted = arm_targets(tokens, segments, segmented=True)
    np.testing.assert_array_equal(parted.counted_BxT, [[1, 0, 1, 1], [1, 1, 0, 0]])
    np.testing.assert_allclose(parted.weight_BxT, np.array([[1, 0, 1, 1], [1, 1, 0, 0]]) / 5, rtol=1e-6)
    np.testing.assert_array_equal(parted.segment_ids_BxT, segments[:, :-1])
    np.testing.assert_array_equal(arm_targets(tokens, segments * 0, segmented=True).weight_BxT, 0.0)


# --- examples


def test_the_mean_over_examples_of_their_means_by_hand():
    """LLaDA, Algorithm 2: 1 / (t L') for each example, then the mean; a row without scored tokens is no example."""
    tokens, corrupted = corrupted_by_hand()  # 3 and 2 scored tokens
    examples = DiffusionConfig(normalization="examples")
    result = mdm_targets(examples, tokens, corrupted).weight_BxT
    np.testing.assert_allclose(result, [[2 / 3 / 2, 0, 2 / 3 / 2, 0], [0, 4 / 2 / 2, 0, 0]], rtol=1e-6)
    ratio_of_sums = mdm_targets(DiffusionConfig(), tokens, corrupted).weight_BxT
    assert abs(float(result.sum() - ratio_of_sums.sum())) > 0.01  # SMDM's normaliser is another
    nothing = corrupted.scored_BxT.at[0].set(False)
    only = corrupted.replace(scored_BxT=nothing, masked_BxT=corrupted.masked_BxT & nothing)
    np.testing.assert_allclose(mdm_targets(examples, tokens, only).weight_BxT, [[0] * 4, [0, 2, 0, 0]], rtol=1e-6)


@pytest.mark.slow
def test_examples_of_equal_length_are_the_bound():
    rows = jnp.ones((64, 32), jnp.int32)
    corrupted = corrupt(DiffusionConfig(), 7, rows, rows, None, noise_key(0, 0))
    weights = [
        mdm_targets(DiffusionConfig(normalization=one), rows, corrupted).weight_BxT for one in ("tokens", "examples")
    ]
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-6)


def test_answers_of_an_arm_by_hand():
    """Next tokens of the answer and its one EOS, 9; neither the prompt nor what fills the row."""
    tokens = jnp.array([[9, 1, 2, 3, 9, 9], [9, 5, 9, 9, 9, 9]], jnp.int32)
    parts = jnp.array([[1, 1, 2, 2, 2, 0], [1, 2, 2, 0, 0, 0]], jnp.int32)
    mean = arm_answer_targets(DiffusionConfig(), tokens, parts)
    np.testing.assert_array_equal(mean.inputs_BxT, tokens[:, :-1])
    np.testing.assert_array_equal(mean.labels_BxT, tokens[:, 1:])
    np.testing.assert_array_equal(mean.counted_BxT, [[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    np.testing.assert_allclose(mean.weight_BxT, mean.counted_BxT / 5, rtol=1e-6)
    np.testing.assert_array_equal(mean.segment_ids_BxT, [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    each = arm_answer_targets(DiffusionConfig(normalization="examples"), tokens, parts)
    np.testing.assert_allclose(each.weight_BxT, np.array([[0, 2, 2, 2, 0], [3, 3, 0, 0, 0]]) / 12, rtol=1e-6)
    np.testing.assert_array_equal(arm_answer_targets(DiffusionConfig(), tokens, parts * 0).weight_BxT, 0.0)


# --- shifted alignment


def test_a_shifted_alignment_moves_labels_and_weights_one_position_ahead():
    """Position i predicts token i + 1; the inputs stay, and the last position predicts nothing."""
    tokens, corrupted = corrupted_by_hand()
    masked = jnp.array([[False, True, True, False], [False, True, False, False]])
    corrupted = corrupted.replace(masked_BxT=masked)
    shifted = mdm_targets(DiffusionConfig(alignment="shifted"), tokens, corrupted)
    np.testing.assert_array_equal(shifted.inputs_BxT, corrupted.tokens_BxT)
    np.testing.assert_array_equal(shifted.labels_BxT, [[2, 3, 4, 0], [6, 7, 8, 0]])
    np.testing.assert_array_equal(shifted.counted_BxT, [[1, 1, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_allclose(shifted.weight_BxT, np.array([[2, 2, 0, 0], [4, 0, 0, 0]]) / 5, rtol=1e-6)


def test_only_tokens_behind_one_of_their_own_segment_have_a_predecessor():
    segments = jnp.array([[1, 1, 2, 2, 2], [1, 2, 3, 3, 0]], jnp.int32)
    np.testing.assert_array_equal(has_predecessor(segments), [[0, 1, 0, 1, 1], [0, 0, 0, 1, 0]])


def test_the_predicted_share_is_everything_or_what_the_schedule_masks():
    assert predicted_share(Config(objective="arm")) == 1.0
    assert predicted_share(Config()) == 0.5
    assert predicted_share(Config(diffusion=SCHEDULES["square"])) == pytest.approx(1 / 3)
