"""Kernels in HLO text: FLOPs and HBM traffic, against counts by hand."""

import pytest
from support.hlo_modules import computation, entry, module

from diffusionlm.compile_check import hlo

DILATED = "window={size=32 stride=31 lhs_dilate=32}, dim_labels=0bf_0oi->0bf"


PADDED = "window={size=32 pad=31_31 rhs_reversal=1}, dim_labels=bf0_0oi->b0f"


@pytest.mark.parametrize(
    "left, right, result, attributes, flops",
    [
        ("4,8", "8,16", "4,16", "dim_labels=bf_io->bf", 2 * 4 * 8 * 16),
        ("4,8", "4,16", "8,16", "dim_labels=fb_io->bf", 2 * 4 * 8 * 16),
        # 32 heads as a batch, which the backend writes as a dilated window
        (
            "32,4,8",
            "32,16,8",
            "32,4,16",
            DILATED,
            32 * 1024,
        ),
        # a weight with 32 heads, as a padded window
        (
            "4,8,1",
            "32,16,8",
            "4,32,16",
            PADDED,
            32 * 1024,
        ),
    ],
)
def test_matmuls_as_the_backend_writes_them(left, right, result, attributes, flops):
    lines = [
        f"%a = bf16[{left}]{{0}} parameter(0)",
        f"%b = bf16[{right}]{{0}} parameter(1)",
        f"ROOT %c = f32[{result}]{{0}} convolution(%a, %b), {attributes}",
    ]
    (kernel,) = hlo.analyse(module(entry(*lines))).kernels
    assert kernel.flops == flops


def test_traffic_is_what_leaves_or_reaches_hbm():
    lines = [
        "%a = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)",
        "%b = f32[16,8]{1,0:T(8,128)S(1)} negate(%a)",  # 256 bytes read, and kept on the chip
        "ROOT %c = f32[16,8]{1,0:T(8,128)} negate(%b)",  # 512 bytes written
    ]
    assert [kernel.hbm_bytes for kernel in hlo.analyse(module(entry(*lines))).kernels] == [256, 512]


def test_a_slice_moves_only_the_slice():
    layers = "f32[32,4,8]{2,1,0}"
    read = computation(
        "read",
        f"%s = {layers} parameter(0)",
        "%i = s32[] parameter(1)",
        "%d = f32[1,4,8]{2,1,0} dynamic-slice(%s, %i, %i, %i), dynamic_slice_sizes={1,4,8}",
        "ROOT %n = f32[1,4,8]{2,1,0} negate(%d)",
    )
    write = computation(
        "write",
        f"%s = {layers} parameter(0)",
        "%u = f32[1,4,8]{2,1,0} parameter(1)",
        "%i = s32[] parameter(2)",
        f"ROOT %d = {layers} dynamic-update-slice(%s, %u, %i, %i, %i)",
    )
    lines = [
        f"%s = {layers} parameter(0)",
        "%i = s32[]{:S(6)} parameter(1)",
        "%r = f32[1,4,8]{2,1,0} fusion(%s, %i), kind=kLoop, calls=%read",
        f"ROOT %w = {layers} fusion(%s, %r, %i), kind=kLoop, calls=%write",
    ]
    assert [kernel.hbm_bytes for kernel in hlo.analyse(module(read, write, entry(*lines))).kernels] == [256, 256]
