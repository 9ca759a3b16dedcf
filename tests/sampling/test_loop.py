"""The denoising loop, against slow numpy references, and its own invariances."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from support.oracles import Oracle
from support.tiny_sampler import ARM, MDM, PARAMS, TINY, numpy_logits
from support.tiny_sampler import PROMPTS as UNTIED

from diffusionlm.diffusion import schedules
from diffusionlm.errors import UserError
from diffusionlm.model.spec import ModelSpec
from diffusionlm.sampling import loop, programs
from diffusionlm.sampling.canvas import Canvas
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.device_settings import Settings
from diffusionlm.sampling.generate import generate
from diffusionlm.sampling.request import prepare
from diffusionlm.sampling.state import Job, initial_state
from diffusionlm.sampling.strategies import STRATEGIES

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [], [6, 5, 3, 5, 8, 9, 7]]
# One of each kind by default: by coins, with remasking, by number, by confidence, from the left.
QUICK = ("ancestral", "remdm", "low_confidence", "entropy_bound", "left_to_right")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES]


# --- against a slow reference, on unpadded rows without segments


def reference_low_confidence(params, spec: ModelSpec, prompt: list[int], length: int, steps: int) -> list[int]:
    """LLaDA's low-confidence remasking at temperature 0, one position at a time; asserts that no call is close."""
    row = list(prompt) + [spec.mask_id] * length
    masked = set(range(len(prompt), len(row)))
    for i in range(steps):
        count = length // steps + (i < length % steps)
        p = special.softmax(numpy_logits(spec, params, row), axis=-1)
        best = {j: int(np.argmax(p[j])) for j in masked}
        order = sorted(masked, key=lambda j: -p[j, best[j]])
        for j in order[:count]:
            second, first = np.sort(p[j])[-2:]
            assert first - second > 1e-4
        if 0 < count < len(order):
            assert p[order[count - 1]].max() - p[order[count]].max() > 1e-5
        for j in order[:count]:
            row[j] = best[j]
            masked.remove(j)
    assert not masked
    return row[len(prompt) :]


@pytest.mark.parametrize("length, steps", [(10, 4), (7, 10)])
def test_low_confidence_matches_the_slow_reference(length, steps):
    result = generate(PARAMS, MDM, UNTIED, SamplingConfig(length, steps, "low_confidence", 0.0))
    assert result.tokens.tolist() == [reference_low_confidence(PARAMS, MDM, p, length, steps) for p in UNTIED]
    assert result.nfe.tolist() == [min(length, steps)] * len(UNTIED)


@pytest.mark.slow
def test_shifted_models_predict_the_next_position():
    spec = dataclasses.replace(MDM, shifted=True)
    result = generate(PARAMS, spec, UNTIED, SamplingConfig(6, 6, "low_confidence", 0.0))
    assert result.tokens.tolist() == [reference_low_confidence(PARAMS, spec, prompt, 6, 6) for prompt in UNTIED]


@pytest.mark.slow
def test_autoregressive_models_complete_greedily_from_left_to_right():
    result = generate(PARAMS, ARM, UNTIED, SamplingConfig(length=6, temperature=0.0))
    for prompt, tokens in zip(UNTIED, result.tokens.tolist(), strict=True):
        row = list(prompt)
        for _ in range(6):
            future = [0] * (len(prompt) + 6 - len(row))  # what comes later has no say
            logits = numpy_logits(dataclasses.replace(ARM, shifted=False), PARAMS, row + future)[len(row) - 1]
            second, first = np.sort(logits)[-2:]
            assert first - second > 1e-3
            row.append(int(np.argmax(logits)))
        assert tokens == row[len(prompt) :]


# --- what every strategy must keep


def run_canvas(strategy: str, params=PARAMS, spec: ModelSpec = MDM, steps: int = 4, length: int = 9, frames: int = 0):
    templates = [[*prompt, *[None] * length] for prompt in PROMPTS]
    request = prepare(spec, templates, SamplingConfig(length, steps, strategy))
    return request.inputs.canvas, programs.run(params, request.inputs, request.structure, frames=frames)[0]


@pytest.mark.parametrize("strategy", EVERY)
def test_prompt_and_padding_stay_and_no_mask_is_left(strategy):
    canvas, result = run_canvas(strategy)
    tokens = np.asarray(result.tokens_BxT)
    assert (tokens[~canvas.masked_BxT] == canvas.tokens_BxT[~canvas.masked_BxT]).all()
    assert (tokens[canvas.masked_BxT] < TINY.vocab_size).all()
    assert canvas.masked_BxT.sum(-1).tolist() == [9] * len(PROMPTS)
    assert canvas.segment_ids_BxT.sum(-1).tolist() == [len(prompt) + 9 for prompt in PROMPTS]


@pytest.mark.parametrize("strategy", EVERY)
def test_suppressed_ids_and_padding_rows_never_appear(strategy):
    spec = dataclasses.replace(MDM, suppressed_ids=(7, 11))
    loud = jnp.zeros(TINY.padded_vocab_size).at[jnp.array([7, 11, 51, 127])].set(1.0)
    params = {**PARAMS, "head": PARAMS["head"] * (1 + 50 * loud[None])}
    logits = [numpy_logits(dataclasses.replace(spec, suppressed_ids=()), params, [3, 1, 50, 50])[2:]]
    assert np.isin(np.argmax(logits, -1), (7, 11)).any()  # it would, if it might
    tokens = generate(params, spec, PROMPTS, SamplingConfig(20, 5, strategy)).tokens
    assert not np.isin(tokens, (7, 11)).any() and tokens.max() < TINY.vocab_size


@pytest.mark.slow
def test_a_drawn_token_that_equals_the_mask_id_is_not_masked():
    """LLaDA's mask is an ordinary id that nothing suppresses; a canvas must not take such a token for a hole."""

    def always_one(tokens_BxT, segment_ids_BxT, masked_BxT):
        return jnp.broadcast_to(jnp.array([0.0, 9.0, 0.0]), (*tokens_BxT.shape, 3))

    ones = jnp.ones((2, 6), jnp.int32)
    canvas = Canvas(ones, ones > 0, ones, 0 * ones, jnp.arange(2, dtype=jnp.int32))
    sampling = SamplingConfig(length=8, strategy="low_confidence", temperature=0.0)
    settings = Settings.from_config(sampling.resolve(autoregressive=False))
    job = Job(Oracle(always_one, 3), schedules.Linear(), jnp.zeros(3, bool), canvas, jax.random.key(0), settings)
    result = jax.jit(lambda: loop.denoise(job, initial_state(canvas)))()
    assert (np.asarray(result.tokens_BxT) == 1).all() and result.nfe_B.tolist() == [6, 6]


@pytest.mark.slow
def test_trace_records_every_state():
    canvas, result = run_canvas("low_confidence", length=10, steps=4, frames=16)
    tokens, masked, confidence = (np.asarray(states)[: int(result.index) + 1] for states in result.trace)
    assert len(tokens) == 5
    assert masked.sum(-1)[:, 0].tolist() == [10, 7, 4, 2, 0]
    assert (tokens[0] == canvas.tokens_BxT).all() and (tokens[-1] == np.asarray(result.tokens_BxT)).all()
    assert (tokens[masked] == MDM.mask_id).all() and not (tokens[~masked] == MDM.mask_id).any()
    assert ((confidence > 0) == (canvas.masked_BxT[None] & ~masked)).all() and confidence.max() <= 1
    for before, after in itertools.pairwise(range(5)):
        assert not (masked[after] & ~masked[before]).any()
        assert (tokens[after] == tokens[before])[~masked[before]].all()


@pytest.mark.slow
def test_trace_changes_nothing_and_covers_the_new_tokens():
    sampling = SamplingConfig(9, 12, "ancestral")
    plain, traced = (generate(PARAMS, MDM, PROMPTS, sampling, trace=trace) for trace in (False, True))
    assert plain.trace is None and (plain.tokens == traced.tokens).all()
    assert traced.trace.tokens.shape == traced.trace.masked.shape == (13, len(PROMPTS), 9)
    changes = (traced.trace.tokens[1:] != traced.trace.tokens[:-1]).any(-1).sum(0)
    assert (traced.nfe == changes).all() and (changes < 12).all()  # nothing new, nothing to compute
    assert traced.trace.masked[0].all() and (traced.trace.tokens[-1] == traced.tokens).all()


# --- invariance


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batch_mates_do_not_change_a_row(strategy):
    sampling = SamplingConfig(16, 12, strategy)
    mates = generate(PARAMS, MDM, PROMPTS, sampling, trace=True)
    others = generate(PARAMS, MDM, [PROMPTS[0], [4] * 30, [8], [2, 2]], sampling, trace=True)
    frames = min(len(mates.trace.tokens), len(others.trace.tokens))
    assert (mates.trace.tokens[:frames, 0] == others.trace.tokens[:frames, 0]).all()
    assert (mates.tokens[0] == others.tokens[0]).all() and mates.nfe[0] == others.nfe[0]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", EVERY)
def test_rows_follow_their_ids_permuted_or_on_another_canvas(strategy):
    sampling = SamplingConfig(12, 6, strategy)
    together = generate(PARAMS, MDM, PROMPTS, sampling)
    order = [2, 0, 3, 1]
    permuted = generate(PARAMS, MDM, [PROMPTS[r] for r in order], sampling, row_ids=order)
    assert (permuted.tokens == together.tokens[order]).all()
    other = generate(PARAMS, MDM, [PROMPTS[1], [1] * 90], sampling, row_ids=[1, 9])
    assert (other.tokens[0] == together.tokens[1]).all()


def test_seeds_keys_and_rows_differ():
    sampling = SamplingConfig(16, 8, "ancestral", seed=1)
    result = generate(PARAMS, MDM, [[3]] * 4, sampling)
    assert (result.tokens[0] != result.tokens[1]).any()
    assert (generate(PARAMS, MDM, [[3]] * 4, sampling, jax.random.key(1)).tokens == result.tokens).all()
    assert (generate(PARAMS, MDM, [[3]] * 4, sampling, jax.random.key(2)).tokens != result.tokens).any()


# --- settings and mistakes


def test_more_steps_than_tokens_stop_when_all_is_revealed():
    _, result = run_canvas("low_confidence", steps=9, length=4)
    assert int(result.index) == 4 and result.nfe_B.tolist() == [4] * 4
    assert generate(PARAMS, MDM, PROMPTS, SamplingConfig(4, 9, "ancestral")).nfe.max() <= 9


def test_nan_logits_are_an_error_and_name_the_prompt():
    embed = PARAMS["embed"].at[9].set(jnp.nan)
    with pytest.raises(UserError, match="NaN logits for prompt 1"):
        generate({**PARAMS, "embed": embed}, dataclasses.replace(MDM, suppressed_ids=(9,)), PROMPTS, SamplingConfig(4))
