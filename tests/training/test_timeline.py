"""Every second is accounted for; undone work counts as lost."""

import json
import threading
import time as real_time
from types import SimpleNamespace

import pytest
from etils import epath

from diffusionlm.training import heartbeat
from diffusionlm.training import timeline as timeline_lib
from diffusionlm.training.timeline import Timeline


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


@pytest.fixture
def time():
    return SimpleNamespace(now=1000.0)


def begin(workdir, time, step, *, write=True, start=5.0, restore=2.0):
    """A process that needed so long until it went on from `step`."""
    timeline = Timeline(lambda: time.now, lambda: time.now)
    time.now += start
    with timeline.measure("restore"):
        time.now += restore
    timeline.open(workdir, step, write=write)
    return timeline


def take_steps(timeline, time, steps, seconds=1.0):
    for step in steps:
        time.now += seconds
        timeline.reach(step)


def nonzero(timeline):
    return {kind: spent for kind, spent in timeline.seconds.items() if spent}


def test_every_second_is_somewhere(workdir, time):
    timeline = begin(workdir, time, 0)
    with timeline.measure("compile"):
        time.now += 30
    take_steps(timeline, time, range(1, 11))
    with timeline.measure("evaluate"):
        time.now += 3
        with timeline.measure("save"):  # inside of another it counts for itself
            time.now += 4
        time.now += 1
    assert nonzero(timeline) == {"start": 5, "restore": 2, "compile": 30, "train": 10, "evaluate": 4, "save": 4}
    assert timeline.held == time.now - 1000
    assert timeline.goodput == pytest.approx(10 / 55)


def test_a_failure_does_not_leave_its_kind_behind(workdir, time):
    timeline = begin(workdir, time, 0)
    with pytest.raises(KeyError), timeline.measure("save"):
        time.now += 4
        raise KeyError
    time.now += 1
    assert nonzero(timeline) == {"start": 5, "restore": 2, "save": 4, "train": 1}


class Step:
    """Work of the devices that ends when it is told to."""

    def __init__(self, timeline):
        self._timeline, self._done = timeline, threading.Event()
        timeline.dispatched(self._wait)

    def _wait(self):
        assert self._done.wait(60)

    def end(self):
        self._done.set()
        deadline = real_time.monotonic() + 60
        while self._timeline.dry_since is None:
            assert real_time.monotonic() < deadline
            real_time.sleep(0.001)


@pytest.mark.parametrize("ends", [-1, 0, 4, 7, None])
def test_a_wait_for_data_costs_only_what_the_devices_wait_too(workdir, time, ends):
    """One second of other work, then a wait of seven; the step ends so long after the wait begins, or goes on."""
    with begin(workdir, time, 0, start=0, restore=0) as timeline:
        step = Step(timeline)
        if ends == -1:
            step.end()
        time.now += 1
        with timeline.waiting():
            before = 7 if ends is None else max(ends, 0)
            time.now += before
            if ends is not None:
                step.end()
            time.now += 7 - before
        waited = 0 if ends is None else 7 - before
        assert {kind: timeline.seconds[kind] for kind in ("train", "data")} == {"train": 8 - waited, "data": waited}
        step.end()


def test_data_that_are_a_little_too_slow_cost_a_little(workdir, time):
    with begin(workdir, time, 0, start=0, restore=0) as timeline:
        step = Step(timeline)
        for _ in range(100):  # a step takes 1 s, and a batch 1.25 s
            with timeline.waiting():
                time.now += 1
                step.end()
                time.now += 0.25
            step = Step(timeline)
        step.end()
        assert (timeline.seconds["data"], timeline.goodput) == (25, 0.8)


def test_without_a_step_a_wait_is_for_data_alone(workdir, time):
    with begin(workdir, time, 0, start=0, restore=0) as timeline:
        with timeline.waiting():
            time.now += 7
        assert nonzero(timeline) == {"data": 7}


def test_a_step_that_fails_has_ended_and_the_next_is_watched_as_well(workdir, time):
    def fail():
        raise RuntimeError("a device is gone")

    with begin(workdir, time, 0, start=0, restore=0) as timeline:
        timeline.dispatched(fail)
        step = Step(timeline)
        assert timeline.dry_since is None
        step.end()
        assert timeline.dry_since == time.now


def test_a_step_that_hangs_does_not_hold_up_the_end(workdir, time, monkeypatch):
    monkeypatch.setattr(timeline_lib, "CLOSE_SECONDS", 0.01)
    with begin(workdir, time, 0) as timeline:
        step = Step(timeline)
        time.now += 3
    assert timeline_lib.Total(timeline_lib.read(workdir)).seconds["train"] == 3
    step.end()


def test_what_ended_a_run_is_not_hidden_by_a_full_disk(workdir, time, monkeypatch, caplog):
    def refuse(self, line):
        raise OSError("the disk is full")

    with pytest.raises(KeyError), begin(workdir, time, 0):
        monkeypatch.setattr(timeline_lib.JsonLines, "write", refuse)
        raise KeyError
    assert "the disk is full" in caplog.text
    monkeypatch.undo()
    with pytest.raises(OSError, match="full"), begin(workdir, time, 0):
        monkeypatch.setattr(timeline_lib.JsonLines, "write", refuse)


def test_a_kill_loses_the_steps_after_its_checkpoint(workdir, time):
    with begin(workdir, time, 0) as timeline:  # ends with what was spent: as if killed right after a line
        take_steps(timeline, time, range(1, 21))
    time.now += 500
    again = begin(workdir, time, 15)
    # 20 steps in 20 seconds; those after step 15 are done again.
    assert nonzero(again) == {"start": 10, "restore": 4, "train": 15, "lost": 5, "between": 500}
    take_steps(again, time, range(16, 21), seconds=2)
    assert again.seconds["train"] == 25 and again.held == 14 + 15 + 5 + 10
    assert again.goodput == pytest.approx(25 / 44)
    assert timeline_lib.Total(timeline_lib.read(workdir)).seconds["lost"] == 5


def test_steps_are_lost_in_proportion_wherever_the_lines_end(workdir, time, monkeypatch):
    monkeypatch.setattr(timeline_lib, "SPENT_SECONDS", 7.0)
    with begin(workdir, time, 0) as timeline:
        take_steps(timeline, time, range(1, 31))
    assert sum("train" in line.get("seconds", {}) for line in timeline_lib.read(workdir)) >= 4
    again = begin(workdir, time, 11)
    assert again.seconds["train"] == pytest.approx(11) and again.seconds["lost"] == pytest.approx(19)
    once_more = begin(workdir, time, 3)  # someone deleted the newest checkpoints
    assert once_more.seconds["train"] == pytest.approx(3) and once_more.seconds["lost"] == pytest.approx(27)


def test_a_roll_back_loses_steps_too_and_the_history_keeps_it(workdir, time):
    timeline = begin(workdir, time, 0)
    take_steps(timeline, time, range(1, 11))
    timeline.note("rollback", 6, batch=10, from_step=10)
    take_steps(timeline, time, range(7, 9))
    assert (timeline.seconds["train"], timeline.seconds["lost"]) == (8, 4)
    timeline.note("stop", 8)
    events = [line["event"] for line in timeline_lib.read(workdir) if line["event"] != "spent"]
    assert events == ["start", "rollback", "stop"]
    assert begin(workdir, time, 8).seconds["train"] == 8


def test_there_are_few_lines(workdir, time):
    timeline = begin(workdir, time, 0)
    before = len(timeline_lib.read(workdir))
    take_steps(timeline, time, range(1, 1001), seconds=0.1)  # 100 seconds
    assert len(timeline_lib.read(workdir)) == before + 1


def test_one_process_writes(workdir, time):
    timeline = begin(workdir, time, 0, write=False)
    take_steps(timeline, time, range(1, 100))
    timeline.note("done", 99)
    assert list(workdir.iterdir()) == [] and timeline.seconds["train"] == 99


def test_the_heart_beats_now_and_then_and_when_the_work_changes(workdir, time):
    beats = []

    def look():
        beat = json.loads((workdir / "heartbeat").read_text())
        if beat not in beats:
            beats.append(beat)

    timeline = begin(workdir, time, 0, start=0, restore=0)
    for step in range(1, 25):
        time.now += 1
        timeline.reach(step)
        look()
    assert [beat["step"] for beat in beats] == [1, 11, 21] and beats[1]["time"] == 1011
    with timeline.measure("evaluate"):
        look()
    assert beats[-1] == {"step": 24, "time": 1024.0, "doing": "evaluate"}


def test_a_heartbeat_that_cannot_be_written_does_not_stop_a_run(workdir, time, monkeypatch, caplog):
    def refuse(path, text):
        raise OSError("the bucket is away")

    timeline = begin(workdir, time, 0)
    monkeypatch.setattr(heartbeat, "write_atomically", refuse)
    take_steps(timeline, time, [1])
    assert "the bucket is away" in caplog.text
