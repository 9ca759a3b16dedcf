"""The canvas: blocks, buckets, and templates that a model cannot fill."""

import dataclasses

import jax
import pytest
from support.tiny_sampler import ARM, MASK, MDM, PARAMS, PROMPTS

from diffusionlm.config import MeshConfig
from diffusionlm.errors import UserError
from diffusionlm.parallel.mesh import make_mesh, rows_per_device
from diffusionlm.sampling.canvas import Span, bucket_size, build_canvas, padded_rows
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate, infill

SHIFTED = dataclasses.replace(MDM, shifted=True)


def test_blocks_run_through_all_gaps():
    """Five places in three gaps, two a block; the given tokens belong to none."""
    template = [3, None, 4, None, None, 8, None, None]
    canvas = build_canvas(MDM, [template], 2, [0])
    assert canvas.block_BxT[0, :8].tolist() == [-1, 0, -1, 0, 1, -1, 1, 2]
    assert (canvas.block_BxT[0, 8:] == -1).all()


def test_batches_are_padded_to_a_bucket_with_rows_that_have_nothing_to_do():
    assert [bucket_size(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33)] == [1, 2, 4, 4, 8, 8, 16, 16, 24, 40]
    canvas = build_canvas(MDM, [[3, None]] * 3, 0, [7, 8, 9])
    assert {len(x) for x in canvas} == {4} and canvas.row_ids_B[:3].tolist() == [7, 8, 9]
    assert not canvas.masked_BxT[3].any() and not canvas.segment_ids_BxT[3].any() and (canvas.block_BxT[3] == -1).all()


def test_on_a_mesh_every_batch_is_split_over_its_devices():
    """As few rows as a multiple of the devices allows, and without a mesh the bucket."""
    counts = (1, 5, 6, 7, 12, 13, 16, 18, 24, 33)
    assert [padded_rows(n, 1) for n in counts] == [bucket_size(n) for n in counts]
    assert [padded_rows(n, 6) for n in counts] == [6, 6, 6, 12, 12, 18, 18, 24, 24, 42]
    assert [padded_rows(n, 12) for n in counts] == [12, 12, 12, 12, 12, 24, 24, 24, 24, 48]
    assert [padded_rows(n, 8) for n in counts] == [8, 8, 8, 8, 16, 16, 16, 24, 24, 40]
    for n in range(1, 200):
        for ways in (2, 3, 6, 8, 12, 32):
            assert padded_rows(n, ways) >= n and padded_rows(n, ways) % ways == 0
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=3), jax.devices()[:6])):
        for count, B in ((1, 6), (6, 6), (7, 12), (12, 12)):
            canvas = build_canvas(MDM, [[3, None]] * count, 0, range(count))
            assert {len(x) for x in canvas} == {B} and rows_per_device(B) == B // 6


@pytest.mark.parametrize(
    "templates, cfg, words",
    [
        ([[1, 2]], MDM, ["row 0", "nothing to generate"]),
        ([], MDM, ["no prompts"]),
        ([[1, None, 2]], ARM, ["row 0", "after a gap"]),
        ([[None, 2]], SHIFTED, ["prompt 0 is empty", "BOS"]),
        ([[MASK, None]], MDM, ["mask token"]),
        ([[None] * 129], MDM, ["context of 128"]),
        ([[1] + [None] * 127 + [1]], MDM, ["row 0", "129 tokens with its gaps", "context of 128"]),
        ([[2, Span(1, 9), 3, Span(1, 8)]], MDM, ["row 0", "72 combinations", "64", "narrow"]),
        ([[2, Span(1, 9)], [1, 2]], MDM, ["row 1", "nothing to generate"]),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(templates, cfg, words):
    with pytest.raises(UserError) as error:
        infill(PARAMS, cfg, templates, SamplingConfig())
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "cfg, prompts, settings, words",
    [
        (MDM, [], {}, ["no prompts"]),
        (MDM, [[1], [1] * 100], dict(length=40), ["prompt 1", "100", "length=40", "128"]),
        (MDM, [[1, 50]], {}, ["prompt 0", "mask token (id 50)"]),
        (MDM, [[1, 51]], {}, ["prompt 0", "[0, 50)"]),
        (MDM, [[-1]], {}, ["prompt 0", "[0, 50)"]),
        (ARM, [[1], []], {}, ["prompt 1", "empty"]),
        (SHIFTED, PROMPTS, dict(guidance_kind="standard", guidance=1.0), ["unsupervised"]),
    ],
)
def test_prompts_that_do_not_fit_the_model_are_refused(cfg, prompts, settings, words):
    with pytest.raises(UserError) as error:
        generate(PARAMS, cfg, prompts, SamplingConfig(**settings))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("row_ids", [[0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 2**31]])
def test_row_ids_that_do_not_fit_are_refused(row_ids):
    for call, rows in ((generate, PROMPTS), (infill, [[*p, None] for p in PROMPTS])):
        with pytest.raises(UserError, match="row_ids"):
            call(PARAMS, MDM, rows, SamplingConfig(4), row_ids=row_ids)
