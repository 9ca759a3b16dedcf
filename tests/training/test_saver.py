"""The checkpoints of a run: when they are saved, and what they say."""

from types import SimpleNamespace

import pytest
from support import tiny_run
from support.run_files import (
    assert_bit_equal,
    checkpoint_steps,
    content,
    saved_state,
    traced_steps,
    truncated_copy,
)
from support.tiny_run import STEPS, record, refusal, tiny

from diffusionlm import config_io, fingerprint
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.data.pipeline import open_dataset
from diffusionlm.parallel import processes as runtime
from diffusionlm.training import saver


def test_checkpoints_are_where_they_were_asked_for(uninterrupted):
    run, recorder = uninterrupted
    assert checkpoint_steps(run.workdir) == [5, 10, 15, 20, 25, 30]
    assert_bit_equal(saved_state(run.config, run.workdir, 20), recorder.states[20])  # the state before batch 20
    sidecar = checkpoint.load_sidecar(run.workdir)
    assert sidecar.model == config_io.to_dict(run.config.model) and sidecar.mask_id == 257
    assert sidecar.source["step"] == STEPS and sidecar.source["fingerprint"] == fingerprint.fingerprint(run.config)


@pytest.mark.slow
def test_the_clock_saves_the_asked_for_are_kept_and_a_window_is_profiled(dataset, tmp_path, monkeypatch):
    now = iter(range(0, 100_000, 20))  # each look at the clock takes 20 seconds
    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: next(now)))
    changes = {"checkpoint_every": 1000, "checkpoint_minutes": 1.5, "keep": 2, "keep_every": 10, "eval_every": 0}
    cfg = tiny(dataset, run=changes | {"profile_start": 3, "profile_steps": 2})
    run, _ = record(cfg, tmp_path)
    # It looks once a step and once when it saves, so that more than 90 seconds have passed every fifth step.
    assert checkpoint_steps(run.workdir) == [10, 20, 25, 30]
    assert traced_steps(run.workdir) == [3, 4]


def test_another_dataset_is_refused(uninterrupted, tmp_path):
    workdir = truncated_copy(uninterrupted, tmp_path / "run", 10)
    other = tiny_run.make_dataset(tmp_path / "data", seed=1)
    before = content(workdir)
    message = refusal(tiny(other), workdir)
    here, there = (open_dataset(path).metadata.sha256 for path in (other, uninterrupted[0].config.data.path))
    assert here in message and there in message and "another dataset" in message
    assert content(workdir) == before


def test_hosts_that_see_other_checkpoints_do_not_restore_them(uninterrupted, tmp_path, monkeypatch):
    workdir = truncated_copy(uninterrupted, tmp_path, 10)

    def gather(text):
        return [text, text.replace('"newest checkpoint": 10', '"newest checkpoint": 5')]

    monkeypatch.setattr(runtime, "gather", gather)
    monkeypatch.setattr(checkpoint.CheckpointManager, "restore", None)
    said = refusal(uninterrupted[0].config, workdir)
    assert "process 1 of 2" in said and "newest checkpoint=5 (process 0: 10)" in said and str(workdir) in said
