"""Log-likelihoods of a small random network, against its logits taken apart by hand."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import special

from diffusionlm.config import Config, ModelConfig
from diffusionlm.errors import UserError
from diffusionlm.likelihood import Estimate, LikelihoodConfig, choose, estimate, rolling_windows
from diffusionlm.model import Transformer
from diffusionlm.sampling.config import ModelSpec

TINY = ModelConfig(
    d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, vocab_size=50, max_length=128, head_chunk=16
)
MDM = ModelSpec.of(Config(model=TINY))
ARM = ModelSpec.of(Config(objective="arm", model=dataclasses.replace(TINY, causal=True, mask_row=False)))
MASK = 50
PREFIX, TARGET = [3, 1, 4, 1, 5], [9, 2, 6, 5]


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


def make_params(cfg: ModelConfig):
    """Random parameters with a head that makes some tokens much likelier than others."""
    params = nn.unbox(jax.jit(Transformer(cfg).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return {**params, "head": params["head"] * 4}


PARAMS = {MDM: make_params(TINY), ARM: make_params(ARM.model)}


def log_probabilities(cfg: ModelSpec, rows, guidance: float = 0.0, prompt: int = 0) -> np.ndarray:
    """Of every token at every position of unpadded rows, (R, T, V), in float64."""

    def logits(tokens):
        model, params = Transformer(cfg.model), {"params": PARAMS[cfg]}
        hidden = model.apply(params, jnp.asarray(tokens, jnp.int32))
        return np.asarray(model.apply(params, hidden, method=Transformer.head), np.float64)[..., :50]

    rows = np.asarray(rows)
    conditional = logits(rows)
    if guidance:
        without = rows.copy()
        without[:, :prompt] = MASK
        base = logits(without)
        conditional = base + (1 + guidance) * (conditional - base)
    return special.log_softmax(conditional, -1)


def nll_of_masks(masks, prefix=PREFIX, target=TARGET, guidance=0.0) -> np.ndarray:
    """The cross-entropy of each target token under each mask of the target, (R, n)."""
    n = len(target)
    rows = np.array([prefix + [MASK if m else t for m, t in zip(mask, target, strict=True)] for mask in masks])
    found = log_probabilities(MDM, rows, guidance, len(prefix))[:, len(prefix) :]
    return -np.stack([found[:, i, target[i]] for i in range(n)], 1)


def bound(**kwargs) -> float:
    n = len(kwargs.get("target", TARGET))
    masks = [m for m in itertools.product([False, True], repeat=n) if any(m)]
    nll = nll_of_masks(masks, **kwargs)
    return sum((nll[r] * mask).sum() / (math.comb(n, sum(mask)) * sum(mask)) for r, mask in enumerate(masks))


def run(pairs=((PREFIX, TARGET),), cfg=MDM, request_ids=None, **settings) -> list[Estimate]:
    return estimate(PARAMS[cfg], cfg, pairs, LikelihoodConfig(**settings), request_ids=request_ids)


@pytest.mark.parametrize("guidance", [0.0, 0.7])
@pytest.mark.parametrize("rows", [64, 4])
def test_any_order_is_the_bound(rows, guidance):
    (found,) = run(estimator="any_order", rows=rows, guidance=guidance)
    assert found.log_likelihood == pytest.approx(-bound(guidance=guidance), rel=1e-5)
    assert (found.stderr, found.passes, found.nfe) == (0.0, 1, 15 * (2 if guidance else 1))
    assert found.interval() == (found.log_likelihood,) * 2


def test_without_a_prefix():
    (found,) = run([([], TARGET)], estimator="any_order")
    assert found.log_likelihood == pytest.approx(-bound(prefix=[]), rel=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 0.7])
def test_chain_rule_masks_everything_to_the_right(guidance):
    masks = [[k >= i for k in range(4)] for i in range(4)]
    expected = np.diag(nll_of_masks(masks, guidance=guidance)).sum()
    (found,) = run(estimator="chain_rule", guidance=guidance)
    assert found.log_likelihood == pytest.approx(-expected, rel=1e-5)
    assert found.nfe == 4 * (2 if guidance else 1)


@pytest.mark.parametrize("estimator", ["exact_count", "iid"])
def test_estimates_lie_around_the_bound(estimator):
    """Sixteen estimates of one pair; their mean, and how many of their intervals cover."""
    found = run([(PREFIX, TARGET)] * 16, estimator=estimator, draws=4, rows=64)
    values = np.array([one.log_likelihood for one in found])
    assert abs(values.mean() + bound()) < 3.5 * values.std() / math.sqrt(16)
    covered = [low <= -bound() <= high for low, high in (one.interval() for one in found)]
    assert np.mean(covered) > 0.7
    assert {(one.passes, one.nfe) for one in found} == {(8, 32)} and min(one.stderr for one in found) > 0


def test_an_estimate_does_not_depend_on_what_else_is_asked():
    others = [([7, 8], [1, 2, 3]), (PREFIX, TARGET), ([9] * 70, [4, 4, 4, 4, 4])]
    (alone,) = run(request_ids=[17])
    among = run(others, request_ids=[3, 17, 5], rows=32)[1]
    assert among.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-5)
    assert run(request_ids=[18])[0] != alone and run(request_ids=[17], seed=1)[0] != alone


def test_it_stops_at_the_standard_error_that_was_asked_for():
    pairs = [(PREFIX, TARGET), (PREFIX, [9])]  # one token is exact
    first, single = run(pairs, draws=2)
    wanted = first.stderr / 2
    found, again = run(pairs, draws=2, stop_at_stderr=wanted, max_passes=400)
    assert found.stderr <= wanted and 8 < found.passes < 400
    assert again.passes == single.passes == 8 and single.stderr < 1e-6
    assert run(pairs, draws=2, stop_at_stderr=1e-9, max_passes=12)[0].passes == 12


def test_an_autoregressive_model_is_teacher_forced():
    rows = [PREFIX + TARGET]
    found = log_probabilities(ARM, rows)[0, len(PREFIX) - 1 : -1]
    expected = sum(found[i, t] for i, t in enumerate(TARGET))
    (single,) = run(cfg=ARM)
    assert single.log_likelihood == pytest.approx(expected, rel=1e-5)
    assert (single.stderr, single.nfe) == (0.0, 1)


def test_in_bfloat16_the_sum_is_float32():
    spec = dataclasses.replace(MDM, model=dataclasses.replace(TINY, dtype="bfloat16"))
    (found,) = estimate(PARAMS[MDM], spec, [(PREFIX, TARGET)], LikelihoodConfig(estimator="any_order"))
    assert found.log_likelihood == pytest.approx(-bound(), rel=0.02)
    assert float(jnp.bfloat16(found.log_likelihood)) != found.log_likelihood


# --- decisions


def test_the_likeliest_answer_is_chosen_with_few_passes_where_it_is_clear():
    answers = [[9, 2, 6], [1, 1, 1], [7, 30, 2], [44, 9, 13]]
    exact = [one.log_likelihood for one in run([(PREFIX, a) for a in answers], estimator="any_order")]
    found = choose(PARAMS[MDM], MDM, PREFIX, answers, LikelihoodConfig(draws=4))
    assert found.best == int(np.argmax(exact)) and found.decided
    assert sum(one.nfe for one in found.estimates) < len(answers) * 128
    same = choose(PARAMS[MDM], MDM, PREFIX, [TARGET, TARGET], LikelihoodConfig(draws=2, max_passes=16))
    assert not same.decided and [one.passes for one in same.estimates] == [16, 16]


def test_choosing_with_an_exact_estimator_is_exact():
    answers = [[1, 1], [9, 2]]
    found = choose(PARAMS[MDM], MDM, PREFIX, answers, LikelihoodConfig(estimator="chain_rule"))
    assert found.decided and found.estimates[found.best].log_likelihood == max(
        one.log_likelihood for one in found.estimates
    )


def test_the_decision_error_stays_below_its_rate():
    """The hardest case for a test that looks often: two answers that differ little. By simulation of its passes."""
    from diffusionlm import likelihood

    rng = np.random.default_rng(0)
    looks, level, wrong, decided = [8, 16, 32, 64, 128], 0.05 / 5, 0, 0
    for _ in range(1000):
        better, worse = rng.gamma(4.0, 0.5, 128), rng.gamma(4.0, 0.5, 128) + 0.1  # nats; the mean of the first is lower
        for look in looks:
            a, b = (
                Estimate(-x[:look].mean(), x[:look].std(ddof=1) / math.sqrt(look), look, look) for x in (better, worse)
            )
            high, low = (a, b) if a.log_likelihood > b.log_likelihood else (b, a)
            if likelihood._is_below(low, high, level):
                decided += 1
                wrong += high is b
                break
    assert wrong <= 60 and decided > 100


# --- long documents


def test_windows_score_every_token_but_the_first_once():
    tokens = list(range(100, 131))
    for context, stride in ((8, 4), (10, 9), (64, 16), (5, 1)):
        pairs = rolling_windows(tokens, context, stride)
        assert [t for _, target in pairs for t in target] == tokens[1:]
        position = 1
        for prefix, target in pairs:
            assert len(prefix) + len(target) <= context and len(target) <= stride and prefix
            assert prefix == tokens[position - len(prefix) : position]
            assert len(prefix) == min(position, context - len(target))
            position += len(target)


@pytest.mark.parametrize(
    "pairs, cfg, settings, parts",
    [
        ([(PREFIX, [])], MDM, {}, ["target 0 is empty"]),
        ([([], TARGET)], ARM, {}, ["prefix 0 is empty", "BOS"]),
        ([([1] * 126, TARGET)], MDM, {}, ["130 tokens", "128"]),
        ([(PREFIX, [50])], MDM, {}, ["token 50", "[0, 50)"]),
        ([(PREFIX, [1] * 13)], MDM, {"estimator": "any_order"}, ["at most 12", "13"]),
        ([(PREFIX, TARGET)], ARM, {"estimator": "iid"}, ["estimator=iid", "autoregressive"]),
        ([(PREFIX, TARGET)], MDM, {"estimator": "autoregressive"}, ["masked diffusion"]),
        ([(PREFIX, TARGET)], ARM, {"guidance": 0.5}, ["guidance=0.5"]),
        ([(PREFIX, TARGET)], MDM, {"estimator": "exact_coun"}, ["'exact_coun'", "'exact_count'"]),
        ([(PREFIX, TARGET)], MDM, {"passes": 7}, ["passes=7", "at least 8"]),
        ([(PREFIX, TARGET)], MDM, {"guidance": -1.0}, ["guidance=-1.0"]),
        ([(PREFIX, TARGET)], MDM, {"stop_at_stderr": 0.1, "max_passes": 4}, ["max_passes=4", "passes=8"]),
    ],
)
def test_a_mistake_is_one_line(pairs, cfg, settings, parts):
    with pytest.raises(UserError) as caught:
        run(pairs, cfg, **settings)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)


def test_a_stride_that_leaves_no_prefix_is_refused():
    with pytest.raises(UserError, match="stride=8"):
        rolling_windows([1, 2, 3], 8, 8)
    with pytest.raises(UserError, match="1 answer"):
        choose(PARAMS[MDM], MDM, PREFIX, [[1]])
