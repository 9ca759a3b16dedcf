"""Blocks, infilling, guidance, the end of text and streaming, against a slow reference of LLaDA's `generate`."""

import dataclasses
import functools

import numpy as np
import pytest
from scipy import special
from support.tiny_sampler import MASK, MDM, PARAMS, PROMPTS, TINY, numpy_logits

from diffusionlm.sampling.canvas import Span
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate, infill, stream

EOS = 36  # a token that this model likes
SPEC = dataclasses.replace(MDM, eos_ids=(EOS,))


@functools.cache
def params(eos_bias: float = 0.0):
    return {**PARAMS, "head": PARAMS["head"].at[:, EOS].multiply(1 + eos_bias)}


def token_logits(weights, row):
    """Float64 logits (T, vocab_size) of one unpadded row by itself."""
    return numpy_logits(SPEC, weights, row)[:, : TINY.vocab_size]


def llada(params, prompt, length, steps, block_length, cfg_scale=0.0, eos_inf=False, eos_last=False, ends=(EOS,)):
    """LLaDA's `generate` for one row at temperature 0, from its description; asserts that no choice is close.

    With eos_last, tokens predicted as EOS have no confidence, as the paper has it (the code also takes EOS out of the
    softmax of all others).
    """
    x = list(prompt) + [MASK] * length
    blocks = -(-length // block_length)
    for block in range(blocks):
        first = len(prompt) + block * block_length
        end = min(first + block_length, len(x))
        S = steps // blocks + (block < steps % blocks)
        N = end - first
        for i in range(S):
            if MASK not in x[first:end]:
                break
            mixed = token_logits(params, x)
            if cfg_scale:
                without = token_logits(params, [MASK] * len(prompt) + x[len(prompt) :])
                mixed = without + (cfg_scale + 1) * (mixed - without)
            if eos_inf:
                mixed[:, list(ends)] = -np.inf
            p = special.softmax(mixed, -1)
            masked = [j for j in range(first, end) if x[j] == MASK]
            best = {j: int(np.argmax(p[j])) for j in masked}
            score = {j: 0.0 if eos_last and best[j] in ends else p[j, best[j]] for j in masked}
            order = sorted(masked, key=lambda j: (-score[j], j))
            count = N // S + (i < N % S)
            for j in order[:count]:
                top = np.sort(p[j])
                assert top[-1] - top[-2] > 1e-4
            if 0 < count < len(order):
                a, b = score[order[count - 1]], score[order[count]]
                assert a - b > 1e-6 or a == b == 0.0
            for j in order[:count]:
                x[j] = best[j]
    assert MASK not in x
    return x[len(prompt) :]


def generate_confident(weights, spec=SPEC, **settings):
    sampling = SamplingConfig(strategy="low_confidence", temperature=0.0, stop_at_eos=False, **settings)
    return generate(weights, spec, PROMPTS, sampling)


@pytest.mark.parametrize(
    "length, steps, block_length, guidance",
    [(10, 6, 4, 0.8)]
    + [
        pytest.param(*setting, marks=pytest.mark.slow)
        for setting in (
            (12, 12, 4, 0.0),
            (8, 16, 4, 0.0),
            (9, 9, 1, 0.8),
            (12, 12, 12, 0.0),
            (12, 6, 6, 0.0),
            (12, 12, 12, 0.8),
            (12, 6, 6, 0.8),
            (12, 12, 4, 0.8),
        )
    ],
)
def test_blocks_and_guidance_match_the_slow_reference(length, steps, block_length, guidance):
    settings = {"length": length, "steps": steps, "block_length": block_length, "guidance": guidance}
    result = generate_confident(params(), MDM, **settings)
    expected = [llada(params(), p, length, steps, block_length, guidance) for p in PROMPTS]
    assert result.tokens.tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["none", "inf", "last"])
def test_the_rules_of_the_end_of_text_match_the_slow_reference(rule):
    weights = params(0.05)
    settings = {"none": {}, "inf": {"eos_penalty": float("inf")}, "last": {"eos_last": True}}[rule]
    result = generate_confident(weights, length=12, steps=6, block_length=6, **settings)
    expected = [llada(weights, p, 12, 6, 6, eos_inf=rule == "inf", eos_last=rule == "last") for p in PROMPTS]
    assert result.tokens.tolist() == expected
    assert (np.array(expected) == EOS).any() == (rule != "inf")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["inf", "last"])
def test_the_rules_are_of_every_end_of_text(rule):
    """As in LLaDA's Instruct evaluations, which take the end of a turn and that of the text alike."""
    weights, plain = params(0.05), generate_confident(params(0.05), length=12, steps=6, block_length=6).tokens
    turn = int(np.bincount(plain[plain != EOS]).argmax())  # the end of a turn: a token that this model likes too
    spec = dataclasses.replace(SPEC, eos_ids=(EOS, turn))
    settings = {"inf": {"eos_penalty": float("inf")}, "last": {"eos_last": True}}[rule]
    sampling = SamplingConfig(12, 6, "low_confidence", 0.0, block_length=6, stop_at_eos=False, **settings)
    flags = {"inf": {"eos_inf": True}, "last": {"eos_last": True}}[rule]
    expected = [llada(weights, p, 12, 6, 6, ends=(EOS, turn), **flags) for p in PROMPTS]
    assert generate(weights, spec, PROMPTS, sampling).tokens.tolist() == expected
    assert expected != [llada(weights, p, 12, 6, 6, **flags) for p in PROMPTS]


def dream(params, prompt, length, steps, alg, top_p, top_k):
    """Dream's `diffusion_generate` for one row at temperature 0, from its description, on the alignment of LLaDA.

    Its `sample_tokens` keeps the likeliest tokens until their share exceeds top_p, of these the top_k, and judges by
    what is left.
    """
    x = list(prompt) + [MASK] * length
    times = np.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        masked = [j for j in range(len(x)) if x[j] == MASK]
        if not masked:
            break
        logits = token_logits(params, x)
        best, score = {}, {}
        for j in masked:
            order = np.argsort(-logits[j])
            share = np.cumsum(special.softmax(logits[j])[order])
            kept = order[: min(int((share <= top_p).sum()) + 1, top_k)]
            p = np.sort(special.softmax(logits[j][kept]))[::-1]
            best[j] = int(order[0])
            second = p[1] if len(p) > 1 else 0.0
            score[j] = {"low_confidence": p[0], "margin": p[0] - second, "entropy": (p * np.log(p)).sum()}[alg]
        count = len(masked) if i == steps - 1 else int(len(masked) * (1 - times[i + 1] / times[i]))
        for j in sorted(masked, key=lambda j: (-score[j], j))[:count]:
            x[j] = best[j]
    return x[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("alg", ["low_confidence", "margin", "entropy"])
def test_confidences_of_what_is_drawn_match_the_slow_reference_of_dream(alg):
    settings = {"top_p": 0.9, "top_k": 3, "strategy": alg, "temperature": 0.0, "transfer_until": 1e-3}
    sampling = SamplingConfig(12, 8, stop_at_eos=False, confidence="drawn", **settings)
    tokens = generate(params(), MDM, PROMPTS, sampling).tokens.tolist()
    assert tokens == [dream(params(), prompt, 12, 8, alg, 0.9, 3) for prompt in PROMPTS]
    uncut = generate(params(), MDM, PROMPTS, dataclasses.replace(sampling, confidence="model")).tokens.tolist()
    assert tokens != uncut  # the cuts change the order


@pytest.mark.slow
def test_blocks_are_filled_from_left_to_right():
    result = generate(params(), MDM, PROMPTS, SamplingConfig(10, 10, block_length=4, stop_at_eos=False), trace=True)
    masked = result.trace.masked
    for frame in masked:
        for row in frame:
            sizes = [4, 4, 2]
            counts = [row[a : a + 4].sum() for a in (0, 4, 8)]
            for i in (0, 1):
                assert counts[i] == 0 or counts[i + 1] == sizes[i + 1]
    assert not masked[-1].any()


def test_standard_guidance_leads_away_from_the_text_without_its_prompt():
    """One step at temperature 0: raw logits l_u + (1 + w)(l_c - l_u), u the gap alone."""
    w = 1.5
    result = generate(
        params(), MDM, PROMPTS, SamplingConfig(7, 1, temperature=0.0, guidance=w, guidance_kind="standard")
    ).tokens
    alone = token_logits(params(), [MASK] * 7)
    for prompt, row in zip(PROMPTS, result, strict=True):
        conditional = token_logits(params(), [*prompt, *[MASK] * 7])[len(prompt) :]
        mixed = alone + (1 + w) * (conditional - alone)
        top = np.sort(mixed, -1)
        assert (top[:, -1] - top[:, -2]).min() > 1e-3
        assert row.tolist() == mixed.argmax(-1).tolist()


@pytest.mark.slow
def test_a_growing_context_sees_nothing_of_later_blocks():
    """The first block comes out as if it were the whole length."""
    settings = {"strategy": "low_confidence", "temperature": 0.0, "stop_at_eos": False}
    short = generate(params(), MDM, PROMPTS, SamplingConfig(4, 4, **settings)).tokens
    growing = generate(params(), MDM, PROMPTS, SamplingConfig(12, 12, block_length=4, growing=True, **settings)).tokens
    whole = generate(params(), MDM, PROMPTS, SamplingConfig(12, 12, block_length=4, **settings)).tokens
    np.testing.assert_array_equal(growing[:, :4], short)
    assert (whole[:, :4] != short).any()
    second = generate(
        params(), MDM, [p + t for p, t in zip(PROMPTS, short.tolist(), strict=True)], SamplingConfig(4, 4, **settings)
    )
    np.testing.assert_array_equal(growing[:, 4:8], second.tokens)


def test_a_row_stops_at_its_end_of_text_and_needs_fewer_passes():
    weights = params()
    settings = {"strategy": "low_confidence", "temperature": 0.0, "block_length": 2}
    full = generate(weights, SPEC, PROMPTS, SamplingConfig(16, 16, stop_at_eos=False, **settings))
    stopped = generate(weights, SPEC, PROMPTS, SamplingConfig(16, 16, **settings))
    ended = 0
    for r, (a, b) in enumerate(zip(full.tokens.tolist(), stopped.tokens.tolist(), strict=True)):
        end = b.index(EOS) if EOS in b else 16
        assert a[:end] == b[:end] and set(b[end:]) <= {EOS}
        if end < 14:
            ended += 1
            assert stopped.nfe[r] < full.nfe[r]
    assert ended


@pytest.mark.parametrize("strategy", ["ancestral", "remdm", "low_confidence", "confidence_threshold"])
def test_batch_mates_and_their_blocks_do_not_change_a_row(strategy):
    sampling = SamplingConfig(12, 9, strategy=strategy, block_length=5, threshold=0.3, remask=0.3, guidance=0.5)
    together = generate(params(0.5), MDM, PROMPTS, sampling)
    for r, prompt in enumerate(PROMPTS):
        mates = [[r + 1] * 3, prompt, [2], [5, 5]]
        again = generate(params(0.5), MDM, mates, sampling, row_ids=[50, r, 51, 52])
        np.testing.assert_array_equal(again.tokens[1], together.tokens[r])
        assert again.nfe[1] == together.nfe[r]


@pytest.mark.slow
def test_stream_goes_through_the_states_of_generate():
    sampling = SamplingConfig(9, 9, block_length=4, strategy="entropy")
    whole = generate(params(), MDM, PROMPTS, sampling, trace=True)
    frames = list(stream(params(), MDM, PROMPTS, sampling))
    assert [frame.step for frame in frames] == list(range(len(whole.trace.tokens)))
    for k, frame in enumerate(frames):
        np.testing.assert_array_equal(frame.tokens, whole.trace.tokens[k])
        np.testing.assert_array_equal(frame.masked, whole.trace.masked[k])
        np.testing.assert_allclose(frame.confidence, whole.trace.confidence[k], rtol=1e-5)
    np.testing.assert_array_equal(frames[-1].tokens, whole.tokens)


# --- infilling


def test_infilling_keeps_what_was_given_and_fills_the_rest():
    templates = [[3, None, None, 4, None, 5], [None, 9, 2, None], [6, 6, None]]
    result = infill(params(), MDM, templates, SamplingConfig(temperature=0.0, strategy="low_confidence")).rows
    for template, row in zip(templates, result, strict=True):
        assert len(row) == len(template) and max(row) < TINY.vocab_size
        assert all(slot in (None, token) for slot, token in zip(template, row, strict=True))


def test_a_prompt_is_a_template_with_its_gap_at_the_end():
    sampling = SamplingConfig(8, 5, seed=4, stop_at_eos=False)
    rows = infill(params(), MDM, [[*p, *[None] * 8] for p in PROMPTS], sampling).rows
    expected = generate(params(), MDM, PROMPTS, sampling).tokens.tolist()
    assert [row[len(p) :] for p, row in zip(PROMPTS, rows, strict=True)] == expected


def test_a_gap_sees_both_sides():
    templates = [[3, None, 4, right] for right in (8, 30, 8, 30)]
    rows = infill(params(), MDM, templates, SamplingConfig(temperature=0.0)).rows
    assert rows[0][1] != rows[1][1] and rows[:2] == rows[2:]


@pytest.mark.slow
def test_a_span_takes_the_length_in_which_the_model_is_most_confident():
    """By the mean log-probability of its tokens when they were revealed; every length is also filled as its own row."""
    sampling = SamplingConfig(steps=8, temperature=0.0, strategy="low_confidence")
    templates = [[3, 1, Span(1, 2), 4, None, Span(2, 3), 5], [9, Span(2, 4)], [7, None]]
    filled = infill(params(), MDM, templates, sampling, trace=True)
    rows, owners = [], []
    for r, lengths in enumerate(([(a, b) for a in (1, 2) for b in (2, 3)], [(2,), (3,), (4,)], [()])):
        for combination in lengths:
            gaps = iter(combination)
            parts = ([None] * next(gaps) if isinstance(token, Span) else [token] for token in templates[r])
            rows.append([token for part in parts for token in part])
            owners.append(r)
    alone = infill(params(), MDM, rows, sampling, row_ids=owners, trace=True)
    for r in range(3):
        candidates = [b for b, owner in enumerate(owners) if owner == r]
        gap = alone.trace.masked[0]
        confidence = {b: np.log(alone.trace.confidence[-1, b][gap[b]]).mean() for b in candidates}
        best = alone.rows[max(candidates, key=lambda b: confidence[b])]
        assert filled.rows[r] == best and filled.nfe[r] == sum(alone.nfe[b] for b in candidates)
        assert filled.trace.tokens[-1, r, : len(best)].tolist() == best


@pytest.mark.slow
def test_a_span_that_ended_early_is_judged_by_what_was_revealed():
    """With an end of text as good as sure, the long filling is the better one, by its one revealed token."""
    weights = params(3.0)
    result = infill(weights, SPEC, [[9, Span(1, 4)]], SamplingConfig(temperature=0.0, block_length=1))
    sampling = SamplingConfig(temperature=0.0, block_length=1)
    trials = [infill(weights, SPEC, [[9, *[None] * n]], sampling, trace=True) for n in (1, 2, 3, 4)]
    means = []
    for trial in trials:
        confidence = trial.trace.confidence[-1, 0]
        means.append(np.log(confidence[confidence > 0]).mean())
    assert any(trial.rows[0][1] == EOS and trial.nfe[0] < len(trial.rows[0]) - 1 for trial in trials)
    assert result.rows[0] == trials[int(np.argmax(means))].rows[0]


def test_no_text_ends_in_a_gap_that_text_follows():
    """By the reference with EOS forbidden up to the last given token; in the gap after it, it may be drawn."""
    weights = params(3.0)
    sampling = SamplingConfig(temperature=0.0, strategy="left_to_right", stop_at_eos=False)
    template = [3, None, None, 4, None, 5, None, None]
    row, free = (infill(weights, spec, [template] * 4, sampling).rows[0] for spec in (SPEC, MDM))
    expected = [*template]
    for i in (1, 2, 4, 6, 7):
        logits = token_logits(weights, [MASK if token is None else token for token in expected])[i]
        logits[EOS] -= np.inf if i < 5 else 0
        expected[i] = int(logits.argmax())
    assert row == expected and EOS in row[6:]
    assert EOS in free[1:5]  # where the model does not know that EOS ends a text
