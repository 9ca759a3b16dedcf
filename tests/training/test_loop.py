"""Training runs: what they leave behind, and that stopping, killing and moving them changes nothing."""

import dataclasses
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from support import tiny_run
from support.tiny_run import BATCH, LENGTH, STEPS, Recorder, tiny

from diffusionlm import config_io, fingerprint, flops
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.data.pipeline import eval_batches, open_dataset
from diffusionlm.errors import UserError
from diffusionlm.parallel import processes as runtime
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.presets import arm_twin
from diffusionlm.training import loop as trainer
from diffusionlm.training import metrics, programs, records, run_directory, saver, timeline
from diffusionlm.training import step as train_step
from diffusionlm.training.state import abstract_state
from diffusionlm.version import __version__

TIMES = ("seconds", "step_seconds", "tokens_per_second", "goodput")  # of a line, what no two runs share


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with tiny_run.compiled_programs(tmp_path_factory.getbasetemp() / "compiled") as directory:
        yield directory


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_run.make_dataset(tmp_path_factory.mktemp("data"))


def record(cfg, workdir, mesh_devices=8, recorder=None):
    """Trains; returns the run, and what its steps were given."""
    recorder = recorder or Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_train_step", recorder)
        patch.setattr(trainer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:mesh_devices]))
        return trainer.train(cfg, workdir), recorder


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    """A run from start to end, on eight devices; tests must not change its directory."""
    return record(tiny(dataset), tmp_path_factory.mktemp("uninterrupted"))


def continued(uninterrupted, workdir, step):
    """A copy of the uninterrupted run as it was after `step`, but for later lines of metrics.jsonl."""
    shutil.copytree(uninterrupted[0].workdir, workdir, dirs_exist_ok=True)
    (workdir / "DONE.json").unlink()
    for saved in checkpoint_steps(workdir):
        if saved > step:
            shutil.rmtree(workdir / "checkpoints" / str(saved))
    return workdir


def checkpoint_steps(workdir):
    """The steps that were saved; what a kill left half-written has another name."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def saved_state(cfg, workdir, step=None):
    with checkpoint.CheckpointManager(workdir, keep=100) as manager:
        return tiny_run.leaves(manager.restore(abstract_state(cfg, make_mesh(cfg.mesh)), step))


def timeless(workdir):
    """The lines of metrics.jsonl without what a clock told."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics.read(workdir)]


def assert_bit_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        found_bits, wanted_bits = np.asarray(found[name]), np.asarray(value)
        assert (found_bits.shape, found_bits.dtype) == (wanted_bits.shape, wanted_bits.dtype), name
        assert found_bits.tobytes() == wanted_bits.tobytes(), name


def content(directory):
    return {path: path.read_bytes() for path in sorted(Path(directory).rglob("*")) if path.is_file()}


def refusal(*args):
    with pytest.raises(UserError) as caught:
        trainer.train(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_will_do_and_nothing_else():
    assert "unknown experiment 'demmo'; did you mean 'demo'" in refusal("demmo")
    assert "cfg=5 must be a Config" in refusal(5)


# What a run leaves behind


def test_config_and_environment_are_recorded(uninterrupted, dataset):
    run, _ = uninterrupted
    assert config_io.from_json((run.workdir / "config.json").read_text()) == tiny(dataset)
    there = json.loads((run.workdir / "environment.json").read_text())
    assert there["diffusionlm"] == __version__
    assert there["packages"]["jax"] == jax.__version__
    assert there["devices"] == "8 x cpu" and there["processes"] == 1
    assert there["earlier"] == []
    assert there["git"] is None or re.fullmatch("[0-9a-f]{40}", there["git"])


def test_there_need_be_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_directory.environment()["git"] is None


def test_every_step_has_its_line(uninterrupted):
    run, recorder = uninterrupted
    lines = [line for line in metrics.read(run.workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for k, line in enumerate(lines):
        assert line["tokens"] == line["step"] * BATCH * LENGTH
        for name in ("loss", "cross_entropy", "grad_norm", "lr"):
            assert line[name] == float(recorder.metrics[k][name])
        assert math.isclose(line["tokens_per_second"] * line["step_seconds"], BATCH * LENGTH)
        assert 0 < line["goodput"] <= 1
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0
    cosine = [1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi * k / 20)) / 2 for k in range(20)]
    np.testing.assert_allclose([line["lr"] for line in lines], [*np.arange(10) * 1e-3, *cosine], rtol=1e-5)


def test_tensorboard_events_are_written(uninterrupted):
    run, _ = uninterrupted
    assert sum(path.stat().length for path in (run.workdir / "events").iterdir()) > 1000


def test_done_has_the_final_numbers(uninterrupted):
    run, _ = uninterrupted
    done = json.loads((run.workdir / "DONE.json").read_text())
    assert run.done and run.step == STEPS and run.result == done
    assert done["step"] == STEPS and done["tokens"] == STEPS * BATCH * LENGTH
    assert done["flops"] == STEPS * BATCH * flops.train(run.config.model, LENGTH, "model")
    lines = metrics.read(run.workdir)
    assert done["train_loss"] == lines[-2]["loss"]
    assert lines[-1]["step"] == STEPS
    assert {k: v for k, v in lines[-1].items() if k.startswith("eval_")} == {
        f"eval_{name}": value for name, value in done["eval"].items() if name != "nelbo_per_draw"
    }
    draws = done["eval"]["nelbo_per_draw"]
    assert len(draws) == 3 and np.mean(draws) == pytest.approx(done["eval"]["nelbo_nats_per_token"])
    assert np.std(draws, ddof=1) / math.sqrt(3) == pytest.approx(done["eval"]["nelbo_stderr"])
    assert done["seconds"] >= lines[-2]["seconds"] and 0 < done["goodput"] <= 1
    kinds = done["seconds_by_kind"]
    assert sum(kinds.values()) == pytest.approx(done["seconds"], abs=0.1)  # nothing came between
    assert kinds["train"] > 0 and kinds["compile"] > 0 and kinds["evaluate"] > 0 and kinds["save"] > 0
    assert (done["skipped"], done["rollbacks"]) == (0, 0)
    assert json.loads((run.workdir / "heartbeat").read_text())["step"] <= STEPS
    assert timeline.read(run.workdir)[-2]["event"] == "done"
    assert done["eval"]["nelbo_nats_per_token"] < 0.8 * math.log(257)  # it learnt at least which bytes there are


def test_checkpoints_are_where_they_were_asked_for(uninterrupted):
    run, recorder = uninterrupted
    assert checkpoint_steps(run.workdir) == [5, 10, 15, 20, 25, 30]
    assert_bit_equal(saved_state(run.config, run.workdir, 20), recorder.states[20])  # the state before batch 20
    sidecar = checkpoint.load_sidecar(run.workdir)
    assert sidecar.model == config_io.to_dict(run.config.model) and sidecar.mask_id == 257
    assert sidecar.source["step"] == STEPS and sidecar.source["fingerprint"] == fingerprint.fingerprint(run.config)


def test_the_clock_saves_the_asked_for_are_kept_and_a_window_is_profiled(dataset, tmp_path, monkeypatch):
    now = iter(range(0, 100_000, 20))  # each look at the clock takes 20 seconds
    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: next(now)))
    changes = {"checkpoint_every": 1000, "checkpoint_minutes": 1.5, "keep": 2, "keep_every": 10, "eval_every": 0}
    cfg = tiny(dataset, run=changes | {"profile_start": 3, "profile_steps": 2})
    run, _ = record(cfg, tmp_path)
    # It looks once a step and once when it saves, so that more than 90 seconds have passed every fifth step.
    assert checkpoint_steps(run.workdir) == [10, 20, 25, 30]
    assert traced_steps(run.workdir) == [3, 4]


def traced_steps(workdir):
    (trace,) = Path(workdir / "profile").rglob("*.xplane.pb")
    found = set()
    with warnings.catch_warnings():  # JAX's reader, which raises a few at its first use, cannot bear them as errors
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            for line in plane.lines:
                found |= {dict(event.stats)["step_num"] for event in line.events if event.name == "train"}
    return sorted(found)


# A second call


def test_a_second_call_returns_at_once_and_changes_nothing(uninterrupted, monkeypatch):
    run, _ = uninterrupted
    monkeypatch.setattr(trainer, "open_or_prepare", None)  # it does not even open its data
    before = content(run.workdir)
    again = trainer.train(tiny_run.with_changes(run.config, {"run": {"log_every": 3}}), run.workdir)
    assert (again.result, again.step, again.done) == (run.result, STEPS, True)
    assert content(run.workdir) == before


def test_another_fingerprint_is_refused_with_the_fields_that_differ(uninterrupted):
    run, _ = uninterrupted
    other = tiny_run.with_changes(run.config, {"optim": {"peak_lr": 0.5}, "run": {"seed": 8, "log_every": 3}})
    before = content(run.workdir)
    message = refusal(other, run.workdir)
    assert "optim.peak_lr (0.01 there, 0.5 here)" in message and "run.seed (7 there, 8 here)" in message
    assert message.count(" there, ") == 2 and "log_every" not in message and "--workdir" in message
    assert content(run.workdir) == before


def test_another_dataset_is_refused(uninterrupted, tmp_path):
    workdir = continued(uninterrupted, tmp_path / "run", 10)
    other = tiny_run.make_dataset(tmp_path / "data", seed=1)
    before = content(workdir)
    message = refusal(tiny(other), workdir)
    here, there = (open_dataset(path).metadata.sha256 for path in (other, uninterrupted[0].config.data.path))
    assert here in message and there in message and "another dataset" in message
    assert content(workdir) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"vocab_size": 300}}, ["257", "300", "--model.vocab_size 257"]),
        ({"data": {"sequence_length": 12}}, ["16", "12", "--data.sequence_length 16"]),
    ],
)
def test_data_that_do_not_fit_are_refused_and_the_directory_stays_free(dataset, tmp_path, changes, said):
    workdir = tmp_path / "run"
    message = refusal(tiny(dataset, **changes), workdir)
    assert all(words in message for words in said)
    run_directory.refuse_another_run(tiny(dataset), workdir)  # what the message asks for is not another run


def test_killed_in_its_last_evaluation_a_run_ends_with_the_same_numbers(uninterrupted, tmp_path):
    run, _ = uninterrupted
    workdir = continued(uninterrupted, tmp_path, STEPS)
    again, recorder = record(run.config, workdir)
    assert recorder.states == {}  # nothing was trained
    assert again.result["eval"] == run.result["eval"]  # the noise is fixed: to the last bit
    assert again.result["train_loss"] == run.result["train_loss"]
    assert again.result["goodput"] > 0


# Interruptions


@pytest.fixture(scope="module")
def interrupted(dataset, compiled, tmp_path_factory):
    """A run in a process of its own that got SIGTERM, went on, got Ctrl-C, went on, and was killed, at random steps."""
    workdir = tmp_path_factory.mktemp("interrupted")
    first = random.randrange(2, 7)
    second, third = first + random.randrange(3, 8), 20 + random.randrange(7)
    found = SimpleNamespace(workdir=workdir, planned=(first, second, third), returned=[], checkpoints=[], lines=[])
    command = [sys.executable, tiny_run.__file__, str(dataset), "interrupted", str(workdir)]
    settings = {"stdout": subprocess.PIPE, "text": True, "env": tiny_run.environment(compiled)}
    signals = iter([(first, signal.SIGTERM), (second, signal.SIGINT), (third, signal.SIGKILL)])
    due, number = next(signals)
    with (
        open(workdir / "stderr.txt", "w") as errors,
        subprocess.Popen(command, stderr=errors, **settings) as process,
        tiny_run.at_most(300, [process]),
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


@pytest.mark.parametrize("which", [0, 1], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_returns(interrupted, which):
    assert len(interrupted.returned) == 2, interrupted.errors
    event = interrupted.returned[which]
    assert not event["done"]
    # The step that was under way when the signal came is finished, and perhaps one more.
    assert 1 <= event["step"] - interrupted.planned[which] <= 4, interrupted.planned
    assert max(interrupted.checkpoints[which]) == event["step"]
    assert interrupted.lines[which][-1]["step"] == event["step"]


def test_a_killed_run_resumes_bit_for_bit(interrupted, uninterrupted):
    reference, steps = uninterrupted
    assert interrupted.code == -signal.SIGKILL, interrupted.errors
    restored = max(checkpoint_steps(interrupted.workdir))
    assert interrupted.returned[1]["step"] <= restored < STEPS, interrupted.planned
    run, resumed = record(reference.config, interrupted.workdir)
    assert list(resumed.states) == list(range(restored, STEPS))
    for k in resumed.states:
        assert_bit_equal(resumed.states[k], steps.states[k])
        assert_bit_equal(resumed.inputs[k], steps.inputs[k])
    final = saved_state(run.config, run.workdir)
    assert_bit_equal(final, saved_state(run.config, reference.workdir))
    assert timeless(run.workdir) == timeless(reference.workdir)  # every line once, with the same numbers
    assert run.result["eval"] == reference.result["eval"]


def test_from_eight_devices_to_one(uninterrupted, tmp_path):
    reference, steps = uninterrupted
    # The profiler's window lies across the restored step: there is nothing left to trace, and nothing to stop.
    cfg = tiny_run.with_changes(reference.config, {"run": {"profile_start": 8, "profile_steps": 4}})
    run, resumed = record(cfg, continued(uninterrupted, tmp_path, 10), mesh_devices=1)
    assert list(resumed.states) == list(range(10, 30))
    assert_bit_equal(resumed.states[10], steps.states[10])
    for k in range(10, 30):
        assert_bit_equal(resumed.inputs[k], steps.inputs[k])
        for name, value in steps.metrics[k].items():
            np.testing.assert_allclose(resumed.metrics[k][name], value, rtol=1e-4, err_msg=f"{name} of batch {k}")
    assert not (run.workdir / "profile").exists()
    for name in ("nelbo_nats_per_token", "bits_per_byte", "nelbo_stderr"):
        np.testing.assert_allclose(run.result["eval"][name], reference.result["eval"][name], rtol=1e-3)


@pytest.mark.parametrize(("mesh", "microbatches"), [((1, 8, 1), 1), pytest.param((2, 2, 2), 2, marks=pytest.mark.slow)])
def test_what_is_operational_may_change(uninterrupted, tmp_path, mesh, microbatches):
    reference, steps = uninterrupted
    run_changes = {"microbatches": microbatches, "log_every": 7, "keep": 1, "profile_start": 29, "profile_steps": 100}
    changes = {"mesh": dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)), "run": run_changes}
    cfg = tiny_run.with_changes(reference.config, changes)
    run, resumed = record(cfg, continued(uninterrupted, tmp_path, 20))
    assert_bit_equal(resumed.states[20], steps.states[20])
    for k in range(20, 30):
        assert_bit_equal(resumed.inputs[k], steps.inputs[k])
        np.testing.assert_allclose(resumed.metrics[k]["loss"], steps.metrics[k]["loss"], rtol=1e-4)
    assert config_io.from_json((run.workdir / "config.json").read_text()) == cfg
    lines = [line for line in metrics.read(run.workdir) if "loss" in line]
    assert [line["step"] for line in lines] == [*range(1, 21), 21, 28, 30]
    assert checkpoint_steps(run.workdir) == [30]
    assert traced_steps(run.workdir) == [29]  # the window ends with the training


def test_a_checkpoint_implies_the_evaluation_at_its_step(uninterrupted, tmp_path, monkeypatch):
    workdir = continued(uninterrupted, tmp_path, 10)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Loop, "evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        record(uninterrupted[0].config, workdir)
    # It was about to evaluate and to save step 15; had it saved first, no resume would make up for the evaluation.
    assert max(checkpoint_steps(workdir)) == 10


# What is not finite


@pytest.fixture
def own_programs():
    with tiny_run.own_programs():
        yield


def test_a_loss_that_is_not_finite_stops_the_run_with_the_state_before_it(
    dataset, uninterrupted, tmp_path, monkeypatch, own_programs
):
    _, steps = uninterrupted

    def poisoned(cfg, batch, batch_index):
        full = targets(cfg, batch, batch_index)
        return full.replace(weight_BxT=jnp.where(batch_index == 7, jnp.nan, full.weight_BxT))

    targets = train_step.targets
    monkeypatch.setattr(train_step, "targets", poisoned)
    for _ in range(2):  # a second call fails at the same place
        with pytest.raises(trainer.DivergenceError) as caught:
            trainer.train(tiny(dataset), tmp_path)
        message = str(caught.value)
        assert "step 8 on batch 7 gave loss nan" in message
        assert "saved as step 7" in message and str(tmp_path) in message
        assert max(checkpoint_steps(tmp_path)) == 7
        assert_bit_equal(saved_state(tiny(dataset), tmp_path), steps.states[7])
        assert [line["step"] for line in metrics.read(tmp_path)] == list(range(1, 8))
    assert not (tmp_path / "DONE.json").exists()


def test_a_divergence_right_behind_a_roll_back_says_what_the_checkpoint_lacks(
    dataset, tmp_path, monkeypatch, own_programs
):
    cfg = tiny(dataset, safety={"max_rollbacks": 1})
    monkeypatch.setattr(train_step, "targets", tiny_run.spoil_batches({7: math.nan, 8: math.nan}))
    for _ in range(2):  # it returns to step 5 each time, and fails on the next batch
        with pytest.raises(trainer.DivergenceError) as caught:
            record(cfg, tmp_path, mesh_devices=1)
        message = str(caught.value)
        assert "step 6 on batch 8" in message and "step 5 in" in message and "when batch 5 came next" in message
        assert "the state before it is saved" not in message
        state = saved_state(cfg, tmp_path)
        assert (state[".step"], state[".next_index"], state[".guard.rollbacks"]) == (5, 5, 0)


# One of several hosts


@pytest.fixture
def attempts(monkeypatch):
    """Whether what is called is tried everywhere, as one that fails alone leaves the others waiting."""
    there = SimpleNamespace(tried=0)

    def everywhere(attempt):
        there.tried += 1
        try:
            return attempt()
        finally:
            there.tried -= 1

    monkeypatch.setattr(runtime, "run_on_all_processes", everywhere)
    return there


def failing(attempts, error, when=lambda *args, **named: True):
    """A replacement that raises; `found` then holds, for each time, whether it was tried everywhere."""
    found = []

    def fail(original):
        def call(*args, **named):
            if not when(*args, **named):
                return original(*args, **named)
            found.append(attempts.tried > 0)
            raise error

        return call

    return fail, found


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (checkpoint.CheckpointManager, "__init__"),
        (checkpoint.CheckpointManager, "wait"),
        (checkpoint.CheckpointManager, "restore"),
        (timeline.Timeline, "open"),
        (metrics.MetricsWriter, "__init__"),
    ],
)
def test_what_one_host_cannot_open_is_tried_everywhere(uninterrupted, tmp_path, monkeypatch, attempts, owner, name):
    workdir = continued(uninterrupted, tmp_path, 10)
    fail, found = failing(attempts, OSError("the mount is away"))
    monkeypatch.setattr(owner, name, fail(getattr(owner, name)))
    with pytest.raises(OSError, match="the mount is away"):
        trainer.train(uninterrupted[0].config, workdir)
    assert found[0]


def test_the_end_of_a_run_is_read_and_written_everywhere(uninterrupted, tmp_path, monkeypatch, attempts):
    def done(path, *rest):
        return Path(path).name == "DONE.json"

    workdir = continued(uninterrupted, tmp_path, 30)
    fail, found = failing(attempts, OSError("the mount is away"), done)
    with monkeypatch.context() as patch:
        patch.setattr(records, "write_atomically", fail(records.write_atomically))
        with pytest.raises(OSError, match="the mount is away"):
            trainer.train(uninterrupted[0].config, workdir)
    (workdir / "DONE.json").write_text("{")
    assert "DONE.json is damaged" in refusal(uninterrupted[0].config, workdir)
    path = type(epath.Path(workdir))
    monkeypatch.setattr(path, "read_text", fail(path.read_text))
    with pytest.raises(OSError, match="the mount is away"):
        trainer.train(uninterrupted[0].config, workdir)
    assert found == [True, True]


@pytest.mark.parametrize("file", ["metrics.jsonl", "timeline.jsonl"])
def test_a_damaged_line_is_refused_in_one_line(uninterrupted, tmp_path, file):
    workdir = continued(uninterrupted, tmp_path, 10)
    (workdir / file).write_text('{"step": 1,\n' + (workdir / file).read_text())
    assert "damaged line" in refusal(uninterrupted[0].config, workdir)


def test_hosts_that_see_other_checkpoints_do_not_restore_them(uninterrupted, tmp_path, monkeypatch):
    workdir = continued(uninterrupted, tmp_path, 10)

    def gather(text):
        return [text, text.replace('"newest checkpoint": 10', '"newest checkpoint": 5')]

    monkeypatch.setattr(runtime, "gather", gather)
    monkeypatch.setattr(checkpoint.CheckpointManager, "restore", None)
    said = refusal(uninterrupted[0].config, workdir)
    assert "process 1 of 2" in said and "newest checkpoint=5 (process 0: 10)" in said and str(workdir) in said


@pytest.mark.parametrize(
    ("owner", "name", "when", "newest"),
    [
        (metrics.MetricsWriter, "write", lambda self, step, values: step == 12, 10),
        (metrics.MetricsWriter, "write", lambda self, step, values: "eval_tokens" in values and step == 15, 10),
        (metrics.MetricsWriter, "flush", lambda self: True, 10),
        (timeline.Timeline, "reach", lambda self, step: step == 12, 10),
        (timeline.Timeline, "note", lambda self, event, step: event == "done", 30),
        (metrics.MetricsWriter, "write", lambda self, step, values: "eval_tokens" in values and step == 30, 30),
    ],
)
def test_a_line_that_cannot_be_written_ends_all_hosts_before_the_next_checkpoint(
    uninterrupted, tmp_path, monkeypatch, attempts, owner, name, when, newest
):
    workdir = continued(uninterrupted, tmp_path, 10)
    fail, found = failing(attempts, OSError("the disk is full"), when)
    refused = []

    class Refusal(UserError):
        def __init__(self, message):
            super().__init__(message)
            refused.append(attempts.tried > 0)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail(getattr(owner, name)))
        patch.setattr(records, "UserError", Refusal)
        said = refusal(uninterrupted[0].config, workdir)
    assert "the disk is full" in said and "same command" in said and str(workdir) in said
    assert found and refused == [True]
    assert max(checkpoint_steps(workdir)) == newest and not (workdir / "DONE.json").exists()
    if newest == 10:
        return
    run = trainer.train(uninterrupted[0].config, workdir)
    assert run.result["eval"] == uninterrupted[0].result["eval"]


def test_the_devices_are_watched_at_every_step(uninterrupted, tmp_path, monkeypatch):
    """What a wait for data costs follows from it."""
    workdir, steps = continued(uninterrupted, tmp_path, 25), []
    dispatched = timeline.Timeline.dispatched

    def noted(self, wait):
        steps.append(wait())
        dispatched(self, wait)

    monkeypatch.setattr(timeline.Timeline, "dispatched", noted)
    trainer.train(uninterrupted[0].config, workdir)
    losses = [line["loss"] for line in metrics.read(workdir) if "loss" in line]
    assert [float(loss) for loss in steps] == losses[25:]


# Evaluation


def held_out(dataset):
    """The tokens that a canvas of the model holds, of all held-out records, (N, LENGTH)."""
    there = open_dataset(dataset)
    return there.rows("validation", range(there.size("validation")))["tokens"][:, :LENGTH]


def test_evaluation_scores_each_token_but_the_first_and_the_bytes_it_stands_for(uninterrupted, dataset):
    found = uninterrupted[0].result["eval"]
    there = held_out(dataset)
    scored = there[np.floor(np.arange(3 * BATCH) * (len(there) / (3 * BATCH))).astype(int), 1:]  # spread over the split
    assert found["tokens"] == scored.size
    assert found["bytes"] == (scored < 256).sum()  # 256 is EOS, which is no text
    bits = found["nelbo_nats_per_token"] / math.log(2) * found["tokens"]
    assert found["bits_per_byte"] == pytest.approx(bits / found["bytes"], rel=1e-12)


def test_evaluation_is_the_mean_over_draws_and_its_error_theirs(uninterrupted, dataset):
    run, _ = uninterrupted
    params = checkpoint.load_params(run.workdir)  # on one device
    step = programs.make_eval_step(run.config)
    token_bytes = open_dataset(dataset).tokenizer.token_bytes().astype(np.float32)
    draws = np.zeros((3, 2))
    for k, rows in enumerate(eval_batches(open_dataset(dataset), batch_size=BATCH, records=3 * BATCH)):
        for draw in range(3):
            part = step(params, rows, token_bytes, np.int32(k), np.int32(draw))
            draws[draw] += float(part["nats"]), float(part["tokens"])
    nelbo = draws[:, 0] / draws[:, 1]
    assert len(set(nelbo)) == 3
    found = run.result["eval"]
    assert found["nelbo_nats_per_token"] == pytest.approx(sum(nelbo) / 3, rel=1e-5)
    variance = sum((nelbo - sum(nelbo) / 3) ** 2) / 2
    assert found["nelbo_stderr"] == pytest.approx(math.sqrt(variance / 3), rel=1e-3)


@pytest.mark.parametrize("packing", ["segments", pytest.param("chunk", marks=pytest.mark.slow)])
def test_twins_score_the_same_tokens_and_ignorance_costs_log_v(dataset, packing):
    mdm = tiny(dataset, data={"packing": packing})
    arm = dataclasses.replace(mdm, objective="arm", model=arm_twin(mdm.model))
    token_bytes = open_dataset(dataset).tokenizer.token_bytes().astype(np.float32)
    *_, rows = eval_batches(open_dataset(dataset), batch_size=BATCH)  # the last is filled up
    found = {}
    for cfg in (mdm, arm):
        shapes = abstract_state(cfg, make_mesh(cfg.mesh)).params
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        part = programs.make_eval_step(cfg)(zeros, rows, token_bytes, np.int32(4), np.int32(0))
        found[cfg.objective] = float(part["tokens"]), float(part["bytes"])
        assert float(part["nats"]) / float(part["tokens"]) == pytest.approx(math.log(257), rel=1e-6)
    assert found["mdm"] == found["arm"]
    tokens, segments = rows["tokens"][:, :LENGTH], rows["segment_ids"][:, :LENGTH]
    scored = segments[:, 1:] != 0
    if packing == "segments":
        scored &= segments[:, 1:] == segments[:, :-1]
    assert found["mdm"] == (scored.sum(), (scored & (tokens[:, 1:] < 256)).sum())
