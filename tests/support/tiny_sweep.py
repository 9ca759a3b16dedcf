"""A sweep of three runs that take a second each, a stand-in for their training, and a worker process.

As a program, `python tiny_sweep.py DATASET WORKDIR LEASE_SECONDS SECONDS_A_STEP CELLS [MEETING]` works on its first
CELLS cells and prints its events. Two workers with the same MEETING, a directory, wait for each other at their first
steps.
"""

import json
import os
import sys
import time
from pathlib import Path

import jax

from diffusionlm.config import ModelConfig
from diffusionlm.parallel import processes
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
    """Return two seeds of an MDM at 100 steps, and one at 120."""
    cells = grid(RECIPE, objectives=("mdm",), sizes={"one": MODEL}, budgets=(100.5 * PER_STEP,), seeds=(0, 1))
    cells += grid(RECIPE, objectives=("mdm",), sizes={"one": MODEL}, budgets=(120.5 * PER_STEP,))
    return Sweep(**{"cells": tuple(cells), "name": "tiny", **changes})


def settings(dataset):
    return {"data.path": str(dataset)}


def stub_train(cfg, workdir, *, fence=None):
    """Stand in for `trainer.train`: write the files of a finished run, with a loss that depends on seed and steps."""
    loss = 4.0 + cfg.run.seed / 10 + 1 / cfg.run.steps
    evaluation = {
        "nelbo_nats_per_token": loss,
        "nelbo_stderr": 0.1,
        "nelbo_per_draw": [loss - 0.1, loss + 0.1],
        "bits_per_byte": loss / 3,
        "tokens": 1000,
        "bytes": 3000,
    }
    result = {
        "step": cfg.run.steps,
        "tokens": 128 * cfg.run.steps,
        "flops": 1.0,
        "train_loss": 5.0,
        "eval": evaluation,
        "seconds": 2.0,
        "goodput": 0.5,
        "seconds_by_kind": {"train": 1, "data": 0, "evaluate": 1},
    }
    workdir.mkdir(parents=True)
    lines = [{"step": step, "loss": 5.0, "step_seconds": 0.1} for step in (cfg.run.steps // 2, cfg.run.steps)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if fence:
        fence.confirm()
    (workdir / "DONE.json").write_text(json.dumps(result))
    return trainer.Run(workdir, cfg, cfg.run.steps, result)


def slow_steps(seconds, meeting=None):
    """Return a stand-in for `make_train_step` whose steps are announced, and take so long."""

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


def main(dataset, workdir, lease_seconds, seconds_a_step, cells, meeting=""):
    jax.config.update("jax_num_cpu_devices", 1)
    processes.initialize(patience_seconds=10)
    worker.POLL_SECONDS = 0.1
    trainer.make_train_step = slow_steps(float(seconds_a_step), Path(meeting) if meeting else None)
    sweep = tiny_sweep(cells=tiny_sweep().cells[: int(cells)])
    end = worker.run(sweep, workdir, settings(dataset), lease_seconds=float(lease_seconds))
    tell("finished", done=end.done, failed=end.failed, ran=end.ran, stopped=end.stopped)


if __name__ == "__main__":
    main(*sys.argv[1:])
