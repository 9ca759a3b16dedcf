"""Training runs: the numbers that they leave behind."""

import json
import math

import numpy as np
import pytest
from support.run_files import (
    truncated_copy,
)
from support.tiny_run import BATCH, LENGTH, STEPS, refusal

from diffusionlm import flops
from diffusionlm.training import loop as trainer
from diffusionlm.training import metrics, timeline


def test_a_name_will_do_and_nothing_else():
    assert "unknown experiment 'demmo'; did you mean 'demo'" in refusal("demmo")
    assert "cfg=5 must be a Config" in refusal(5)


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


def test_the_devices_are_watched_at_every_step(uninterrupted, tmp_path, monkeypatch):
    """The cost of a wait for data follows from it."""
    workdir, steps = truncated_copy(uninterrupted, tmp_path, 25), []
    dispatched = timeline.Timeline.dispatched

    def noted(self, wait):
        steps.append(wait())
        dispatched(self, wait)

    monkeypatch.setattr(timeline.Timeline, "dispatched", noted)
    trainer.train(uninterrupted[0].config, workdir)
    losses = [line["loss"] for line in metrics.read(workdir) if "loss" in line]
    assert [float(loss) for loss in steps] == losses[25:]
