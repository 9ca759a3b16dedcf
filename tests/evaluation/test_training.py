"""A run from Python ends as one from the command line: with the showcase, once; a stopped one says so."""

import dataclasses

import pytest
from etils import epath

from diffusionlm.config import Config, RunConfig
from diffusionlm.evaluation import showcase, training
from diffusionlm.training import loop
from diffusionlm.training.loop import Run

SHOWN = Config(name="shown", run=RunConfig(showcase=True))
DONE = Run(epath.Path("runs/shown"), SHOWN, SHOWN.run.steps, {"eval": {}})


@pytest.mark.parametrize(
    "run, shows",
    [
        (DONE, True),
        (dataclasses.replace(DONE, done_before=True), False),
        (dataclasses.replace(DONE, config=Config()), False),
        (dataclasses.replace(DONE, step=3, result=None), False),
    ],
)
def test_the_showcase_follows_the_last_step(run, shows, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(loop, "train", lambda cfg, workdir, *, wandb: wandb == "passed on" and run)
    monkeypatch.setattr(showcase, "show", calls.append)
    assert training.train(run.config, run.workdir, wandb="passed on") is run
    assert calls == [run] * shows
    stopped = f"stopped and saved at step 3 of {SHOWN.run.steps} in runs/shown; the same call resumes it\n"
    assert capsys.readouterr().out == ("" if run.done else stopped)
