"""The work of cells whose two parts differ in it, and the time that it will take."""

import json
import time
from dataclasses import replace

import pytest
from support import tiny_sweep

from diffusionlm import flops
from diffusionlm.scaling.sweep.cost import credited_flops
from diffusionlm.scaling.sweep.directory import cell_directory
from diffusionlm.scaling.sweep.lease import Leases
from diffusionlm.scaling.sweep.recipe import Sweep, solve
from diffusionlm.scaling.sweep.status import status


def road(share):
    recipe = replace(tiny_sweep.RECIPE, arm_share=share)
    return solve(recipe, "mdm", "one", tiny_sweep.MODEL, 200.5 * tiny_sweep.PER_STEP)


def test_the_parts_of_a_cell_add_up():
    cell = road(0.25)
    steps = [credited_flops(cell, step, step + 1) for step in range(cell.steps)]
    assert sum(steps) == pytest.approx(credited_flops(cell))
    assert len(set(steps[:50])) == len(set(steps[50:])) == 1 and steps[49] > steps[50]
    sequence = flops.train(cell.config.model, cell.recipe.sequence_length, "model")
    assert steps[0] == cell.recipe.batch_size * sequence, "the head is needed at every position"
    assert credited_flops(road(0.0), 10) == pytest.approx(190 * steps[50])


@pytest.mark.parametrize(("logged", "remaining"), [(40, (10, 150)), (150, (0, 50))])
def test_the_eta_knows_that_the_parts_differ(tmp_path, logged, remaining):
    cell = road(0.25)
    directory = cell_directory(tmp_path, cell.id)
    directory.mkdir(parents=True)
    lines = [{"step": step, "loss": 5.0, "step_seconds": 2.0} for step in range(logged - 9, logged + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lease = Leases(tmp_path / "leases", clock=time.time).claim(cell.id)
    with lease:
        [found] = status(Sweep((cell,), name="roads"), tmp_path).cells
    assert found.state == "running" and found.step == logged
    first, second = (credited_flops(cell, step, step + 1) for step in (0, 199))
    unit = 2.0 / (first if logged <= 50 else second)
    assert found.eta_seconds == pytest.approx(unit * (remaining[0] * first + remaining[1] * second))
