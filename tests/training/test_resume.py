"""Interruptions: stopping, killing and moving a run changes nothing."""

import json
import math
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support import child_processes, tiny_run
from support.run_files import (
    assert_bit_equal,
    checkpoint_steps,
    saved_state,
    timeless,
    traced_steps,
    truncated_copy,
)
from support.tiny_run import STEPS, record

from diffusionlm import config_io
from diffusionlm.training import metrics


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    """Return a run from start to end on two devices, which share its parameters, and what its steps were given."""
    return record(tiny_run.tiny(dataset), tmp_path_factory.mktemp("uninterrupted"), mesh_devices=2)


@pytest.mark.slow
def test_killed_in_its_last_evaluation_a_run_ends_with_the_same_numbers(uninterrupted, tmp_path):
    run, _ = uninterrupted
    workdir = truncated_copy(uninterrupted, tmp_path, STEPS)
    again, recorder = record(run.config, workdir, mesh_devices=2)
    assert recorder.states == {}  # nothing was trained
    assert again.result["eval"] == run.result["eval"]  # the noise is fixed: to the last bit
    assert again.result["train_loss"] == run.result["train_loss"]
    assert again.result["goodput"] > 0
    assert timeless(workdir) == timeless(run.workdir), "the evaluation that was made again has one line"


@pytest.fixture(scope="module")
def interrupted(dataset, tmp_path_factory):
    """A run in a process of its own that got SIGTERM, went on, got Ctrl-C, went on, and was killed, at random steps."""
    workdir = tmp_path_factory.mktemp("interrupted")
    first = random.randrange(2, 7)
    second, third = first + random.randrange(3, 8), 20 + random.randrange(7)
    found = SimpleNamespace(workdir=workdir, planned=(first, second, third), returned=[], checkpoints=[], lines=[])
    command = [sys.executable, tiny_run.__file__, str(dataset), "interrupted", str(workdir), "2"]
    settings = {"stdout": subprocess.PIPE, "text": True, "env": child_processes.environment()}
    signals = iter([(first, signal.SIGTERM), (second, signal.SIGINT), (third, signal.SIGKILL)])
    due, number = next(signals)
    with (
        open(workdir / "stderr.txt", "w") as errors,
        subprocess.Popen(command, stderr=errors, **settings) as process,
        child_processes.at_most(300, [process]),
    ):
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "returned":
                found.returned.append(event)
                found.checkpoints.append(checkpoint_steps(workdir))
                found.lines.append(timeless(workdir))
            elif event["index"] >= due:
                process.send_signal(number)
                due, number = next(signals, (math.inf, None))
    found.code = process.returncode
    found.errors = (workdir / "stderr.txt").read_text()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_returns(interrupted, which):
    assert len(interrupted.returned) == 2, interrupted.errors
    event = interrupted.returned[which]
    assert not event["done"]
    # The step that was under way when the signal came is finished, and perhaps one more.
    assert 1 <= event["step"] - interrupted.planned[which] <= 4, interrupted.planned
    assert max(interrupted.checkpoints[which]) == event["step"]
    assert interrupted.lines[which][-1]["step"] == event["step"]


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(interrupted, uninterrupted):
    reference, steps = uninterrupted
    assert interrupted.code == -signal.SIGKILL, interrupted.errors
    restored = max(checkpoint_steps(interrupted.workdir))
    assert interrupted.returned[1]["step"] <= restored < STEPS, interrupted.planned
    run, resumed = record(reference.config, interrupted.workdir, mesh_devices=2)
    assert list(resumed.states) == list(range(restored, STEPS))
    for k in resumed.states:
        assert_bit_equal(resumed.states[k], steps.states[k])
        assert_bit_equal(resumed.inputs[k], steps.inputs[k])
    final = saved_state(run.config, run.workdir)
    assert_bit_equal(final, saved_state(run.config, reference.workdir))
    assert timeless(run.workdir) == timeless(reference.workdir)  # every line once, with the same numbers
    assert run.result["eval"] == reference.result["eval"]


@pytest.mark.slow
def test_from_two_devices_to_one(uninterrupted, tmp_path):
    reference, steps = uninterrupted
    # The profiler's window lies across the restored step: there is nothing left to trace, and nothing to stop.
    cfg = tiny_run.with_changes(reference.config, {"run": {"profile_start": 8, "profile_steps": 4}})
    run, resumed = record(cfg, truncated_copy(uninterrupted, tmp_path, 10), mesh_devices=1)
    assert list(resumed.states) == list(range(10, 30))
    assert_bit_equal(resumed.states[10], steps.states[10])
    for k in range(10, 30):
        assert_bit_equal(resumed.inputs[k], steps.inputs[k])
        for name, value in steps.metrics[k].items():
            np.testing.assert_allclose(resumed.metrics[k][name], value, rtol=1e-4, err_msg=f"{name} of batch {k}")
    assert not (run.workdir / "profile").exists()
    for name in ("nelbo_nats_per_token", "bits_per_byte", "nelbo_stderr"):
        np.testing.assert_allclose(run.result["eval"][name], reference.result["eval"][name], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "microbatches"), [((1, 2, 1), 1), pytest.param((2, 2, 2), 2, marks=pytest.mark.slow)])
def test_what_is_operational_may_change(uninterrupted, tmp_path, mesh, microbatches):
    reference, steps = uninterrupted
    run_changes = {"microbatches": microbatches, "log_every": 7, "keep": 1, "profile_start": 29, "profile_steps": 100}
    changes = {"mesh": dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)), "run": run_changes}
    cfg = tiny_run.with_changes(reference.config, changes)
    run, resumed = record(cfg, truncated_copy(uninterrupted, tmp_path, 20), mesh_devices=math.prod(mesh))
    assert_bit_equal(resumed.states[20], steps.states[20])
    for k in range(20, 30):
        assert_bit_equal(resumed.inputs[k], steps.inputs[k])
        np.testing.assert_allclose(resumed.metrics[k]["loss"], steps.metrics[k]["loss"], rtol=1e-4)
    assert config_io.from_json((run.workdir / "config.json").read_text()) == cfg
    lines = [line for line in metrics.read(run.workdir) if "loss" in line]
    assert [line["step"] for line in lines] == [*range(1, 21), 21, 28, 30]
    assert checkpoint_steps(run.workdir) == [30]
    assert traced_steps(run.workdir) == [29]  # the window ends with the training
