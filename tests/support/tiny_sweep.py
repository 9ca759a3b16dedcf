"""A sweep of three runs of a second each, and a worker on it as a process of its own.

As a program: `python tiny_sweep.py DATASET WORKDIR LEASE_SECONDS SECONDS_A_STEP [MEETING]` works on it, and tells what
happens. Two workers with the same MEETING, a directory, wait for each other at their first steps.
"""

import os
import sys
import time
from pathlib import Path

import jax

from diffusionlm.config import ModelConfig
from diffusionlm.parallel import processes as runtime
from diffusionlm.scaling.sweep import worker
from diffusionlm.scaling.sweep.recipe import ScalingRecipe, Sweep, grid
from diffusionlm.training import loop as trainer
from diffusionlm.training.programs import make_train_step
from support.tiny_run import BATCH, LENGTH, tell

RECIPE = ScalingRecipe(
    name="tiny",
    sequence_length=LENGTH,
    batch_size=BATCH,
    peak_lr=1e-2,
    convention="model",
    warmup_steps=10,
    dtype="float32",
    eval_records=2 * BATCH,
    eval_draws=2,
)
MODEL = ModelConfig(
    d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, vocab_size=257, max_length=LENGTH
)
PER_STEP = RECIPE.flops_per_step(MODEL, "mdm")


def tiny_sweep(**changes):
    """Two seeds of an MDM at 100 steps, and one at 120."""
    cells = grid(RECIPE, objectives=("mdm",), sizes={"one": MODEL}, budgets=(100.5 * PER_STEP,), seeds=(0, 1))
    cells += grid(RECIPE, objectives=("mdm",), sizes={"one": MODEL}, budgets=(120.5 * PER_STEP,))
    return Sweep(**{"cells": tuple(cells), "name": "tiny", **changes})


def settings(dataset):
    return {"data.path": str(dataset)}


def announced(seconds, meeting=None):
    """Stands in for `make_train_step`: every step takes so long, and is told before it is taken."""

    def make(cfg, mesh):
        train_step = make_train_step(cfg, mesh)

        def step(state, batch, index):
            if meeting:
                (meeting / str(os.getpid())).touch()
                while len(list(meeting.iterdir())) < 2:
                    time.sleep(0.05)
            tell("step", seed=cfg.run.seed, steps=cfg.run.steps, index=int(index))
            time.sleep(seconds)
            return train_step(state, batch, index)

        return step

    return make


def main(dataset, workdir, lease_seconds, seconds_a_step, meeting=""):
    jax.config.update("jax_num_cpu_devices", 1)
    runtime.initialize(patience_seconds=10)
    worker.POLL_SECONDS = 0.1
    trainer.make_train_step = announced(float(seconds_a_step), Path(meeting) if meeting else None)
    found = worker.run(tiny_sweep(), workdir, settings(dataset), lease_seconds=float(lease_seconds))
    tell("finished", done=found.done, failed=found.failed, ran=found.ran, stopped=found.stopped)


if __name__ == "__main__":
    main(*sys.argv[1:])
