"""A run that trains in seconds, for the tests that start the trainer here or in processes of their own.

As a program: `python tiny_run.py DATASET SCENARIO WORKDIR [DEVICES]` plays one of `SCENARIOS`, on so many devices; the
environment says whether there are other processes.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, RunConfig
from diffusionlm.data.prepare import prepare
from diffusionlm.errors import UserError
from diffusionlm.parallel import processes as runtime
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.training import dataset as datasets
from diffusionlm.training import loop as trainer
from diffusionlm.training import programs
from diffusionlm.training import step as train_step
from diffusionlm.training.programs import make_train_step
from diffusionlm.training.targets import targets

LENGTH, BATCH, STEPS = 16, 16, 30
WORDS = "the a little cat dog saw found red big house and then ran é 😀".split()


def make_dataset(directory, seed=0):
    """Some 900 records for training and 70 held out; returns their path."""
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(300)]
    source = directory / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(
        str(source),
        directory / "prepared",
        sequence_length=LENGTH,
        tokenizer="byte",
        validation_fraction=0.05,
        progress=False,
    )
    return directory / "prepared"


def tiny(dataset, **changes):
    """A configuration for `dataset`; `changes` are section -> {field: value}."""
    cfg = Config(
        name="tiny",
        model=ModelConfig(
            d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, vocab_size=257, max_length=LENGTH
        ),
        diffusion=DiffusionConfig(random_length=0.2),
        optim=OptimConfig(peak_lr=1e-2, final_lr=1e-3, warmup_steps=10),
        data=DataConfig(path=str(dataset), sequence_length=LENGTH, batch_size=BATCH),
        run=RunConfig(
            steps=STEPS,
            seed=7,
            log_every=1,
            eval_every=15,
            eval_records=3 * BATCH,
            eval_draws=3,
            checkpoint_every=5,
            checkpoint_minutes=0,
            keep=10,
        ),
    )
    return with_changes(cfg, changes)


def short(dataset, run=None):
    """A configuration for two processes, whose steps are slow."""
    return tiny(dataset, run={"steps": 16, "eval_every": 8, **(run or {})})


def in_parts(dataset):
    """A configuration for two processes, autoregressive at first, then with attention that opens, then full."""
    diffusion = {"alignment": "shifted", "arm_steps": 6, "anneal_steps": 4, "random_length": 0.0}
    return with_changes(short(dataset), {"diffusion": diffusion, "optim": {"warmup_steps": 2}})


def mixed(folder):
    """A configuration for two processes on the datasets `web` and `code` of a folder, whose shares change."""
    return with_changes(short(folder), {"data": {"mixture": "web=0.75,code=0.25;7:web=0.25,code=0.75"}})


def with_changes(cfg, changes):
    sections = {name: dataclasses.replace(getattr(cfg, name), **values) for name, values in changes.items()}
    return dataclasses.replace(cfg, **sections)


def host(tree):
    """A tree of global arrays as numpy arrays, copied: the trainer donates what it is given."""
    if jax.process_count() > 1:
        tree = on_every_device(next(leaf.sharding.mesh for leaf in jax.tree.leaves(tree) if leaf.ndim))(tree)
    return jax.tree.map(np.array, tree)


@functools.cache
def on_every_device(mesh):
    """Copies a whole tree to every device: one program, where `process_allgather` compiles one a leaf."""
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def leaves(tree):
    """Path -> leaf."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in found}


@functools.cache
def corruption(cfg, seed):
    """Return the jitted corruption of all runs that differ in their numbers of steps and rates alone."""
    cfg = with_changes(cfg, {"run": {"seed": seed}})
    return jax.jit(lambda batch, index: targets(cfg, batch, index))


class Recorder:
    """Stands in for `make_train_step`: notes the state before each step, its batch with the noise, and its metrics."""

    def __init__(self, before_step=lambda index: None):
        self.before_step = before_step
        self.states, self.inputs, self.metrics = {}, {}, {}  # by batch index

    def __call__(self, cfg, mesh):
        train_step, corrupted = make_train_step(cfg, mesh), corruption(programs.structure(cfg), cfg.run.seed)

        def step(state, batch, index):
            self.before_step(int(index))
            self.states[int(index)] = leaves(host(state))
            self.inputs[int(index)] = leaves(host((batch, corrupted(batch, index))))
            state, metrics = train_step(state, batch, index)
            self.metrics[int(index)] = jax.tree.map(np.array, metrics)
            return state, metrics

        return step


def record(cfg, workdir, mesh_devices=1, recorder=None):
    """Train on some of the devices; return the run, and what its steps were given."""
    recorder = recorder or Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_train_step", recorder)
        patch.setattr(trainer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:mesh_devices]))
        return trainer.train(cfg, workdir), recorder


def refusal(*args):
    """The line with which `trainer.train` refuses."""
    with pytest.raises(UserError) as caught:
        trainer.train(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tell(event, **values):
    """One line for the test that started this process."""
    print(json.dumps({"event": event, **values}), flush=True)


def announce_steps(index):
    """Slow enough that a signal sent at the sight of a step arrives a few steps later."""
    tell("step", index=index)
    time.sleep(0.05)


def interrupted(dataset, workdir):
    """Trains, and goes on whenever it was stopped."""
    trainer.make_train_step = Recorder(announce_steps)
    run = None
    while run is None or not run.done:
        run = trainer.train(tiny(dataset), workdir)
        tell("returned", step=run.step, done=run.done)


def stopped_together(dataset, workdir):
    """Two processes train, saving when the clock of one says so, until the other gets a signal; then they go on."""
    minutes = 1000 if jax.process_index() else 0.005
    run = None
    while run is None or not run.done:
        recorder = trainer.make_train_step = Recorder(announce_steps)
        run = trainer.train(short(dataset, run={"checkpoint_every": 1000, "checkpoint_minutes": minutes}), workdir)
        tell("returned", step=run.step, done=run.done)
        np.savez(
            f"{workdir}.{jax.process_index()}.{run.step}.npz",
            **{f"inputs {k} {name}": value for k, found in recorder.inputs.items() for name, value in found.items()},
            **{f"state {k} {name}": value for k, found in recorder.states.items() for name, value in found.items()},
        )


def recorded(dataset, workdir):
    """Trains to the end, and writes down what its steps were given."""
    recorder = trainer.make_train_step = Recorder()
    trainer.train(short(dataset), workdir)
    write_inputs(recorder, f"{workdir}.{jax.process_index()}.npz")


def recorded_in_parts(dataset, workdir):
    """Trains to the end, with an objective that changes on the way."""
    trainer.train(in_parts(dataset), workdir)


def recorded_mixture(folder, workdir):
    """Trains on a mixture to the end, and writes down what its steps were given."""
    recorder = trainer.make_train_step = Recorder()
    trainer.train(mixed(folder), workdir)
    write_inputs(recorder, f"{workdir}.{jax.process_index()}.npz")


def write_inputs(recorder, path):
    np.savez(path, **{f"{k} {name}": value for k, found in recorder.inputs.items() for name, value in found.items()})


def killed_while_saving(dataset, workdir):
    """The first process, which is to complete the checkpoint of step 8, dies as soon as it has begun."""
    save = checkpoint.CheckpointManager.save

    def save_and_die(self, step, *args):
        save(self, step, *args)
        if step == 8 and jax.process_index() == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.CheckpointManager.save = save_and_die
    trainer.train(short(dataset, run={"checkpoint_every": 4}), workdir)


def announced(dataset, workdir):
    """Trains, slowly enough to be killed at the sight of a step."""
    trainer.make_train_step = Recorder(announce_steps)
    trainer.train(short(dataset, run={"checkpoint_every": 4}), workdir)


@contextlib.contextmanager
def own_programs():
    """Inside, steps are traced anew: what was patched is in them, and in no other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "train_program", functools.cache(programs.train_program.__wrapped__))
        yield


# Steps in which the weights of a batch are multiplied by a factor that comes with it.
_program_with_factor = functools.cache(programs.train_program.__wrapped__)


@contextlib.contextmanager
def spoiling(spoilt):
    """Inside, a `Recorder` makes steps that multiply the weights of some batches by what `spoilt` says.

    The factors are data, so that runs with other ones share a program.
    """

    def make_step(cfg, mesh):
        step = programs.make_train_step(cfg, mesh)

        def spoil(state, batch, index):
            return step(state, {**batch, "factor": np.float32(spoilt.get(int(index), 1))}, index)

        return spoil

    def targets_with_factor(cfg, batch, batch_index):
        full = targets(cfg, batch, batch_index)
        return full.replace(weight_BxT=full.weight_BxT * batch["factor"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "make_train_step", make_step)
        patch.setattr(programs, "train_program", _program_with_factor)
        patch.setattr(train_step, "targets", targets_with_factor)
        yield


def spoil_batches(spoilt):
    """A stand-in for `train_step.targets` in which the weights of some batches are multiplied by what `spoilt` says."""
    targets = train_step.targets

    def spoil(cfg, batch, batch_index):
        full, factor = targets(cfg, batch, batch_index), jnp.float32(1)
        for index, by in spoilt.items():
            factor = jnp.where(batch_index == index, by, factor)
        return full.replace(weight_BxT=full.weight_BxT * factor)

    return spoil


def rolled_back(dataset, workdir):
    """One batch is left out; two in a row make it return to step 4, and go on behind them with half the rate."""
    train_step.targets = spoil_batches(dict.fromkeys((5, 8, 9), math.nan))
    cfg = short(dataset, run={"checkpoint_every": 4, "eval_every": 0})
    policy = {"max_skips": 1, "max_rollbacks": 1, "rollback_lr": 0.5}
    tell("returned", **trainer.train(with_changes(cfg, {"safety": policy}), workdir).result)


def failing_alone(dataset, workdir):
    """In the middle of it one process fails, for a reason of its own."""

    def fail(index):
        if index == 6 and jax.process_index() == 1:
            raise RuntimeError("trouble of its own")

    trainer.make_train_step = Recorder(fail)
    trainer.train(short(dataset), workdir)


def refused(dataset, workdir):
    """Play mistakes of one process, and differences between processes; each refusal is recorded."""
    second = jax.process_index() == 1
    here, before = workdir.parent / f"of_{jax.process_index()}", Path.cwd()
    here.mkdir(parents=True)
    os.chdir(here)
    bad = workdir.parent / "bad.txt"
    other = make_dataset(here, seed=jax.process_index())
    cfg = short(dataset)

    def broken(path):
        return {}["a bug"] if second else opened(path)

    opened, seconds = datasets.open_dataset, runtime.VISIBLE_SECONDS
    trials = {
        "missing": (short(here / "none" if second else dataset), workdir),
        "another": (short(other), workdir),
        "unprepared": (with_changes(cfg, {"data": {"path": "", "source": str(bad), "tokenizer": "byte"}}), workdir),
        "settings": (short(dataset, run={"seed": 8 if second else 7}), workdir),
        "start": (short(dataset, run={"init_from": str(here) if second else ""}), workdir),
        "alone": (cfg, "run"),
        "bug": (cfg, workdir),
    }
    runtime.VISIBLE_SECONDS = 0.5
    if not second:
        bad.write_bytes(b"\xff\xfe\xfd")
    for name, arguments in trials.items():
        datasets.open_dataset = broken if name == "bug" else opened
        try:
            trainer.train(*arguments)
        except Exception as error:
            tell("refused", trial=name, kind=type(error).__name__, message=str(error))
    datasets.open_dataset, runtime.VISIBLE_SECONDS = opened, seconds
    os.chdir(before)


def refused_and_stopped_together(dataset, workdir):
    """Play both scenarios in one start of the processes, which takes longer than either."""
    refused(dataset, workdir.parent / "refused" / "run")
    stopped_together(dataset, workdir)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        interrupted,
        recorded,
        recorded_in_parts,
        recorded_mixture,
        killed_while_saving,
        rolled_back,
        announced,
        failing_alone,
        refused_and_stopped_together,
    )
}


def main(dataset, scenario, workdir, devices="8"):
    jax.config.update("jax_num_cpu_devices", int(devices))
    runtime.initialize(patience_seconds=10)
    SCENARIOS[scenario](Path(dataset), Path(workdir))


if __name__ == "__main__":
    main(*sys.argv[1:])
