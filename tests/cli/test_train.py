"""The verb `train`: fields reach the run, and its end, stop and resumption are reported."""

import json
import shutil

import pytest
from support.command_line import LENGTH, TINY, assert_one_line, options

import diffusionlm as dlm
from diffusionlm import shortening
from diffusionlm.cli import main as cli
from diffusionlm.cli import train
from diffusionlm.training import loop as trainer


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_1(monkeypatch, tmp_path, capsys):
    def train(cfg, workdir, *, wandb):
        raise trainer.DivergenceError("step 7 gave loss nan")

    monkeypatch.setattr(trainer, "train", train)
    assert cli.main(["train", "demo", "--workdir", str(tmp_path)]) == 1
    assert_one_line(capsys.readouterr(), ["step 7", "nan"])


def test_a_stopped_run_says_how_to_resume(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(trainer, "train", lambda cfg, workdir, *, wandb: trainer.Run(workdir, cfg, 7, None))
    assert cli.main(["train", "demo", "--workdir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"step 7 of {dlm.experiment('demo').run.steps}" in out and str(tmp_path) in out


def test_the_fields_reach_the_trainer(monkeypatch, tmp_path):
    calls = []

    def train(cfg, workdir, *, wandb):
        assert not wandb
        calls.append((cfg, workdir))
        return trainer.Run(workdir, cfg, 0, None)

    monkeypatch.setattr(trainer, "train", train)
    monkeypatch.setattr(shortening, "validate", lambda cfg: cfg)  # these fields need not make sense together
    overrides = {"model.causal": True, "objective": "arm", "diffusion.mask_id": 5, "mesh.fsdp": -1, "data.path": "-a=b"}
    args = [f"--{name}={value}" for name, value in overrides.items()]
    assert cli.main(["train", "demo", *args, "--optim.peak-lr", "-1e-3", "--name", "other"]) == 0
    cfg, workdir = calls[0]
    assert cfg == dlm.experiment("demo", overrides | {"optim.peak_lr": -1e-3, "name": "other"})
    assert (cfg.model.causal, cfg.objective, cfg.diffusion.mask_id, cfg.data.path) == (True, "arm", 5, "-a=b")
    assert cfg.optim.peak_lr == -1e-3
    assert workdir == "runs/other"


def test_train_writes_a_run_and_a_second_call_says_that_it_is_done(run, dataset, capsys):
    result = json.loads((run / "DONE.json").read_text())
    assert (result["step"], result["tokens"]) == (2, 2 * 8 * LENGTH)
    capsys.readouterr()
    assert cli.main(["train", "demo", "--workdir", str(run), "--data.path", str(dataset), *options(TINY)]) == 0
    out = capsys.readouterr().out
    assert "done before" in out and str(run) in out
    assert f"{result['eval']['bits_per_byte']:.3f} bits per byte" in out


def test_train_resumes_a_stopped_run(run, dataset, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "DONE.json").unlink()
    args = ["--workdir", str(tmp_path / "copy"), "--data.path", str(dataset), *options(TINY)]
    capsys.readouterr()
    assert cli.main(["train", "demo", *args]) == 0
    assert f"resuming from step 2 in {tmp_path / 'copy'}" in capsys.readouterr().err
    before, after = (json.loads((w / "DONE.json").read_text())["eval"] for w in (run, tmp_path / "copy"))
    assert before == after


def test_a_finished_run_whose_evaluation_is_null_says_that_it_is_not_finite(run, dataset, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "DONE.json"
    done = json.loads(path.read_text())
    done["eval"] |= {"nelbo_nats_per_token": None, "nelbo_stderr": None, "bits_per_byte": None}
    path.write_text(json.dumps(done))
    args = ["--workdir", str(tmp_path / "copy"), "--data.path", str(dataset), *options(TINY)]
    assert cli.main(["train", "demo", *args]) == 0
    assert "held out: the evaluation is not finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (226, "3 min 46 s"),
        (3599.7, "1 h 0 min"),
        (93_900, "26 h 5 min"),
    ],
)
def test_a_duration_is_told_in_its_two_largest_units(seconds, words):
    assert train._duration(seconds) == words
