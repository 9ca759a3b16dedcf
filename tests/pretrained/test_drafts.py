"""Gaps and pinned words that are watched while they are filled."""

import numpy as np
import pytest

from diffusionlm.errors import UserError
from diffusionlm.sampling.config import SamplingConfig

SAMPLING = SamplingConfig(length=12, strategy="low_confidence", temperature=0.7, seed=3)


@pytest.mark.slow
def test_the_last_state_of_gaps_is_what_infill_returns(model):
    text = "a{mask:3} b{mask:2}"
    (expected,) = model.infill(text, SAMPLING, trace=True)
    drafts = [*model.stream_infill(text, SAMPLING)]
    assert (drafts[-1].text, drafts[-1].tokens) == (expected.text, expected.tokens)
    trace = expected.trace
    for i, draft in enumerate(drafts[: len(trace.tokens)]):
        assert draft.masked == trace.masked[i].tolist() and draft.tokens == trace.tokens[i].tolist()
        np.testing.assert_allclose(draft.confidence, trace.confidence[i], rtol=1e-5)
    assert [draft.text[0] for draft in drafts] == ["a"] * len(drafts)


@pytest.mark.slow
def test_a_completion_says_how_sure_each_token_was(model):
    (expected,) = model.generate("a", SAMPLING, trace=True)
    last = [*model.stream("a", SAMPLING)][-1]
    np.testing.assert_allclose(last.confidence, expected.trace.confidence[-1], rtol=1e-5)


def test_pinned_texts_are_given(model):
    drafts = [*model.stream("a", SAMPLING, pinned={2: "xyz", 11: "!"})]
    for draft in drafts:
        assert bytes(draft.tokens[2:5]) == b"xyz" and draft.tokens[11] == ord("!")
    assert sum(drafts[0].masked) == 8 and not any(drafts[-1].masked)
    assert [*model.stream("a", SAMPLING, pinned={})] == [*model.stream("a", SAMPLING)]


@pytest.mark.parametrize(
    "pinned, parts",
    [
        ({10: "xyz"}, ["'xyz'", "3 tokens", "position 10", "0 to 11"]),
        ({-1: "x"}, ["position -1"]),
        ({0: ""}, ["''", "at least one token"]),
        ({0: "abc", 2: "d"}, ["'d'", "position 2", "lies on"]),
    ],
)
def test_a_pinned_text_without_a_place_is_refused(model, pinned, parts):
    with pytest.raises(UserError) as caught:
        next(model.stream("a", SAMPLING, pinned=pinned))
    assert all(part in str(caught.value) for part in parts)


def test_gaps_of_several_lengths_cannot_be_watched(model):
    with pytest.raises(UserError, match="several lengths.*infill"):
        next(model.stream_infill("a{mask:2-3}"))
    with pytest.raises(UserError, match="no gap"):
        model.stream_infill("a")
