"""Perplexity of documents of any length, in windows that overlap."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from support.tiny_likelihood import ARM, MDM, bound, next_token, params_of

from diffusionlm.errors import UserError
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.monte_carlo import Estimate
from diffusionlm.likelihood.perplexity import Perplexity, perplexity, rolling_windows


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


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


@pytest.mark.slow
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
    result = perplexity(params_of(ARM), spec, DOCUMENTS, stride=6, n_bytes=[10, 30, 30, 80, 0])
    np.testing.assert_allclose([-document.log_likelihood for document in result.documents], expected, rtol=1e-5)
    assert result.tokens == [4, 15, 16, 39, 0] and result.estimate_stderr == 0.0
    assert result.nats == pytest.approx(sum(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(sum(expected) / 74), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / 150, rel=1e-5)
    assert [document.nfe for document in result.documents] == [1, 1, 2, 5, 0]


@pytest.mark.slow
def test_perplexity_of_a_masked_diffusion_model_adds_up_the_bounds_of_its_windows():
    spec = dataclasses.replace(MDM, max_length=6)
    tokens = DOCUMENTS[1][:9]
    expected = bound(prefix=tokens[:1], target=tokens[1:6]) + bound(prefix=tokens[3:6], target=tokens[6:])
    result = perplexity(params_of(MDM), spec, [tokens], LikelihoodConfig(estimator="any_order"))
    assert result.nats == pytest.approx(expected, rel=1e-5) and math.isnan(result.stderr)
    sampled = perplexity(params_of(MDM), spec, [tokens], LikelihoodConfig(draws=4, passes=16))
    assert 0 < sampled.estimate_stderr and abs(sampled.nats - expected) < 4 * sampled.estimate_stderr
    assert (sampled.documents[0].passes, sampled.documents[0].nfe) == (16, 128)


@pytest.mark.slow
def test_without_a_given_token_every_token_is_scored_once():
    """The first window has no prefix; for a model that predicts tokens in place, its bound is that of a whole text."""
    pairs = rolling_windows(range(9), 6, 3, given=0)
    assert [(list(prefix), list(target)) for prefix, target in pairs] == [
        ([], [0, 1, 2, 3, 4, 5]),
        ([3, 4, 5], [6, 7, 8]),
    ]
    spec, tokens = dataclasses.replace(MDM, max_length=6), DOCUMENTS[1][:9]
    expected = bound(prefix=[], target=tokens[:6]) + bound(prefix=tokens[3:6], target=tokens[6:])
    result = perplexity(params_of(MDM), spec, [tokens], LikelihoodConfig(estimator="any_order"), given=0)
    assert result.nats == pytest.approx(expected, rel=1e-5) and result.tokens == [9]


def test_the_standard_error_over_documents_is_that_of_the_ratio():
    """Documents are drawn again and again; the spread of nats per token is what the standard error says."""
    rng = np.random.default_rng(0)
    ratios, errors = [], []
    for _ in range(2000):
        tokens = rng.integers(5, 50, 40)
        nats = rng.gamma(4.0, 0.5, 40) * tokens
        result = Perplexity([Estimate(-x, 0.0, 1, 1) for x in nats], tokens.tolist())
        ratios.append(result.nats_per_token)
        errors.append(result.stderr / tokens.sum())
    assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.06)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rolling_windows([1, 2, 3], 8, 8), "stride=8 .* 7"),
        (lambda: perplexity(None, MDM, [[1, 2], []]), "document 1 is empty"),
        (lambda: perplexity(None, MDM, [[1], [2]]), "nothing to score"),
        (lambda: perplexity(None, MDM, [[1, 2]], n_bytes=[1, 2]), r"n_bytes=\[1, 2\]"),
    ],
)
def test_a_mistake_is_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
