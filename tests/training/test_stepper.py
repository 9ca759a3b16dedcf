"""The stepper: what it counts as compilation."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from support.tiny_step import MDM

from diffusionlm.training.stepper import Stepper
from diffusionlm.training.timeline import Timeline


@pytest.mark.parametrize(("anneal_steps", "compiled"), [(0, {0}), (4, {0, 3})])
def test_every_program_s_compilation_is_counted_as_one(anneal_steps, compiled):
    """A run whose attention opens up has two programs, and the second begins once attention is full."""
    time = SimpleNamespace(now=0.0)
    timeline = Timeline(lambda: time.now, lambda: time.now)
    state = SimpleNamespace(step=0, next_index=0)

    def train_step(state, batch, index):
        time.now += 100 if index in compiled else 1
        return state, {"loss": np.float32(1), "applied": np.float32(1)}

    cfg = dataclasses.replace(MDM, diffusion=dataclasses.replace(MDM.diffusion, anneal_steps=anneal_steps))
    stepper = Stepper(cfg, train_step, lambda start: iter([{}] * 10), timeline)
    stepper.set_state(state)
    for _ in range(6):
        stepper.dispatch()
    stepper.drain()
    assert stepper.step == 6
    assert timeline.seconds["compile"] == 100 * len(compiled)
