"""Log-likelihoods of a small random network, against its logits taken apart by hand."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.compilations import count_compilations
from support.released_estimators import DIFFULLAMA_DRAWS, RELEASED
from support.slow_cases import slow_but
from support.tiny_likelihood import (
    ARM,
    MDM,
    PREFIX,
    SHIFTED,
    TARGET,
    TINY,
    bound,
    log_probabilities,
    nll_of_masks,
    params_of,
)

from diffusionlm import memory
from diffusionlm.errors import UserError
from diffusionlm.likelihood import monte_carlo
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.estimators import ESTIMATORS
from diffusionlm.likelihood.greedy import is_greedy
from diffusionlm.likelihood.monte_carlo import Estimate, Noise, estimate


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


def run(pairs=((PREFIX, TARGET),), cfg=MDM, request_ids=None, **settings) -> list[Estimate]:
    return estimate(params_of(cfg), cfg, pairs, LikelihoodConfig(**settings), request_ids=request_ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, guidance",
    [(64, 0.7), (4, 0.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((64, 0.0), (4, 0.7)))],
)
def test_any_order_is_the_bound(rows, guidance):
    (result,) = run(estimator="any_order", rows=rows, guidance=guidance)
    assert result.log_likelihood == pytest.approx(-bound(guidance=guidance), rel=1e-5)
    assert (result.stderr, result.passes, result.nfe) == (0.0, 1, 15 * (2 if guidance else 1))
    assert result.interval() == (result.log_likelihood,) * 2


@pytest.mark.slow
def test_without_a_prefix():
    (result,) = run([([], TARGET)], estimator="any_order")
    assert result.log_likelihood == pytest.approx(-bound(prefix=[]), rel=1e-5)


@pytest.mark.parametrize("guidance", [pytest.param(0.0, marks=pytest.mark.slow), 0.7])
def test_chain_rule_masks_everything_to_the_right(guidance):
    masks = [[k >= i for k in range(4)] for i in range(4)]
    expected = np.diag(nll_of_masks(masks, guidance=guidance)).sum()
    (result,) = run(estimator="chain_rule", guidance=guidance)
    assert result.log_likelihood == pytest.approx(-expected, rel=1e-5)
    assert result.nfe == 4 * (2 if guidance else 1)


@pytest.mark.parametrize("estimator", ["exact_count", pytest.param("iid", marks=pytest.mark.slow)])
def test_estimates_lie_around_the_bound(estimator):
    """Sixteen estimates of one pair; their mean, and how many of their intervals cover."""
    estimates = run([(PREFIX, TARGET)] * 16, estimator=estimator, draws=4, rows=64)
    values = np.array([e.log_likelihood for e in estimates])
    assert abs(values.mean() + bound()) < 3.5 * values.std() / math.sqrt(16)
    covered = [low <= -bound() <= high for low, high in (e.interval() for e in estimates)]
    assert np.mean(covered) > 0.7
    assert {(e.passes, e.nfe) for e in estimates} == {(8, 32)} and min(e.stderr for e in estimates) > 0


@pytest.mark.slow
def test_an_estimate_does_not_depend_on_what_else_is_asked():
    others = [([7, 8], [1, 2, 3]), (PREFIX, TARGET), ([9] * 70, [4, 4, 4, 4, 4])]
    (alone,) = run(request_ids=[17])
    among = run(others, request_ids=[3, 17, 5], rows=32)[1]
    assert among.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-5)
    assert run(request_ids=[18])[0] != alone and run(request_ids=[17], seed=1)[0] != alone


def test_noise_is_addressed_by_seed_request_and_pass():
    """On the device as on the host: the same keys, however many there are at a time."""
    requests, passes = np.array([0, 17, 2**32 - 1], np.uint32), np.array([3, 0, 5], np.uint32)
    keys = jax.jit(Noise.keys)(Noise(jax.random.key(7), requests, passes))
    expected = [
        jax.random.fold_in(jax.random.fold_in(jax.random.key(7), request), number)
        for request, number in zip(requests, passes, strict=True)
    ]
    np.testing.assert_array_equal(jax.random.key_data(keys), [jax.random.key_data(key) for key in expected])


@pytest.mark.slow
def test_it_stops_at_the_standard_error_that_was_asked_for():
    pairs = [(PREFIX, TARGET), (PREFIX, [9])]  # one token is exact
    first, single = run(pairs, draws=2)
    limit = first.stderr / 1.5
    result, again = run(pairs, draws=2, stop_at_stderr=limit, max_passes=400)
    assert result.stderr <= limit and 8 < result.passes < 400
    assert again.passes == single.passes == 8 and single.stderr < 1e-6
    assert run(pairs, draws=2, stop_at_stderr=1e-9, max_passes=12)[0].passes == 12


@pytest.mark.slow
def test_an_autoregressive_model_is_teacher_forced():
    rows = [PREFIX + TARGET]
    log_p_nxV = log_probabilities(ARM, rows)[0, len(PREFIX) - 1 : -1]
    expected = sum(log_p_nxV[i, t] for i, t in enumerate(TARGET))
    (single,) = run(cfg=ARM)
    assert single.log_likelihood == pytest.approx(expected, rel=1e-5)
    assert (single.stderr, single.nfe) == (0.0, 1)


@pytest.mark.slow
def test_an_unweighted_score_is_the_mean_over_masks(monkeypatch):
    """DiffuLLaMA's released score, summed over all sets of masks."""
    monkeypatch.setitem(ESTIMATORS, "diffullama", RELEASED["diffullama"])
    masks = [m for m in itertools.product([False, True], repeat=4) if any(m)]
    mean = {m: nll[list(m)].mean() for m, nll in zip(masks, nll_of_masks(masks), strict=True)}
    expected = np.mean(
        [sum((k / 32) ** sum(m) * (1 - k / 32) ** (4 - sum(m)) * mean[m] for m in masks) for k in range(1, 33)]
    )
    (result,) = run(estimator="diffullama", draws=DIFFULLAMA_DRAWS, passes=16)
    assert abs(result.log_likelihood + expected) < 4 * result.stderr and result.stderr < 0.02 * expected
    assert result.nfe == 16 * 32


@pytest.mark.slow
def test_in_bfloat16_the_sum_is_float32():
    spec = dataclasses.replace(MDM, model=dataclasses.replace(TINY, dtype="bfloat16"))
    (result,) = estimate(params_of(MDM), spec, [(PREFIX, TARGET)], LikelihoodConfig(estimator="any_order"))
    assert result.log_likelihood == pytest.approx(-bound(), rel=0.02)
    assert float(jnp.bfloat16(result.log_likelihood)) != result.log_likelihood


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["exact_count", "chain_rule", "any_order", None])
def test_only_buckets_compile(estimator):
    """Prefixes and targets of other lengths, another number of pairs, other noise: the same program."""

    def score(pairs, seed, guidance):
        if estimator is None:
            is_greedy(params_of(MDM), MDM, pairs, LikelihoodConfig(guidance=guidance))
        else:
            run(pairs, estimator=estimator, seed=seed, guidance=guidance)

    score([(PREFIX, [9] * 4)], 0, 0.5)
    with count_compilations() as compiled:
        jax.jit(lambda x: x * 3)(jnp.ones(7))
    assert compiled  # so the count counts
    with count_compilations() as compiled:
        score([([1, 2], [3] * 3), ([4] * 56, [5] * 3), ([], [6] * 3)], 1, 0.6)
    assert not compiled


@pytest.mark.parametrize(
    "pairs, cfg, settings, parts",
    [
        ([(PREFIX, [])], MDM, {}, ["target 0 is empty"]),
        ([([], TARGET)], ARM, {}, ["prefix 0 is empty", "BOS"]),
        ([([], TARGET)], SHIFTED, {}, ["prefix 0 is empty", "BOS"]),
        ([(PREFIX, [5])], dataclasses.replace(MDM, mask_id=5), {}, ["pair 0 has token 5, which stands for masks"]),
        ([([5], TARGET)], dataclasses.replace(MDM, mask_id=5), {}, ["pair 0 has token 5, which stands for masks"]),
        ([([1] * 126, TARGET)], MDM, {}, ["130 tokens", "128"]),
        ([(PREFIX, [50])], MDM, {}, ["token 50", "[0, 50)"]),
        ([(PREFIX, [1] * 13)], MDM, {"estimator": "any_order"}, ["at most 12", "13"]),
        ([(PREFIX, TARGET)], ARM, {"estimator": "iid"}, ["estimator=iid", "autoregressive"]),
        ([(PREFIX, TARGET)], MDM, {"estimator": "autoregressive"}, ["masked diffusion"]),
        ([(PREFIX, TARGET)], ARM, {"guidance": 0.5}, ["guidance=0.5"]),
        ([(PREFIX, TARGET)], MDM, {"estimator": "exact_coun"}, ["'exact_coun'", "'exact_count'"]),
        ([(PREFIX, TARGET)], MDM, {"passes": 7}, ["passes=7", "at least 8"]),
        ([(PREFIX, TARGET)], MDM, {"seed": 2**32}, ["seed=4294967296", "from 0 to 4294967295"]),
        ([(PREFIX, TARGET)], MDM, {"guidance": -1.0}, ["guidance=-1.0"]),
        ([(PREFIX, TARGET)], MDM, {"stop_at_stderr": 0.1, "max_passes": 4}, ["max_passes=4", "passes=8"]),
    ],
)
def test_a_mistake_is_one_line(pairs, cfg, settings, parts):
    with pytest.raises(UserError) as caught:
        estimate(None, cfg, pairs, LikelihoodConfig(**settings))
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)


def test_nan_logits_are_an_error_and_name_the_target():
    damaged = {**params_of(MDM), "embed": params_of(MDM)["embed"].at[9].set(jnp.nan)}
    with pytest.raises(UserError, match="NaN logits for target 1"):
        estimate(damaged, MDM, [([3], [4, 5]), ([9], [4, 5])])


@pytest.mark.parametrize("ids", [[-1], [2**32], [], [1, 2]])
def test_request_ids_are_one_number_a_pair_in_range(ids):
    with pytest.raises(UserError, match=r"request_ids=.* must be 1 numbers from 0 to 4294967295, one a pair"):
        run(request_ids=ids)


@pytest.mark.parametrize("settings", [{"draws": 2, "rows": 4}, {"estimator": "chain_rule", "rows": 4}])
def test_every_batch_is_fetched_after_the_next_one_is_dispatched(settings, monkeypatch):
    """Also from one shape to the next; and nothing runs on the device but the passes, whose inputs are NumPy arrays."""
    events, shapes, roots, eager = [], [], [], []

    class Nats:
        """Nats on a device, which note when something waits for them."""

        def __init__(self, number, size):
            self.number, self.size = number, size

        def block_until_ready(self):
            events.append(("fetch", self.number))
            return self

        def __array__(self, dtype=None, copy=None):
            return np.zeros(self.block_until_ready().size, np.float32)

    def pass_nats(predictor, batch, noise, first, **static):
        events.append(("dispatch", len(shapes)))
        shapes.append(batch.tokens_ExT.shape)
        roots.append(noise.root)
        assert {type(x) for x in (*batch, noise.request_E, noise.pass_E, first)} == {np.ndarray}
        return Nats(len(shapes) - 1, len(batch.n_E))

    params_of(MDM)  # made before calls are counted
    fold_in = jax.random.fold_in
    monkeypatch.setattr(monte_carlo, "_pass_nats", pass_nats)
    monkeypatch.setattr(jax.random, "fold_in", lambda *args: eager.append(args) or fold_in(*args))
    run([(PREFIX, TARGET), ([9] * 70, TARGET), (PREFIX, [9, 2, 6]), ([9] * 70, TARGET)], **settings)
    last = len(shapes) - 1
    assert last >= 3 and [T for _, T in shapes] == sorted(T for _, T in shapes) and {T for _, T in shapes} == {64, 128}
    overlapped = [event for i in range(last) for event in (("dispatch", i + 1), ("fetch", i))]
    assert events == [("dispatch", 0), *overlapped, ("fetch", last)]
    assert not eager and all(root is roots[0] for root in roots)


@pytest.mark.parametrize("score", slow_but([estimate, is_greedy], [estimate]))
def test_a_batch_without_room_is_refused(score, monkeypatch):
    """Beside the parameters there must be room for 64 hidden states of 32 values and 51 logits for each row."""
    params, row = params_of(MDM), 64 * 32 * jnp.dtype(TINY.dtype).itemsize + 4 * 51
    limit = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + 32 * row
    monkeypatch.setattr(memory, "host_limit", lambda: (limit, "this machine has"))
    score(params, MDM, [(PREFIX, TARGET)], LikelihoodConfig(rows=32))
    with pytest.raises(
        UserError, match="scoring 48 sequences of 64 tokens at a time needs at least .*; set fewer rows"
    ):
        score(params, MDM, [(PREFIX, TARGET)], LikelihoodConfig(rows=48))
