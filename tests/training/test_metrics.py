"""Metrics: the file survives kills and resumes with every line once, and its numbers are those of the steps."""

import contextlib
import json
import math
import struct

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto.event_pb2 import Event

from diffusionlm.training import metrics
from diffusionlm.training.timeline import Timeline


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


class Clock:
    """Stands still until it is moved."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def begin(workdir, clock, step=0):
    """A timeline of a process that goes on from `step`, and did nothing before."""
    timeline = Timeline(clock, clock)
    timeline.open(workdir, step, write=True)
    return timeline


def write_steps(workdir, restored_step, steps):
    writer = metrics.MetricsWriter(workdir, restored_step)
    for step in steps:
        writer.write(step, {"loss": 1 / step, "seconds": step / 2})
    writer.close()


def log(timeline, writer=None, *, every=3, last_step=1000, peak_flops=None):
    cost = metrics.StepCost(tokens=64, flops=2000, credited_flops=1000, peak_flops=peak_flops)
    return metrics.StepLog(writer, timeline, cost, every=every, last_step=last_step)


def step_metrics(loss, lr=0.1):
    return {"loss": loss, "cross_entropy": 2 * loss, "grad_norm": 3 * loss, "lr": lr}


def events(workdir):
    """All TensorBoard events of a run, read as TFRecords: length, its checksum, the message, its checksum."""
    found = []
    for path in sorted((workdir / "events").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_lines_after_the_restored_step_are_cut_off(workdir):
    write_steps(workdir, 0, range(1, 11))
    write_steps(workdir, 6, [])
    assert [line["step"] for line in metrics.read(workdir)] == [1, 2, 3, 4, 5, 6]
    write_steps(workdir, 6, [7, 8])
    lines = metrics.read(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert lines[6] == {"step": 7, "loss": 1 / 7, "seconds": 3.5}


def test_a_run_that_starts_anew_keeps_nothing(workdir):
    write_steps(workdir, 0, range(1, 4))
    write_steps(workdir, 0, [1])
    assert [line["step"] for line in metrics.read(workdir)] == [1]


def test_a_line_that_a_kill_cut_short_is_ignored_wherever_it_was_cut(workdir):
    write_steps(workdir, 0, range(1, 4))
    path = workdir / "metrics.jsonl"
    whole = path.read_text()
    lines = metrics.read(workdir)
    for end in range(len(whole) + 1):
        path.write_text(whole[:end])
        assert metrics.read(workdir) == lines[: whole[:end].count("\n")]
    path.write_text(whole[:-5])
    write_steps(workdir, 3, [4])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 4]


def test_no_file_is_no_lines(workdir):
    assert metrics.read(workdir) == []


def test_tensorboard_gets_the_same_numbers_and_is_told_what_a_resume_takes_back(workdir):
    write_steps(workdir, 0, range(1, 11))
    write_steps(workdir, 6, [7])
    found = events(workdir)
    losses = [(e.step, v.simple_value) for e in found for v in e.summary.value if v.tag == "loss"]
    assert losses == [(step, pytest.approx(1 / step)) for step in [*range(1, 11), 7]]
    purges = [e.step for e in found if e.HasField("session_log")]
    assert purges[-1] == 7  # TensorBoard drops what it has from this step on


def test_a_number_that_is_not_finite_is_null(workdir):
    writer = metrics.MetricsWriter(workdir, 0)
    writer.write(1, {"loss": float("nan"), "eval_nelbo_stderr": float("inf"), "lr": 0.5})
    writer.close()
    text = (workdir / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "eval_nelbo_stderr": None,
        "lr": 0.5,
    }
    (line,) = metrics.read(workdir)
    assert line["lr"] == 0.5 and math.isnan(line["loss"]) and math.isnan(line["eval_nelbo_stderr"])
    with contextlib.closing(metrics.MetricsWriter(workdir, 1)) as resumed:
        assert math.isnan(resumed.latest["loss"])
    assert json.loads((workdir / "metrics.jsonl").read_text(), parse_constant=pytest.fail)["loss"] is None


def test_what_a_roll_back_takes_back_is_written_anew(workdir):
    writer = metrics.MetricsWriter(workdir, 0)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.cut_back(2)
    writer.write(3, {"loss": 30.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in metrics.read(workdir)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_bucket_without_its_client_gets_no_events_but_the_lines(workdir, monkeypatch, caplog):
    monkeypatch.setattr(metrics, "in_bucket", lambda path: True)
    monkeypatch.setattr(metrics, "_importable", lambda module: False)
    write_steps(workdir, 0, [1, 2])
    assert len(metrics.read(workdir)) == 2 and not (workdir / "events").exists()
    assert "no TensorBoard events" in caplog.text and str(workdir / "events") in caplog.text


def test_a_line_is_the_mean_over_its_steps(workdir, clock):
    timeline = begin(workdir, clock)
    with log(timeline, metrics.MetricsWriter(workdir, 0)) as steps:
        for step, loss in enumerate([1.0, 2.0, 6.0, 10.0, 20.0, 60.0], start=1):
            clock.seconds += 2
            steps.add(step, step_metrics(loss, lr=step / 100), skipped=step // 2)
    first, second = metrics.read(workdir)
    assert first == pytest.approx(
        {
            "step": 3,
            "loss": 3,
            "cross_entropy": 6,
            "grad_norm": 9,
            "tokens": 3 * 64,
            "lr": 0.03,
            "skipped": 1,
            "tokens_per_second": 32,
            "step_seconds": 2,
            "seconds": 6,
            "goodput": 1,
        }
    )
    assert (second["step"], second["loss"], second["tokens"], second["seconds"]) == (6, 30, 6 * 64, 12)
    assert second["skipped"] == 3
    assert steps.last_loss == 30
    assert steps.note == "loss 30.000  32 tok/s"


def test_losses_by_level_of_noise_are_means_over_the_masked_tokens_of_all_steps(workdir, clock):
    """Not means of means: a step with few masked tokens at a level counts little there."""
    levels = np.zeros((3, 2, 10))
    levels[0, :, 2] = 8.0, 4
    levels[1, :, 2] = 1.0, 2
    levels[2, :, 9] = 30.0, 10
    with log(begin(workdir, clock), metrics.MetricsWriter(workdir, 0)) as steps:
        for step in range(1, 4):
            clock.seconds += 1
            steps.add(step, step_metrics(1.0) | {"levels": levels[step - 1]})
        for step in range(4, 7):
            clock.seconds += 1
            steps.add(step, step_metrics(1.0) | {"levels": 0 * levels[0]})
    first, second = metrics.read(workdir)
    found = {name: value for name, value in first.items() if name.startswith("cross_entropy/")}
    assert found == pytest.approx({"cross_entropy/0.2-0.3": 1.5, "cross_entropy/0.9-1.0": 3.0})
    assert not any(name.startswith("cross_entropy/") for name in second)
    tags = {value.tag for event in events(workdir) for value in event.summary.value}
    assert tags >= set(found)


def test_the_last_step_is_logged_whatever_the_interval(workdir, clock):
    with log(begin(workdir, clock), metrics.MetricsWriter(workdir, 0), every=3, last_step=5) as steps:
        for step in range(1, 6):
            clock.seconds += 1
            steps.add(step, step_metrics(float(step)))
    lines = metrics.read(workdir)
    assert [(line["step"], line["loss"], line["step_seconds"]) for line in lines] == [(3, 2.0, 1.0), (5, 4.5, 1.0)]


def test_the_rate_of_a_short_last_line_counts_the_line_before(workdir, clock):
    with log(begin(workdir, clock), metrics.MetricsWriter(workdir, 0), every=3, last_step=7) as steps:
        for step, seconds in enumerate([1, 1, 1, 2, 2, 2, 0], start=1):  # the last was done when the sixth's came
            clock.seconds += seconds
            steps.add(step, step_metrics(float(step)))
    lines = metrics.read(workdir)
    assert [line["loss"] for line in lines] == [2.0, 5.0, 7.0]
    assert [line["step_seconds"] for line in lines] == pytest.approx([1.0, 2.0, 6 / 4])


def test_the_rate_of_a_short_last_line_counts_no_time_before_a_roll_back(workdir, clock):
    with log(begin(workdir, clock), metrics.MetricsWriter(workdir, 0), every=3, last_step=4) as steps:
        for step in (1, 2, 3):
            clock.seconds += 9
            steps.add(step, step_metrics(1.0))
        steps.cut_back(3)
        clock.seconds += 2
        steps.add(4, step_metrics(1.0))
    assert [line["step_seconds"] for line in metrics.read(workdir)] == pytest.approx([9.0, 2.0])


def test_the_time_of_other_work_is_not_the_steps_but_that_of_waits_for_data_is(workdir, clock):
    timeline = begin(workdir, clock)
    with log(timeline, metrics.MetricsWriter(workdir, 0), every=2) as steps:
        with timeline.measure("compile"):
            clock.seconds += 50
        for step in (1, 2, 3, 4):
            with timeline.waiting():
                clock.seconds += 1
            clock.seconds += 2
            steps.add(step, step_metrics(1.0))
            with timeline.measure("evaluate"):
                clock.seconds += 4
    first, second = metrics.read(workdir)
    assert (first["step_seconds"], second["step_seconds"]) == (3, 3)
    assert first["seconds"] == 50 + 2 * 3 + 4
    assert second["seconds"] == 50 + 4 * 3 + 3 * 4
    assert second["goodput"] == pytest.approx(4 * 2 / 74)


def test_mfu_is_the_counted_flops_over_the_peak(workdir, clock):
    with log(begin(workdir, clock), metrics.MetricsWriter(workdir, 0), every=1, peak_flops=4000.0) as steps:
        clock.seconds += 0.5
        steps.add(1, step_metrics(1.0))
    assert metrics.read(workdir)[0]["mfu"] == 0.5  # 1000 FLOPs in half a second, of 4000 a second


def test_a_resume_goes_on_counting(workdir, clock):
    with begin(workdir, clock) as timeline, log(timeline, metrics.MetricsWriter(workdir, 0), every=1) as steps:
        clock.seconds += 10
        steps.add(1, step_metrics(5.0))
        timeline.reach(1)
        with timeline.measure("save"):
            clock.seconds += 30
        steps.evaluation(1, {"bits_per_byte": 2.5})
    clock.seconds += 1000  # between two processes
    timeline = begin(workdir, clock, step=1)
    with log(timeline, metrics.MetricsWriter(workdir, 1), every=1) as steps:
        assert steps.last_loss == 5
        clock.seconds += 20
        steps.add(2, step_metrics(4.0))
    first, evaluation, second = metrics.read(workdir)
    assert evaluation == {"step": 1, "eval_bits_per_byte": 2.5, "tokens": 64, "seconds": 40, "goodput": 0.25}
    assert (first["seconds"], second["seconds"]) == (10, 60)
    assert second["goodput"] == pytest.approx(0.5)


def test_without_a_writer_it_still_keeps_the_note(workdir, clock):
    timeline = Timeline(clock, clock)
    timeline.open(workdir, 0, write=False)
    with log(timeline, every=1) as steps:
        clock.seconds += 2
        steps.add(1, step_metrics(1.5))
        steps.evaluation(1, {"bits_per_byte": 2.5})
    assert steps.note == "loss 1.500  32 tok/s"
    assert list(workdir.iterdir()) == []
