"""The compiled programs: what compiles once, rows that go on in a smaller batch, and what a program never holds."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.compilations import count_compilations
from support.random_params import make_params
from support.tiny_sampler import ARM, MDM, PARAMS, PROMPTS

from diffusionlm import memory
from diffusionlm.config import MeshConfig
from diffusionlm.errors import UserError
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.sampling import programs
from diffusionlm.sampling.canvas import Span
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate, infill, lower_request
from diffusionlm.sampling.programs import _rows_to_keep, _smaller_batch, empty_memory
from diffusionlm.sampling.request import prepare
from diffusionlm.sampling.state import initial_state
from diffusionlm.sampling.strategies import STRATEGIES

OTHERS = [[3, 1, 4, 1, 5], [9, 2], [], [6, 5, 3, 5, 8, 9, 7]]


def test_only_shapes_compile():
    generate(PARAMS, MDM, PROMPTS, SamplingConfig(10, 4, "ancestral"))
    with count_compilations() as compiled:
        jax.jit(lambda x: x * 3)(jnp.ones(7))
    assert compiled  # so the count counts
    with count_compilations() as compiled:
        for strategy in STRATEGIES:
            generate(PARAMS, MDM, OTHERS, SamplingConfig(12, 7, strategy, 0.3, seed=5))
        generate(PARAMS, MDM, PROMPTS, SamplingConfig(10, 9, "low_confidence", 0.0))
        for block_length in (3, 8):
            generate(PARAMS, MDM, PROMPTS, SamplingConfig(10, 6, block_length=block_length, growing=True))
        every = dict(top_k=5, top_p=0.9, threshold=0.5, factor=2.0, entropy_bound=0.3, remask=0.2, transfer_until=1e-3)
        for changed in every.items():
            generate(PARAMS, MDM, PROMPTS, SamplingConfig(10, 4, "margin", **dict([changed]), position_temperature=0.1))
        generate(PARAMS, MDM, PROMPTS, SamplingConfig(10, 4, eos_penalty=2.0, eos_last=True, stop_at_eos=False))
    assert not compiled


@pytest.mark.slow
def test_structure_compiles_once():
    """Guidance, and a cache of one block width; the numbers that go with them are data."""
    first = SamplingConfig(10, 4, "entropy", block_length=4, guidance=0.3, cache="dual")
    generate(PARAMS, MDM, PROMPTS, first)
    with count_compilations() as compiled:
        for changed in (
            {"guidance": 1.0, "guidance_kind": "standard"},
            {"refresh": 2},
            {"block_length": 3, "steps": 9},  # of the same bucket of widths
            {"strategy": "confidence_threshold", "threshold": 0.2},
        ):
            generate(PARAMS, MDM, PROMPTS, dataclasses.replace(first, **changed))
    assert not compiled


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [range(3, 9), pytest.param(range(1, 10), marks=pytest.mark.slow)])
def test_batches_of_one_bucket_compile_once_and_a_row_has_the_same_bits_in_each(sizes):
    """Batches of 1 to 9 are programs of 1, 2, 4, 8 and 16 rows; the rows that fill them up do nothing."""
    prompts = [[3, r, 4 * r + 1] for r in range(9)]
    sampling = SamplingConfig(8, 5, "entropy")
    compiled, results = set(), {}
    for B in sizes:
        with count_compilations() as events:
            results[B] = generate(PARAMS, MDM, prompts[:B], sampling)
        compiled |= {B} if events else set()
        assert results[B].tokens.shape == (B, 8) and results[B].nfe.tolist() == [5] * B
    # The first of its bucket, unless another test compiled that.
    assert compiled & {5, 9} and compiled <= {1, 2, 3, 5, 9}
    for B, bucket in ((3, 4), (5, 8), (6, 8), (7, 8)):
        np.testing.assert_array_equal(results[B].tokens, results[bucket].tokens[:B])
    with count_compilations() as events:
        again = [generate(PARAMS, MDM, prompts[:B], sampling).tokens for B in (sizes[-1], 7, 3)]
    assert not events
    for tokens in again:
        np.testing.assert_array_equal(tokens, results[len(tokens)].tokens)


@pytest.mark.slow
def test_ranges_of_gap_lengths_of_one_bucket_compile_once():
    """Three and four lengths are a program of four rows, and so are two gaps of two lengths each."""
    sampling = SamplingConfig(temperature=0.0)
    infill(PARAMS, MDM, [[9, Span(1, 3)]], sampling)
    with count_compilations() as events:
        for template in ([9, Span(1, 4)], [9, Span(5, 8), 3], [9, Span(1, 2), 4, Span(7, 8)]):
            filled = infill(PARAMS, MDM, [template], sampling)
            assert len(filled.rows) == len(filled.nfe) == 1
        filled = infill(PARAMS, MDM, [[9, Span(1, 3)], [4, None, 7]], sampling)
        assert len(filled.rows) == len(filled.nfe) == 2
    assert not events


@pytest.mark.slow
@pytest.mark.parametrize(
    "cache, strategy, eos_id",
    [
        pytest.param("none", "low_confidence", 2, marks=pytest.mark.slow),
        ("dual", "low_confidence", 2),
        pytest.param("causal", None, 0, marks=pytest.mark.slow),
        pytest.param("none", "ancestral", 2, marks=pytest.mark.slow),
        pytest.param("dual", "remdm", 2, marks=pytest.mark.slow),
    ],
)
def test_rows_that_go_on_in_a_smaller_batch_end_the_same(cache, strategy, eos_id):
    """Also where a step may reveal nothing, so that the row needs no pass.

    The end of text is a token that comes up early in some rows and late in others.
    """
    spec = dataclasses.replace(ARM if cache == "causal" else MDM, eos_ids=(eos_id,))
    block_length = 0 if cache == "causal" else 4
    steps = None if strategy in (None, "low_confidence") else 36
    sampling = SamplingConfig(24, steps, strategy, 0.0, block_length=block_length, cache=cache)
    prompts = [[3, k, 4 * k + 1] for k in range(7)]
    whole = generate(PARAMS, spec, prompts, sampling)
    compact = generate(PARAMS, spec, prompts, dataclasses.replace(sampling, compact=True))
    assert len(set(whole.nfe.tolist())) > 2  # rows end at different times
    np.testing.assert_array_equal(compact.tokens, whole.tokens)
    np.testing.assert_array_equal(compact.nfe, whole.nfe)


def test_a_smaller_batch_is_a_power_of_two_on_each_device():
    assert [_smaller_batch(B, 1) for B in (1, 2, 3, 4, 8, 16, 24)] == [0, 1, 2, 2, 4, 8, 16]
    assert [_smaller_batch(B, 6) for B in (6, 12, 18, 24)] == [0, 6, 12, 12]
    for ways in (1, 3, 6, 8):
        for B in range(ways, 9 * ways, ways):
            for working in range(1, _smaller_batch(B, ways) + 1):
                rows = _rows_to_keep(np.arange(B) >= B - working, ways)
                assert len(set(rows.tolist())) == len(rows) <= _smaller_batch(B, ways) < B and len(rows) % ways == 0
                assert set(range(B - working, B)) <= set(rows.tolist())


@pytest.mark.slow
def test_a_mesh_of_six_devices_gives_the_tokens_of_one():
    """Nine prompts are twelve rows, and of these six go on when few have work."""
    spec = dataclasses.replace(MDM, eos_ids=(2,))
    prompts = [[3, k, 4 * k + 1] for k in range(9)]
    sampling = SamplingConfig(24, strategy="low_confidence", temperature=0.0, block_length=4, cache="dual")
    whole = generate(PARAMS, spec, prompts, sampling)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=3), jax.devices()[:6])):
        split = generate(PARAMS, spec, prompts, dataclasses.replace(sampling, compact=True))
    np.testing.assert_array_equal(split.tokens, whole.tokens)
    np.testing.assert_array_equal(split.nfe, whole.nfe)
    assert len(set(whole.nfe.tolist())) > 2


@pytest.mark.slow
def test_logits_are_computed_for_few_positions_at_a_time():
    """The widest array over the vocabulary has 32 positions per row, of the 128 of the canvas."""

    def logit_shapes(spec, sampling):
        """Return the (rows, positions) of every float32 array over the vocabulary in the program."""
        cfg = dataclasses.replace(spec.model, vocab_size=640)
        params = jax.eval_shape(lambda: make_params(cfg))
        spec = dataclasses.replace(spec, model=cfg)
        request = prepare(spec, [[3, *[None] * 100]] * 4, sampling)
        text = lower_request(params, request).as_text()
        return {tuple(map(int, shape)) for shape in re.findall(rf"<(\d+)x(\d+)x{cfg.padded_vocab_size}xf32>", text)}

    for sampling in (SamplingConfig(guidance=0.5), SamplingConfig(cache="dual", block_length=50)):
        shapes = logit_shapes(MDM, sampling)
        assert (4, 32) in shapes and max(positions for _, positions in shapes) == 32
    assert {positions for _, positions in logit_shapes(ARM, SamplingConfig())} == {1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "frames"),
    [
        ({}, 0),
        pytest.param({"guidance": 0.5}, 0, marks=pytest.mark.slow),
        ({"cache": "dual", "block_length": 4}, 16),
        ({"cache": "dual", "guidance": 1.0}, 1),
    ],
)
def test_the_room_that_a_generation_needs_is_that_of_its_arrays(settings, frames):
    request = prepare(MDM, [[*prompt, *[None] * 10] for prompt in PROMPTS], SamplingConfig(10, 4, **settings))

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    held = jax.eval_shape(lambda: empty_memory(PARAMS, request.inputs, structure=request.structure))
    needs = programs.needs(request.inputs.canvas, request.structure, frames)
    assert needs["hidden states"] == size(held.hidden_BxTxE)
    assert needs["cache"] == size(held.cache)
    assert needs["trace"] == size(initial_state(request.inputs.canvas, frames).trace)
    program = lower_request(PARAMS, request).as_text()
    rows, V = held.hidden_BxTxE.shape[0], MDM.model.embedding_rows
    positions = {int(C) for C in re.findall(rf"tensor<{rows}x(\d+)x{MDM.model.padded_vocab_size}xf32>", program)}
    assert needs["logits"] == 4 * rows * max(positions) * V


def test_a_generation_without_room_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(memory, "host_limit", lambda: (10_000, "its control group allows"))
    monkeypatch.setattr(programs, "initial_state", None)
    for run in (generate, lambda *args: infill(*args[:2], [[1, None, 2]], args[3])):
        with pytest.raises(UserError, match=r"generating \d+ rows of \d+ tokens at a time needs at least .*parameters"):
            run(PARAMS, MDM, PROMPTS, SamplingConfig(10, 4))
