"""What a training step executes, against the matmuls of its traced program."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from support.matmul_flops import EACH, TINY, VARIANTS, matmul_flops, programs

from diffusionlm import flops
from diffusionlm.compile_check import executed_flops
from diffusionlm.model import attention_kernels


@pytest.mark.slow
@pytest.mark.parametrize("variant", EACH)
def test_counts_equal_the_matmuls_of_the_gradient(variant):
    """Every position is predicted."""
    cfg, B, T = dataclasses.replace(TINY, **VARIANTS[variant]), 2, 12
    _, gradient, args = programs(cfg, B, T)
    turns = math.ceil(B * T / cfg.head_chunk)
    executed = matmul_flops(jax.make_jaxpr(gradient)(*args).jaxpr, turns)
    assert executed == B * executed_flops.train(cfg, T, rows=B)
    wasted = cfg.lora_rank > 0 and not cfg.tied_head
    more = cfg.remat != "none" or B * T % cfg.head_chunk != 0 or wasted
    assert (executed > B * flops.train(cfg, T, "model")) == more


@pytest.mark.parametrize(("most", "chunk", "turns"), [(100, 14, 1), (10, 7, 2), (4, 4, 3)])
def test_half_of_the_positions_meet_the_vocabulary(most, chunk, turns):
    """24 tokens of which 12 are predicted, in chunks that hold 14, an eighth more than that, between them."""
    cfg, B, T = dataclasses.replace(TINY, head_chunk=most), 2, 12
    _, gradient, args = programs(cfg, B, T, share=0.5)
    executed = matmul_flops(jax.make_jaxpr(gradient)(*args).jaxpr, turns)
    assert executed == B * executed_flops.train(cfg, T, rows=B, predicted=0.5)
    head = flops.forward(cfg, T)["head"]
    assert executed - B * flops.train(cfg, T, "model", predicted=0.5) == 3 * head * (turns * chunk - 12) / T


def test_the_backward_pass_of_the_tpu_kernel_recomputes():
    """Forward: scores and values. Backward: 4 products of one kernel and 3 of the other, where the plain one has 4."""
    for remat, again in (("none", 0), ("attention", 0), ("dots", 2), ("full", 2)):
        cfg = dataclasses.replace(TINY, remat=remat)
        plain, kernel = (executed_flops.train(cfg, 128, splash=splash) for splash in (False, True))
        parts = flops.forward(cfg, 128)
        product = parts["attention_scores"]
        weights = parts["qkv"] + parts["out"] + parts["mlp"] * 2 // 3 if remat in ("attention", "full") else 0
        chunks = math.ceil(128 / 24) * math.ceil(128 / math.ceil(128 / 24)) - 128  # what the last chunk has too many
        beyond = 3 * parts["head"] * chunks // 128
        assert kernel == flops.train(cfg, 128, "model") + (3 + again) * product + weights + beyond
        assert kernel - plain == (2 if remat == "attention" else 3) * product
        assert executed_flops.splash_kernels(cfg, 128) == (9 + again) * product


def test_the_tpu_kernel_skips_tiles_behind_the_mask():
    """A causal model takes 10 of 4 x 4 tiles of 512; at 640, five tiles of 128 a side, it takes 15 of 25."""
    for length, part in ((2048, 10 / 16), (640, 15 / 25), (512, 1)):
        causal = dataclasses.replace(TINY, causal=True)
        assert executed_flops.splash_kernels(causal, length) == pytest.approx(
            part * executed_flops.splash_kernels(TINY, length)
        )
        saved = (1 - part) * executed_flops.splash_kernels(TINY, length)
        full, less = (executed_flops.train(cfg, length, splash=True) for cfg in (TINY, causal))
        assert full - less == pytest.approx(saved)


def test_plain_products_of_a_windowed_model_compute_all_scores():
    cfg, B, T = dataclasses.replace(TINY, causal=True, mask_row=False, sliding_window=5), 2, 12
    _, gradient, args = programs(cfg, B, T)
    executed = matmul_flops(jax.make_jaxpr(gradient)(*args).jaxpr, math.ceil(B * T / cfg.head_chunk))
    assert executed == B * executed_flops.train(cfg, T, rows=B)


@pytest.mark.parametrize("window", [0, 1, 2, 128, 129, 130, 500, 513, 514, 1025, 1026, 4000])
@pytest.mark.parametrize("length", [128, 640, 2048])
def test_the_tpu_kernel_computes_the_tiles_that_its_mask_touches(length, window):
    cfg = dataclasses.replace(TINY, causal=True, sliding_window=window)
    mask = np.asarray(attention_kernels._static_mask(length, True, 1, window)[:, :])
    size = attention_kernels.splash_tile(length)
    touched = mask.reshape(length // size, size, length // size, size).any((1, 3))
    assert executed_flops.splash_tiles(cfg, length) == touched.sum()
    whole = flops.forward(dataclasses.replace(cfg, sliding_window=0), length)
    share = touched.mean()
    assert executed_flops.splash_forward(cfg, length) == pytest.approx(2 * share * whole["attention_scores"])
