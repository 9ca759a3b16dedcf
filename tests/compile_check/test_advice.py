"""The ledger of memory, and the changes that it advises."""

import dataclasses

import pytest

import diffusionlm as dlm
from diffusionlm import flops, hardware
from diffusionlm.compile_check import advice
from diffusionlm.config import MeshConfig
from diffusionlm.hardware import GIB


def test_advice_is_below_the_limit_and_changes_what_it_says():
    cfg, where = dlm.experiment("llada_8b", {"run.microbatches": 1}), hardware.parse("v5e-256")
    fixes = advice.fixes(cfg, where, 26.6 * GIB)
    assert [fix.change for fix in fixes] == ["--run.microbatches 5"]  # 5 rows a device, and there is no larger slice
    assert all(fix.bytes <= where.chip.hbm_bytes for fix in fixes)
    plain = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat="none"))
    assert advice.ledger(plain, 256) > 4 * advice.ledger(cfg, 256)
    assert not advice.fixes(cfg, where, 1e6 * GIB)


def test_the_ledger_counts_the_state_as_the_ledger_of_flops():
    cfg = dlm.experiment("llada_8b", {"run.microbatches": 5})
    small = dataclasses.replace(cfg, mesh=MeshConfig(data=256, fsdp=1))
    state = flops.memory(cfg.model, cfg.optim)
    # Everything else is the same on both meshes.
    assert advice.ledger(small, 256) - advice.ledger(cfg, 256) == pytest.approx(
        (1 - 1 / 256) * (state.total + state.gradients), rel=1e-6
    )
