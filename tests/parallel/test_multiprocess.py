"""Several processes, each with a part of the devices, train as one process with all of them, and fail as one."""

import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from support import child_processes, tiny_run
from support.tiny_run import Recorder, leaves

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.errors import UserError
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.training import loop as trainer
from diffusionlm.training import metrics, timeline
from diffusionlm.training import step as train_step
from diffusionlm.training.state import abstract_state

pytestmark = pytest.mark.slow
STEPS = 16  # of `tiny_run.short`


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Programs for the tests of this file, hardly optimised: what matters is where they run, not how fast."""
    with child_processes.compiled_programs(tmp_path_factory.getbasetemp() / "compiled") as directory:
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


def play(scenario, dataset, workdir, compiled, processes=2, devices=2, codes=(0,), on_event=lambda event, all: None):
    """Has several processes play a scenario; returns what each told, and what each printed otherwise."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, tiny_run.__file__, str(dataset), scenario, str(workdir), str(devices)]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = child_processes.environment(compiled) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment |= {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": str(processes)}
    started = [
        subprocess.Popen(command, **settings, env=environment | {"JAX_PROCESS_ID": str(number)})
        for number in range(processes)
    ]
    last = ""
    with contextlib.ExitStack() as stack:
        for process in started:
            stack.enter_context(process)
        stack.enter_context(child_processes.at_most(300, started))
        for line in started[-1].stdout:
            last += line
            if line.startswith("{"):
                on_event(json.loads(line), started)
        outputs = [*(process.stdout.read() for process in started[:-1]), last]
    result = [process.returncode for process in started]
    assert all(code in codes for code in result), (result, "\n".join(outputs))
    lines = [output.splitlines() for output in outputs]
    reported = [[json.loads(line) for line in output if line.startswith("{")] for output in lines]
    return reported, ["\n".join(line for line in output if not line.startswith("{")) for output in lines]


@pytest.fixture(scope="module")
def two(dataset, compiled, tmp_path_factory):
    """Run two processes: their refusals, and the records of their run, in which only the second gets SIGTERM."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    due, sent = random.randrange(3, 8), []

    def send_signal(event, processes):
        if not sent and event.get("index", -1) >= due:
            sent.append(event)
            processes[1].send_signal(signal.SIGTERM)

    reported, _ = play("refused_and_stopped_together", dataset, workdir, compiled, on_event=send_signal)
    refused = [[event for event in events if event["event"] == "refused"] for events in reported]
    refusals = {event["trial"]: (event, other) for event, other in zip(*refused, strict=True)}
    returned = [[event for event in events if event["event"] == "returned"] for events in reported]
    assert [[event["done"] for event in events] for events in returned] == [[False, True]] * 2, due
    stopped = returned[0][0]["step"]
    parts = [[np.load(f"{workdir}.{number}.{step}.npz") for step in (stopped, STEPS)] for number in range(2)]
    recorded = [first | second for first, second in ((dict(a), dict(b)) for a, b in parts)]
    return SimpleNamespace(
        workdir=workdir, refusals=refusals, returned=returned, recorded=recorded, stopped=stopped, due=due
    )


def assert_bit_equal(result, expected, name):
    result, expected = np.asarray(result), np.asarray(expected)
    assert (result.shape, result.dtype, result.tobytes()) == (expected.shape, expected.dtype, expected.tobytes()), name


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
            result = two.recorded[0][f"state {k} {name}"]
            if k == 0:
                assert_bit_equal(result, value, name)
            np.testing.assert_allclose(result, value, rtol=1e-3, atol=1e-5, err_msg=f"{name} before batch {k}")
    result, expected = losses(two.workdir), losses(one[0].workdir)
    assert [step for step, _ in result] == list(range(1, STEPS + 1))  # each step once, the resume notwithstanding
    np.testing.assert_allclose(result, expected, rtol=1e-4)


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


def test_two_processes_resume_bit_for_bit(one, two, dataset, compiled, tmp_path):
    play("recorded", dataset, tmp_path / "run", compiled)
    expected = restored(one[0].config, tmp_path / "run")
    for name, value in restored(one[0].config, two.workdir).items():
        assert_bit_equal(value, expected[name], name)
    assert losses(two.workdir) == losses(tmp_path / "run")


def test_two_processes_mix_sources_as_one_does(compiled, tmp_path, monkeypatch):
    """They have the rows and the noise of one process to the bit, and report its losses of each source."""
    for seed, name in enumerate(("web", "code")):
        shutil.move(tiny_run.make_dataset(tmp_path / f"of_{name}", seed), tmp_path / name)
    recorder = Recorder()
    monkeypatch.setattr(trainer, "make_train_step", recorder)
    monkeypatch.setattr(trainer, "make_mesh", four_devices)
    one = trainer.train(tiny_run.mixed(tmp_path), tmp_path / "one")
    play("recorded_mixture", tmp_path, tmp_path / "two", compiled)
    assert list(recorder.inputs) == list(range(STEPS))
    for number in range(2):
        stored = np.load(f"{tmp_path / 'two'}.{number}.npz")
        for k, inputs in recorder.inputs.items():
            for name, value in inputs.items():
                assert_bit_equal(stored[f"{k} {name}"], value, f"{name} of batch {k}")
    lines, expected = metrics.read(tmp_path / "two"), metrics.read(one.workdir)
    for name in ("loss", "loss/web", "loss/code", "eval_nelbo_nats_per_token", "eval_nelbo_nats_per_token/web"):
        here, there = ([line[name] for line in found if name in line] for found in (lines, expected))
        assert len(here) == len(there) > 0, name
        np.testing.assert_allclose(here, there, rtol=1e-3, err_msg=name)


def test_two_processes_change_their_objective_together(dataset, compiled, tmp_path):
    play("recorded_in_parts", dataset, tmp_path / "two", compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_mesh", four_devices)
        trainer.train(tiny_run.in_parts(dataset), tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
    evaluations = [[line for line in metrics.read(tmp_path / name) if "eval_bytes" in line] for name in ("two", "one")]
    assert [line["step"] for line in evaluations[0]] == [6, 8, STEPS]
    for here, there in zip(*evaluations, strict=True):
        for name in ("eval_nelbo_nats_per_token", "eval_autoregressive_nats_per_token"):
            assert here[name] == pytest.approx(there[name], rel=1e-3)


# Deaths


def whole(workdir):
    """The steps that were saved."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def assert_continues(one, workdir, first, inputs):
    """Assert that the steps after the restored step `first` equal those of one process, with each batch once."""
    assert sorted(inputs) == list(range(first, STEPS))
    for k, result in inputs.items():
        for name, value in one[1].inputs[k].items():
            assert_bit_equal(result[name], value, f"{name} of batch {k}")
    result, expected = losses(workdir), losses(one[0].workdir)
    assert [step for step, _ in result] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(result, expected, rtol=1e-4)


def go_on_alone(dataset, workdir):
    """This process goes on, with all devices; returns what its steps were given."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_train_step", recorder)
        patch.setattr(trainer, "make_mesh", four_devices)
        assert trainer.train(tiny_run.short(dataset), workdir).done
    return recorder.inputs


def go_on(dataset, workdir, compiled, processes, devices):
    """So many processes go on; returns what the steps of each were given."""
    play("recorded", dataset, workdir, compiled, processes, devices)
    for number in range(processes):
        inputs = {}
        for name, value in np.load(f"{workdir}.{number}.npz").items():
            k, _, name = name.partition(" ")
            inputs.setdefault(int(k), {})[name] = value
        yield inputs


def test_killed_in_the_middle_of_a_save_one_process_goes_on(one, dataset, compiled, tmp_path):
    workdir = tmp_path / "run"
    play("killed_while_saving", dataset, workdir, compiled, codes=(-signal.SIGKILL, -signal.SIGABRT, 1))
    assert whole(workdir) == [4]
    assert any("8" in path.name for path in (workdir / "checkpoints").iterdir() if not path.name.isdigit())
    assert_continues(one, workdir, 4, go_on_alone(dataset, workdir))
    assert all(path.name.isdigit() for path in (workdir / "checkpoints").iterdir())  # the half of one is gone
    spent = timeline.Total(timeline.read(workdir)).seconds
    assert spent["between"] > 0


@pytest.mark.parametrize(("before", "after", "victim"), [((4, 1), (2, 2), 3), ((4, 1), (1, 2), 0), ((1, 4), (2, 2), 0)])
def test_killed_a_run_goes_on_with_another_number_of_processes(one, dataset, compiled, tmp_path, before, after, victim):
    workdir, due, killed = tmp_path / "run", random.randrange(5, 12), []

    def kill(event, processes):
        if not killed and event.get("index", -1) >= due:
            killed.append(time.monotonic())
            processes[victim].kill()

    codes = (-signal.SIGKILL, -signal.SIGABRT, 1)
    _, printed = play("announced", dataset, workdir, compiled, *before, codes=codes, on_event=kill)
    if before[0] > 1:  # the others end of their own accord
        assert time.monotonic() - killed[0] < 60
    # A save is finished in the background, at the latest when the next one begins.
    first = max(whole(workdir), default=0)
    assert first >= (due - 1) // 4 * 4 - 4, due
    for inputs in go_on(dataset, workdir, compiled, *after):
        assert_continues(one, workdir, first, inputs)


def test_two_processes_roll_back_as_one_does(dataset, compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "make_mesh", four_devices)
    monkeypatch.setattr(train_step, "targets", train_step.targets)  # which the scenario replaces
    with tiny_run.own_programs():
        tiny_run.rolled_back(dataset, tmp_path / "one")
    reported, _ = play("rolled_back", dataset, tmp_path / "two", compiled)
    assert all(event["rollbacks"] == 1 and event["skipped"] == 6 for (event,) in reported)  # 4 to 9
    cfg = tiny_run.short(dataset)
    result, expected = restored(cfg, tmp_path / "two"), restored(cfg, tmp_path / "one")
    assert (result[".step"], result[".next_index"], result[".guard.lr_factor"]) == (STEPS, STEPS + 6, 0.5)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)


def test_one_that_fails_alone_does_not_hold_up_the_others(dataset, compiled, tmp_path):
    began = time.monotonic()
    _, printed = play("failing_alone", dataset, tmp_path / "run", compiled, codes=(-signal.SIGABRT, 1))
    assert "trouble of its own" in printed[1]
    assert time.monotonic() - began < 100  # JAX's own patience is 300 seconds


# Refusals


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        ("missing", ["process 1 (", "of 2: dataset", "of_1/none", "does not exist"]),
        ("another", ["process 1 of 2", "dataset=", "process 0: ", "same data"]),
        ("unprepared", ["process 0 (", "of 2: ", "bad.txt"]),
        ("settings", ["process 1 of 2", "run.seed=8 (process 0: 7)", "same command"]),
        ("start", ["process 1 of 2", "run.init_from=", "of_1 (process 0: )", "same command"]),
        ("alone", ["process 1 (", "of 2: run is not the directory", "--workdir"]),
    ],
)
def test_what_one_cannot_do_all_refuse_with_one_line(two, trial, message):
    first, second = two.refusals[trial]
    assert first == second
    assert first["kind"] == "UserError" and "\n" not in first["message"]
    assert all(words in first["message"] for words in message), first["message"]


def test_a_bug_on_one_keeps_its_type_there_and_ends_the_others(two):
    first, second = two.refusals["bug"]
    assert (
        first["kind"] == "UserError" and "process 1 (" in first["message"] and "KeyError: 'a bug'" in first["message"]
    )
    assert second["kind"] == "KeyError"


@pytest.mark.parametrize("number", [0, 1])
def test_damage_to_what_either_process_saved_is_refused(one, two, tmp_path, number):
    run, _ = one
    shutil.copytree(two.workdir / "checkpoints" / str(STEPS), tmp_path / "checkpoints" / str(STEPS))
    files = tmp_path.glob(f"checkpoints/{STEPS}/params/ocdbt.process_{number}/d/*")
    largest = max(files, key=lambda file: file.stat().st_size)
    content = largest.read_bytes()
    largest.write_bytes(bytes(byte ^ 4 for byte in content))
    with pytest.raises(UserError, match="a file of params/ is damaged or missing"):
        restored(run.config, tmp_path)
