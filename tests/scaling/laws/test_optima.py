"""Optima, and which of them the laws may use."""

from dataclasses import replace

import numpy as np
import pytest
from support.simulated_sweep import simulated

from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.bootstrap import Estimate


def test_an_optimum_is_determined_if_its_interval_ends_within_a_spacing_of_the_grid():
    row = analyse(simulated(), full=False).objectives["mdm"].budgets[0]
    sizes = sorted({run.params for run in row.runs})
    optimum = row.optimum
    assert row.usable and optimum.spacing == pytest.approx(np.log(1.8), abs=1e-3)
    low, high = sizes[0] / 1.8, sizes[-1] * 1.8
    for ends, usable in (
        ((1.01 * low, 0.99 * high), True),
        ((0.99 * low, high / 2), False),
        ((2 * low, 1.01 * high), False),
    ):
        assert replace(optimum, params=Estimate(optimum.params.value, *ends)).usable == usable
    assert replace(optimum, params=Estimate(optimum.params.value)).usable  # with unknown noise all are
