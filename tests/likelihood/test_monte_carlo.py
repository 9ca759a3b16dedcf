"""Log-likelihoods of a small random network, against its logits taken apart by hand."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from support.helpers import count_compilations, make_params

from diffusionlm.config import Config, DiffusionConfig, ModelConfig
from diffusionlm.errors import UserError
from diffusionlm.likelihood import monte_carlo as likelihood
from diffusionlm.likelihood.greedy import is_greedy
from diffusionlm.likelihood.monte_carlo import Estimate, LikelihoodConfig, choose, estimate
from diffusionlm.likelihood.perplexity import Perplexity, perplexity, rolling_windows
from diffusionlm.model.spec import ModelSpec
from diffusionlm.model.transformer import Transformer

TINY = ModelConfig(
    d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, vocab_size=50, max_length=128, head_chunk=16
)
MDM = ModelSpec.of(Config(model=TINY))
SHIFTED = ModelSpec.of(Config(model=TINY, diffusion=DiffusionConfig(alignment="shifted")))
ARM = ModelSpec.of(Config(objective="arm", model=dataclasses.replace(TINY, causal=True, mask_row=False)))
MASK = 50
PREFIX, TARGET = [3, 1, 4, 1, 5], [9, 2, 6, 5]


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


PARAMS = {MDM: make_params(TINY, 4), ARM: make_params(ARM.model, 4)}


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg: ModelSpec, tokens_RxT):
    model, params = Transformer(cfg.model), {"params": PARAMS[cfg]}
    return model.apply(params, model.apply(params, tokens_RxT), method=Transformer.head)[..., :50]


def log_probabilities(cfg: ModelSpec, rows, guidance: float = 0.0, prompt: int = 0) -> np.ndarray:
    """Of every token at every position of unpadded rows, (R, T, V), in float64."""
    rows = np.asarray(rows, np.int32)
    conditional = np.asarray(logits(cfg, rows), np.float64)
    if guidance:
        without = rows.copy()
        without[:, :prompt] = MASK
        base = np.asarray(logits(cfg, without), np.float64)
        conditional = base + (1 + guidance) * (conditional - base)
    return special.log_softmax(conditional, -1)


def next_token(tokens) -> np.ndarray:
    """log p of the next token under the autoregressive model, (V,)."""
    row = [*tokens, *[0] * (40 - len(tokens))]  # of one shape; what comes later is not seen
    return log_probabilities(ARM, [row])[0, len(tokens) - 1]


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


def test_diffullamas_score_is_unweighted():
    """Its mean over masks, summed over all sets of them; and always 32 draws, whatever else is set."""
    masks = [m for m in itertools.product([False, True], repeat=4) if any(m)]
    mean = {m: nll[list(m)].mean() for m, nll in zip(masks, nll_of_masks(masks), strict=True)}
    expected = np.mean(
        [sum((k / 32) ** sum(m) * (1 - k / 32) ** (4 - sum(m)) * mean[m] for m in masks) for k in range(1, 33)]
    )
    (found,) = run(estimator="diffullama", draws=4, passes=16)
    assert abs(found.log_likelihood + expected) < 4 * found.stderr and found.stderr < 0.02 * expected
    assert found.nfe == 16 * 32


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


class Synthetic:
    """In place of the scorer: an answer's one "token" is its log-likelihood, and passes are noise around it."""

    exact = False

    def __init__(self, params, cfg, pairs, settings, request_ids):
        true = np.array([answer[0] for _, answer in pairs])[:, None]
        noise = np.random.default_rng(request_ids).gamma(4.0, 0.5, (len(pairs), 128)) - 2.0  # skewed, as passes are
        self._nats, self._done = noise - true, [0] * len(pairs)

    def run_passes(self, requests, passes):
        for r in requests:
            assert self._done[r] == passes.start  # all that are left have had equally many
            self._done[r] = passes.stop

    def estimate(self, r):
        n = self._done[r]
        nats = self._nats[r, :n]
        return Estimate(-nats.mean(), nats.std(ddof=1) / math.sqrt(n), n, n)


def synthetic_choices(monkeypatch, answers):
    monkeypatch.setattr(likelihood, "_Scorer", Synthetic)
    return [choose(None, None, [], [[x] for x in answers], error_rate=0.05, request_ids=[i]) for i in range(1000)]


def test_decisions_err_no_more_often_than_asked(monkeypatch):
    """Where answers differ least a test that looks often errs most: the likeliest may be dropped in 5% of runs."""
    wrong = []
    for choice in synthetic_choices(monkeypatch, [-9.99, -10.0, -10.0, -10.0]):
        passes = [one.passes for one in choice.estimates]
        wrong.append(choice.best != 0 and (choice.decided or passes[0] < max(passes)))
    assert np.mean(wrong) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_decisions_take_the_passes_that_they_need(monkeypatch):
    found = synthetic_choices(monkeypatch, [-10.0, -11.0, -14.0])
    assert np.mean([choice.decided and choice.best == 0 for choice in found]) > 0.99
    first, second, third = np.mean([[one.passes for one in choice.estimates] for choice in found], axis=0)
    assert third < 10 < first == second < 28  # one standard deviation, four of them


# --- greedy decoding


def greedy(prefix, n, spec=MDM, guidance=0.0):
    """The reveals (place, token) of greedy decoding in order, one row at a time; asserts that no two are close."""
    if spec.autoregressive:
        tokens = list(prefix)
        for _ in range(n):
            found = next_token(tokens)
            assert np.diff(np.sort(found)[-2:]) > 1e-4
            tokens.append(int(found.argmax()))
        return list(enumerate(tokens[len(prefix) :]))
    row, left, reveals = [*prefix, *[MASK] * n], set(range(n)), []
    while left:
        found = log_probabilities(MDM, [row], guidance, len(prefix))[0, len(prefix) :]
        best = {k: found[k].max() for k in left}
        first, *others = sorted(left, key=best.get, reverse=True)
        assert np.diff(np.sort(found[first])[-2:]) > 1e-4 and (not others or best[first] - best[others[0]] > 1e-4)
        token = int(found[first].argmax())
        row[len(prefix) + first] = token
        left.remove(first)
        reveals.append((first, token))
    return reveals


@pytest.mark.parametrize("spec, guidance", [(MDM, 0.0), (MDM, 0.7), (ARM, 0.0)], ids=["mdm", "guided", "arm"])
def test_is_greedy_follows_the_slow_reference(spec, guidance):
    pairs, expected, orders, changed = [], [], [], 0
    # Few lengths in all, as the reference compiles each.
    for prefix, n in (([8, 1, 4, 1, 5], 1), (PREFIX, 4), ([9, 2], 4), ([9, 2], 7), ([10, 6, 33], 3), ([10, 6, 33], 6)):
        reveals = greedy(prefix, n, spec, guidance)
        target = [token for _, token in sorted(reveals)]
        pairs.append((prefix, target))
        expected.append(True)
        orders.append([place for place, _ in reveals])
        for place, token in (reveals[0], reveals[-1]):
            pairs.append((prefix, [*target[:place], (token + 1) % 50, *target[place + 1 :]]))
            expected.append(False)
        if spec is MDM:
            at_once = log_probabilities(spec, [[*prefix, *[MASK] * n]])[0, len(prefix) :].argmax(-1).tolist()
            changed += at_once != target
    found = is_greedy(PARAMS[spec], spec, pairs, LikelihoodConfig(guidance=guidance, rows=16))
    assert found == expected
    if spec is MDM:  # not from left to right, and not all at once
        assert any(order != sorted(order) for order in orders) and changed


def test_is_greedy_in_chunks_of_the_vocabulary_projection():
    pairs = [(prefix, [token for _, token in sorted(greedy(prefix, 7))]) for prefix in ([9, 2], [11, 24])]
    pairs.insert(1, (PREFIX, [1, 2, 3, 4, 5, 6, 7]))
    spec = dataclasses.replace(MDM, model=dataclasses.replace(TINY, head_chunk=7))
    assert is_greedy(PARAMS[MDM], spec, pairs, LikelihoodConfig(rows=3)) == [True, False, True]


# --- long documents

DOCUMENTS = [[(7 * i * i + 3 * i + d) % 50 for i in range(length)] for d, length in enumerate((5, 16, 17, 40, 1))]


@pytest.mark.parametrize("context, stride", [(8, 4), (10, 9), (64, 16), (5, 1), (31, 8), (30, 8)])
def test_windows_score_every_token_but_the_first_once(context, stride):
    tokens = list(range(100, 131))
    pairs = rolling_windows(tokens, context, stride)
    assert [t for _, target in pairs for t in target] == tokens[1:]
    position = 1
    for prefix, target in pairs:
        assert 2 <= len(prefix) + len(target) <= context and prefix and target
        assert len(target) <= (stride if position > 1 else context - 1)
        assert prefix == tokens[position - len(prefix) : position]  # what lies right before the target,
        assert len(prefix) == min(position, context - len(target))  # as much of it as fits
        position += len(target)
    assert len(pairs) == 1 + max(0, math.ceil((31 - context) / stride))
    assert rolling_windows(tokens[:1], context, stride) == rolling_windows([], context, stride) == []


def test_perplexity_of_an_autoregressive_model_is_that_of_its_conditionals():
    """Each token given those before it back to the start of its window: context 16, of which 6 are new."""
    spec = dataclasses.replace(ARM, max_length=16)
    expected = []
    for tokens in DOCUMENTS:
        total = 0.0
        for i in range(1, len(tokens)):
            if i < 16:
                begin = 0
            else:  # the window that scores token i ends after a whole number of strides, or with the document
                end = min(16 + 6 * ((i - 16) // 6 + 1), len(tokens))
                begin = end - 16
            total -= next_token(tokens[begin:i])[tokens[i]]
        expected.append(total)
    found = perplexity(PARAMS[ARM], spec, DOCUMENTS, stride=6, n_bytes=[10, 30, 30, 80, 0])
    np.testing.assert_allclose([-one.log_likelihood for one in found.documents], expected, rtol=1e-5)
    assert found.tokens == [4, 15, 16, 39, 0] and found.estimate_stderr == 0.0
    assert found.nats == pytest.approx(sum(expected), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(expected) / 74), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / 150, rel=1e-5)
    assert [one.nfe for one in found.documents] == [1, 1, 2, 5, 0]


def test_perplexity_of_a_masked_diffusion_model_adds_up_the_bounds_of_its_windows():
    spec = dataclasses.replace(MDM, max_length=6)
    tokens = DOCUMENTS[1][:9]
    expected = bound(prefix=tokens[:1], target=tokens[1:6]) + bound(prefix=tokens[3:6], target=tokens[6:])
    found = perplexity(PARAMS[MDM], spec, [tokens], LikelihoodConfig(estimator="any_order"))
    assert found.nats == pytest.approx(expected, rel=1e-5) and math.isnan(found.stderr)
    sampled = perplexity(PARAMS[MDM], spec, [tokens], LikelihoodConfig(draws=4, passes=16))
    assert 0 < sampled.estimate_stderr and abs(sampled.nats - expected) < 4 * sampled.estimate_stderr
    assert (sampled.documents[0].passes, sampled.documents[0].nfe) == (16, 128)


def test_the_standard_error_over_documents_is_that_of_the_ratio():
    """Documents are drawn again and again; the spread of nats per token is what the standard error says."""
    rng = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(2000):
        tokens = rng.integers(5, 50, 40)
        nats = rng.gamma(4.0, 0.5, 40) * tokens
        found = Perplexity([Estimate(-x, 0.0, 1, 1) for x in nats], tokens.tolist())
        ratios.append(found.nats_per_token)
        errors.append(found.stderr / tokens.sum())
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.06)


# --- programs and mistakes


@pytest.mark.parametrize("estimator", ["exact_count", "chain_rule", "any_order", None])
def test_only_buckets_compile(estimator):
    """Prefixes and targets of other lengths, another number of pairs, other noise: the same program."""

    def score(pairs, seed, guidance):
        if estimator is None:
            is_greedy(PARAMS[MDM], MDM, pairs, LikelihoodConfig(guidance=guidance))
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
        ([(PREFIX, TARGET)], MDM, {"guidance": -1.0}, ["guidance=-1.0"]),
        ([(PREFIX, TARGET)], MDM, {"stop_at_stderr": 0.1, "max_passes": 4}, ["max_passes=4", "passes=8"]),
    ],
)
def test_a_mistake_is_one_line(pairs, cfg, settings, parts):
    with pytest.raises(UserError) as caught:
        estimate(None, cfg, pairs, LikelihoodConfig(**settings))
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rolling_windows([1, 2, 3], 8, 8), "stride=8 .* 7"),
        (lambda: perplexity(None, MDM, [[1, 2], []]), "document 1 is empty"),
        (lambda: perplexity(None, MDM, [[1], [2]]), "nothing to score"),
        (lambda: perplexity(None, MDM, [[1, 2]], n_bytes=[1, 2]), r"n_bytes=\[1, 2\]"),
        (lambda: perplexity(None, MDM, [[1, 2]], LikelihoodConfig(estimator="diffullama")), "estimator=diffullama"),
        (lambda: choose(None, MDM, PREFIX, [[1]]), "1 answer"),
        (lambda: is_greedy(None, MDM, [(PREFIX, [])]), "target 0 is empty"),
        (lambda: is_greedy(None, ARM, [(PREFIX, [1])], LikelihoodConfig(guidance=1.0)), "guidance=1.0"),
        (lambda: is_greedy(None, MDM, [(PREFIX, [1])], LikelihoodConfig(rows=0)), "rows=0"),
    ],
)
def test_a_mistake_in_what_is_built_on_it_is_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_nan_logits_are_an_error_and_name_the_target():
    damaged = {**PARAMS[MDM], "embed": PARAMS[MDM]["embed"].at[9].set(jnp.nan)}
    with pytest.raises(UserError, match="NaN logits for target 1"):
        estimate(damaged, MDM, [([3], [4, 5]), ([9], [4, 5])])
