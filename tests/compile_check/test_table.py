"""The verdict of a compile report."""

import dataclasses

from diffusionlm.compile_check import advice
from diffusionlm.compile_check.memory import Hbm
from diffusionlm.compile_check.report import CompileReport
from diffusionlm.compile_check.table import verdict
from diffusionlm.hardware import GIB


def test_the_verdict_names_the_shortfall_and_the_fixes_in_one_line():
    hbm = Hbm(limit=16 * GIB, params=GIB, optimizer=2 * GIB, temporary=20 * GIB, peak=23 * GIB)
    empty = dict.fromkeys(field.name for field in dataclasses.fields(CompileReport))
    facts = {"experiment": "x", "program": "train", "topology": "v5e-8", "slices": 2, "fits": False}
    fixes = (advice.Fix("--run.microbatches 2", 12 * GIB),)
    line = verdict(CompileReport(**empty | facts | {"hbm_per_chip_bytes": hbm, "fixes": fixes}))
    assert "2 x v5e-8" in line and "7.00 GiB above the 16.00" in line and "\n" not in line
    assert "--run.microbatches 2 (about 12.0 GiB)" in line
