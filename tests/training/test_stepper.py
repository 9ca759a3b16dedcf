"""The stepper: what it counts as compilation."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from support.tiny_step import MDM

from diffusionlm.training.stepper import Stepper
from diffusionlm.training.timeline import Timeline


@pytest.mark.parametrize(
    ("arm_steps", "anneal_steps", "compiled"), [(0, 0, {0}), (0, 4, {0, 3}), (1, 3, {0, 1, 3}), (2, 0, {0, 2})]
)
def test_every_program_s_compilation_is_counted_as_one(arm_steps, anneal_steps, compiled):
    """Each part has a program: autoregressive, with attention that opens, and with full attention from then on."""
    time = SimpleNamespace(now=0.0)
    timeline = Timeline(lambda: time.now, lambda: time.now)
    state = SimpleNamespace(step=0, next_index=0)

    def train_step(state, batch, index):
        time.now += 100 if index in compiled else 1
        return state, {"loss": np.float32(1), "applied": np.float32(1)}

    parts = {"arm_steps": arm_steps, "anneal_steps": anneal_steps}
    cfg = dataclasses.replace(MDM, diffusion=dataclasses.replace(MDM.diffusion, **parts))
    stepper = Stepper(cfg, train_step, lambda start: iter([{}] * 10), timeline)
    stepper.set_state(state)
    for _ in range(6):
        stepper.dispatch()
    stepper.drain()
    assert stepper.step == 6
    assert timeline.seconds["compile"] == 100 * len(compiled)
