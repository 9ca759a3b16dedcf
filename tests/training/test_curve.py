"""The curve of a run has what metrics.jsonl has, also after a resume and after a roll-back."""

import math

import numpy as np
import pytest
from etils import epath

from diffusionlm.config import Config
from diffusionlm.training import metrics
from diffusionlm.training.curve import AUTOREGRESSIVE, HELD_OUT, TRAINING, Curve
from diffusionlm.training.loop import Run
from diffusionlm.training.timeline import Timeline


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def log_steps(workdir, steps, restored=0):
    """Log steps as a process that goes on from `restored` does; return its curve."""
    timeline = Timeline()
    timeline.open(workdir, restored, write=True)
    writer, curve = metrics.MetricsWriter(workdir, restored), Curve("a run", 8)
    curve.restart(writer.kept)
    cost = metrics.StepCost(tokens=64, flops=2000, credited_flops=1000, peak_flops=None)
    with timeline, metrics.StepLog(writer, timeline, cost, every=2, last_step=8, curve=curve) as log:
        for step in steps:
            log.add(step, {"loss": 1 / step, "cross_entropy": 1.0, "grad_norm": 1.0, "lr": 0.1})
            if step % 4 == 0:
                log.evaluation(step, {"nelbo_nats_per_token": 2 / step, "nelbo_per_draw": [1.0]})
        if steps[-1] == 7:
            log.cut_back(5)
    return curve


def recorded(workdir, name):
    return {line["step"]: line[name] for line in metrics.read(workdir) if name in line}


@pytest.mark.parametrize("steps, restored", [(range(1, 9), 0), (range(1, 8), 0), (range(5, 9), 4)])
def test_the_curve_is_that_of_the_file(workdir, steps, restored):
    if restored:
        log_steps(workdir, range(1, 6))
    curve = log_steps(workdir, steps, restored)
    for name in (TRAINING, HELD_OUT):
        found = {int(step): loss for step, loss in zip(*curve.points(name), strict=True)}
        assert found == pytest.approx(recorded(workdir, name)) and found
    assert len(curve.points(AUTOREGRESSIVE)[0]) == 0


def test_a_loss_that_is_not_finite_is_not_drawn():
    curve = Curve("a run", 10, opens=4)
    for step, loss in ((1, 3.0), (2, math.nan), (3, 2.0), (4, math.inf)):
        curve.add(step, {TRAINING: loss})
    steps, losses = curve.points(TRAINING)
    np.testing.assert_array_equal(steps, [1, 3])
    np.testing.assert_array_equal(losses, [3.0, 2.0])


def test_the_picture_shows_every_series(monkeypatch):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    curve = Curve("a $run", 10, opens=4)  # a name is no formula
    curve.png()
    curve.add(2, {TRAINING: 3.0})
    curve.add(4, {HELD_OUT: 2.5, AUTOREGRESSIVE: 2.0})
    assert curve.png().startswith(b"\x89PNG")
    (axes,) = figures[-1].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training loss", "held out", "held out, next-token prediction", "attention opens"]
    assert [line.get_xydata().tolist() for line in axes.lines[:3]] == [[[2, 3.0]], [[4, 2.5]], [[4, 2.0]]]


def test_a_notebook_shows_the_figures_of_a_run():
    held_out = {"nelbo_nats_per_token": 3.7199, "nelbo_stderr": 0.0041, "bits_per_byte": 2.3222}
    cfg = Config(name="<demo>")
    done = Run(epath.Path("runs/x"), cfg, cfg.run.steps, {"eval": held_out, "tokens": 4_915_200, "seconds": 457.3})
    page = done._repr_html_()
    for text in ("&lt;demo&gt;", "3.720 +/- 0.004 nats per token, 2.322 bits per byte", "4,915,200", "runs/x"):
        assert text in page
    assert "stopped and saved" in Run(epath.Path("runs/x"), cfg, 3, None)._repr_html_()
