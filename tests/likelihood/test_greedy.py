"""Greedy decoding of targets, against one row at a time."""

import dataclasses

import jax
import numpy as np
import pytest
from support.tiny_likelihood import ARM, MASK, MDM, PREFIX, TINY, log_probabilities, next_token, params_of

from diffusionlm.errors import UserError
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.greedy import is_greedy


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


def greedy(prefix, n, spec=MDM, guidance=0.0):
    """The reveals (place, token) of greedy decoding in order, one row at a time; asserts that no two are close."""
    if spec.autoregressive:
        tokens = list(prefix)
        for _ in range(n):
            log_p_V = next_token(tokens)
            assert np.diff(np.sort(log_p_V)[-2:]) > 1e-4
            tokens.append(int(log_p_V.argmax()))
        return list(enumerate(tokens[len(prefix) :]))
    row, remaining, reveals = [*prefix, *[MASK] * n], set(range(n)), []
    while remaining:
        log_p_nxV = log_probabilities(MDM, [row], guidance, len(prefix))[0, len(prefix) :]
        best = {k: log_p_nxV[k].max() for k in remaining}
        first, *others = sorted(remaining, key=best.get, reverse=True)
        assert np.diff(np.sort(log_p_nxV[first])[-2:]) > 1e-4 and (not others or best[first] - best[others[0]] > 1e-4)
        token = int(log_p_nxV[first].argmax())
        row[len(prefix) + first] = token
        remaining.remove(first)
        reveals.append((first, token))
    return reveals


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec, guidance",
    [
        pytest.param(MDM, 0.0, id="mdm", marks=pytest.mark.slow),
        pytest.param(MDM, 0.7, id="guided"),
        pytest.param(ARM, 0.0, id="arm"),
    ],
)
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
    result = is_greedy(params_of(spec), spec, pairs, LikelihoodConfig(guidance=guidance, rows=16))
    assert result == expected
    if spec is MDM:  # not from left to right, and not all at once
        assert any(order != sorted(order) for order in orders) and changed


def test_is_greedy_in_chunks_of_the_vocabulary_projection():
    pairs = [(prefix, [token for _, token in sorted(greedy(prefix, 7))]) for prefix in ([9, 2], [11, 24])]
    pairs.insert(1, (PREFIX, [1, 2, 3, 4, 5, 6, 7]))
    spec = dataclasses.replace(MDM, model=dataclasses.replace(TINY, head_chunk=7))
    assert is_greedy(params_of(MDM), spec, pairs, LikelihoodConfig(rows=3)) == [True, False, True]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: is_greedy(None, MDM, [(PREFIX, [])]), "target 0 is empty"),
        (lambda: is_greedy(None, ARM, [(PREFIX, [1])], LikelihoodConfig(guidance=1.0)), "guidance=1.0"),
        (lambda: is_greedy(None, MDM, [(PREFIX, [1])], LikelihoodConfig(rows=0)), "rows=0"),
    ],
)
def test_a_mistake_is_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
