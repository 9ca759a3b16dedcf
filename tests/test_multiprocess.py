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
from tiny_run import Recorder, leaves

from diffusionlm import checkpoint, metrics, trainer
from diffusionlm.sharding import make_mesh
from diffusionlm.train_state import abstract_state

STEPS = 16  # of `tiny_run.short`


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Programs for the tests of this file, hardly optimised: what matters is where they run, not how fast."""
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
        return trainer.train(tiny_run.short(dataset), tmp_path_factory.mktemp("one")), recorder


def play(scenario, dataset, workdir, compiled, on_event=lambda event, process: None):
    """Has two processes, with two devices each, play a scenario; returns what each told."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, tiny_run.__file__, str(dataset), scenario, str(workdir), coordinator]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    settings["env"] = tiny_run.environment(compiled) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    processes = [subprocess.Popen([*command, str(number)], **settings) for number in range(2)]
    second = ""
    with processes[0], processes[1], tiny_run.at_most(300, processes):
        for line in processes[1].stdout:
            second += line
            if line.startswith("{"):
                on_event(json.loads(line), processes[1])
        outputs = [processes[0].stdout.read(), second]
    codes = [process.returncode for process in processes]
    assert codes == [0, 0], "\n".join(outputs)
    return [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output in outputs]


@pytest.fixture(scope="module")
def two(dataset, compiled, tmp_path_factory):
    """What two processes did in `tiny_run.stopped_together`; only the second of them got SIGTERM."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    due, sent = random.randrange(3, 8), []

    def send_signal(event, process):
        if not sent and event.get("index", -1) >= due:
            sent.append(event)
            process.send_signal(signal.SIGTERM)

    told = play("stopped_together", dataset, workdir, compiled, send_signal)
    returned = [[event for event in events if event["event"] == "returned"] for events in told]
    assert [[event["done"] for event in events] for events in returned] == [[False, True]] * 2, due
    stopped = returned[0][0]["step"]
    parts = [[np.load(f"{workdir}.{number}.{step}.npz") for step in (stopped, STEPS)] for number in range(2)]
    recorded = [first | second for first, second in ((dict(a), dict(b)) for a, b in parts)]
    return SimpleNamespace(workdir=workdir, returned=returned, recorded=recorded, stopped=stopped, due=due)


def assert_bit_equal(found, wanted, name):
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert (found.shape, found.dtype, found.tobytes()) == (wanted.shape, wanted.dtype, wanted.tobytes()), name


def restored(cfg, workdir, step=None):
    """A saved state, on this process's devices."""
    with checkpoint.CheckpointManager(workdir, keep=100) as manager:
        return leaves(manager.restore(abstract_state(cfg, four_devices(cfg.mesh)), step))


def losses(workdir):
    return [(line["step"], line["loss"]) for line in metrics.read(workdir) if "loss" in line]


def test_data_and_noise_are_the_same_to_the_bit(one, two):
    for recorded in two.recorded:
        for k, inputs in one[1].inputs.items():
            for name, value in inputs.items():
                assert_bit_equal(recorded[f"inputs {k} {name}"], value, f"{name} of batch {k}")


def test_losses_and_parameters_are_the_same_to_rounding(one, two):
    for k, state in one[1].states.items():
        for name, value in state.items():
            found = two.recorded[0][f"state {k} {name}"]
            if k == 0:
                assert_bit_equal(found, value, name)
            np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-5, err_msg=f"{name} before batch {k}")
    found, wanted = losses(two.workdir), losses(one[0].workdir)
    assert [step for step, _ in found] == list(range(1, STEPS + 1))  # each step once, the resume notwithstanding
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_the_run_directory_tells_of_both(one, two):
    run, _ = one
    last = json.loads((two.workdir / "environment.json").read_text())
    for start in (last, *last["earlier"]):
        assert start["processes"] == 2 and start["devices"] == "4 x cpu"
    assert len(last["earlier"]) == 1  # it was resumed once
    done = json.loads((two.workdir / "DONE.json").read_text())
    for name in ("step", "tokens", "flops"):
        assert done[name] == run.result[name]
    for name in ("tokens", "bytes"):
        assert done["eval"][name] == run.result["eval"][name]
    for name in ("nelbo_nats_per_token", "bits_per_byte"):
        assert done["eval"][name] == pytest.approx(run.result["eval"][name], rel=1e-3)


def test_what_one_alone_wishes_both_do(two):
    assert two.returned[0] == two.returned[1]
    assert 0 < two.stopped - two.due <= 4  # SIGTERM to the second stopped both
    assert len(list((two.workdir / "checkpoints").iterdir())) > 2  # the clock of the first made both save


def test_what_two_processes_saved_one_restores(one, two):
    cfg = one[0].config
    for step in sorted(int(path.name) for path in (two.workdir / "checkpoints").iterdir())[:-1]:
        for name, value in restored(cfg, two.workdir, step).items():
            assert_bit_equal(value, two.recorded[0][f"state {step} {name}"], name)


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(one, two, dataset, compiled, tmp_path):
    play("uninterrupted", dataset, tmp_path, compiled)
    wanted = restored(one[0].config, tmp_path)
    for name, value in restored(one[0].config, two.workdir).items():
        assert_bit_equal(value, wanted[name], name)
    assert losses(two.workdir) == losses(tmp_path)
