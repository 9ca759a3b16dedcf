"""What is written about a run: a failure to read or write it on one host reaches all of them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from support.run_files import (
    checkpoint_steps,
    truncated_copy,
)
from support.tiny_run import refusal

from diffusionlm import untrusted
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.errors import UserError
from diffusionlm.parallel import processes as runtime
from diffusionlm.training import loop as trainer
from diffusionlm.training import metrics, records, timeline


@pytest.fixture
def attempts(monkeypatch):
    """Record whether each call is made on all processes, since one that fails alone leaves the others waiting."""
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


@pytest.mark.slow
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
    workdir = truncated_copy(uninterrupted, tmp_path, 10)
    fail, found = failing(attempts, OSError("the mount is away"))
    monkeypatch.setattr(owner, name, fail(getattr(owner, name)))
    with pytest.raises(OSError, match="the mount is away"):
        trainer.train(uninterrupted[0].config, workdir)
    assert found[0]


@pytest.mark.slow
def test_the_end_of_a_run_is_read_and_written_everywhere(uninterrupted, tmp_path, monkeypatch, attempts):
    def done(path, *rest):
        return Path(path).name == "DONE.json"

    workdir = truncated_copy(uninterrupted, tmp_path, 30)
    fail, found = failing(attempts, OSError("the mount is away"), done)
    with monkeypatch.context() as patch:
        patch.setattr(records, "write_atomically", fail(records.write_atomically))
        with pytest.raises(OSError, match="the mount is away"):
            trainer.train(uninterrupted[0].config, workdir)
    (workdir / "DONE.json").write_text("{")
    assert "DONE.json is damaged" in refusal(uninterrupted[0].config, workdir)
    monkeypatch.setattr(untrusted, "read_text", fail(untrusted.read_text))
    with pytest.raises(OSError, match="the mount is away"):
        trainer.train(uninterrupted[0].config, workdir)
    assert found == [True, True]


@pytest.mark.parametrize("file", ["metrics.jsonl", "timeline.jsonl"])
def test_a_damaged_line_is_refused_in_one_line(uninterrupted, tmp_path, file):
    workdir = truncated_copy(uninterrupted, tmp_path, 10)
    (workdir / file).write_text('{"step": 1,\n' + (workdir / file).read_text())
    assert "damaged line" in refusal(uninterrupted[0].config, workdir)


@pytest.mark.slow
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
    workdir = truncated_copy(uninterrupted, tmp_path, 10)
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
