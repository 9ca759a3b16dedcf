"""Two processes, each with half of the devices, train as one process with all of them."""

import json
import random
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_run
from tiny_run import STEPS, Recorder, leaves, tiny

from diffusionlm import checkpoint, metrics, trainer
from diffusionlm.sharding import make_mesh
from diffusionlm.train_state import abstract_state


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Programs for the tests of this file, hardly optimised: it is four devices that matter here, not their speed."""
    with tiny_run.compiled_programs(tmp_path_factory.getbasetemp() / "compiled") as directory:
        jax.config.update("jax_disable_most_optimizations", True)
        yield directory
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_run.make_dataset(tmp_path_factory.mktemp("data"))


def four_devices(cfg):
    return make_mesh(cfg, jax.devices()[:4])


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory):
    """A run of this process on four of its devices, and what its steps were given."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_train_step", recorder)
        patch.setattr(trainer, "make_mesh", four_devices)
        return trainer.train(tiny(dataset), tmp_path_factory.mktemp("one")), recorder


@pytest.fixture(scope="module")
def two(dataset, compiled, tmp_path_factory):
    """What two processes did in `tiny_run.two_processes`; in its second part, only the second of them got SIGTERM."""
    workdir = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, tiny_run.__file__, str(dataset), "two_processes", str(workdir), coordinator]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    settings["env"] = tiny_run.environment(compiled) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    processes = [subprocess.Popen([*command, str(number)], **settings) for number in range(2)]
    due, lines = random.randrange(5, 20), []
    try:
        for line in processes[1].stdout:
            lines.append(line)
            if line.startswith("{") and json.loads(line).get("index", -1) >= due:
                processes[1].send_signal(signal.SIGTERM)
                break
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    outputs[1] = "".join(lines) + outputs[1]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    told = [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output in outputs]
    returned = [[event for event in events if event["event"] == "returned"] for events in told]
    recorded = [np.load(workdir / f"recorded.{number}.npz") for number in range(2)]
    return SimpleNamespace(workdir=workdir, returned=returned, recorded=recorded, due=due)


def assert_bit_equal(found, wanted, name):
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert (found.shape, found.dtype, found.tobytes()) == (wanted.shape, wanted.dtype, wanted.tobytes()), name


def restored(cfg, workdir):
    """The newest state of a run, on this process's devices."""
    with checkpoint.CheckpointManager(workdir, keep=100) as manager:
        return leaves(manager.restore(abstract_state(cfg, four_devices(cfg.mesh))))


def losses(workdir):
    return [(line["step"], line["loss"]) for line in metrics.read(workdir) if "loss" in line]


def test_data_and_noise_are_the_same_to_the_bit(one, two):
    for k, inputs in one[1].inputs.items():
        for name, value in inputs.items():
            for recorded in two.recorded:
                assert_bit_equal(recorded[f"input {k} {name}"], value, name)


def test_losses_and_parameters_are_the_same_to_rounding(one, two):
    for k, state in one[1].states.items():
        for name, value in state.items():
            found = two.recorded[0][f"state {k} {name}"]
            if k == 0:
                assert_bit_equal(found, value, name)
            np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-5, err_msg=f"{name} before batch {k}")
    found, wanted = losses(two.workdir / "whole"), losses(one[0].workdir)
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_the_run_directory_is_written_once(one, two):
    run, _ = one
    workdir = two.workdir / "whole"
    assert (workdir / "config.json").read_text() == (run.workdir / "config.json").read_text()
    there = json.loads((workdir / "environment.json").read_text())
    assert there["processes"] == 2 and there["devices"] == "4 x cpu"
    done = json.loads((workdir / "DONE.json").read_text())
    for name in ("step", "tokens", "flops"):
        assert done[name] == run.result[name]
    for name in ("tokens", "bytes"):
        assert done["eval"][name] == run.result["eval"][name]
    assert done["eval"]["nelbo_nats_per_token"] == pytest.approx(run.result["eval"]["nelbo_nats_per_token"], rel=1e-3)
    assert two.returned[0][0] == two.returned[1][0] == {"event": "returned", "step": STEPS, "done": True}


def test_what_two_processes_saved_one_restores(one, two):
    run, recorder = one
    workdir = two.workdir / "whole"
    with checkpoint.CheckpointManager(workdir, keep=100) as manager:
        found = leaves(manager.restore(abstract_state(run.config, four_devices(run.config.mesh)), 20))
    for name, value in found.items():
        assert_bit_equal(value, two.recorded[0][f"state 20 {name}"], name)
    assert jax.process_count() == 1


def test_they_stop_and_save_together_though_one_alone_is_told(one, two):
    stopped = [events[1] for events in two.returned]
    assert stopped[0] == stopped[1] and not stopped[0]["done"]
    assert 0 < stopped[0]["step"] - two.due <= 4


def test_they_resume_bit_for_bit(one, two):
    cfg = one[0].config
    assert two.returned[0][2] == two.returned[1][2] == {"event": "returned", "step": STEPS, "done": True}
    wanted = restored(cfg, two.workdir / "whole")
    for name, value in restored(cfg, two.workdir / "stopped").items():
        assert_bit_equal(value, wanted[name], name)
    assert losses(two.workdir / "stopped") == losses(two.workdir / "whole")
