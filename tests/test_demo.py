"""The newcomer's first command in its own process: data, training, evaluation, baselines, a sample."""

import json
import os
import subprocess
import sys

import pytest

from diffusionlm import registry
from diffusionlm.pretrained.loading import load

pytestmark = pytest.mark.slow


def diffusionlm(*args, cwd):
    command = [sys.executable, "-m", "diffusionlm", *args]
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "FORCE_COLOR")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


SHORT = ["--run.steps", "100", "--optim.warmup_steps", "10"]
PARTS = [*SHORT, "--diffusion.arm_steps", "40"]


@pytest.fixture(scope="module")
def first(home):
    return diffusionlm("train", "demo", *PARTS, cwd=home)


def test_the_demo_trains_evaluates_and_shows_a_sample(first, home):
    assert first.returncode == 0, first.stderr
    assert "Traceback" not in first.stderr and "train demo  100/100  loss" in first.stderr
    demo = registry.experiments.get("demo")
    done = json.loads((home / "runs/demo/DONE.json").read_text())
    baselines = json.loads((home / "runs/demo/baselines.json").read_text())
    assert done["step"] == 100 and done["tokens"] == 100 * demo.data.batch_size * demo.data.sequence_length
    for number in (done["eval"]["bits_per_byte"], *(score["bits_per_byte"] for score in baselines.values())):
        assert 0.5 < number < 8 and f"{number:.3f}" in first.stdout
    assert "unigram" in baselines and "denoising steps" in first.stdout
    assert "step 40: as an autoregressive model" in first.stderr and "demo (ARM) at step 40" in first.stdout
    assert "An infilling" in first.stdout and "the text itself had" in first.stdout
    assert first.stdout.rstrip().endswith("sample runs/demo")
    completion = load(home / "runs/demo").generate("def ", length=8, steps=4)[0]
    assert completion.prompt == "def "


def test_a_second_call_reports_that_the_run_is_done(first, home):
    files = {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()}
    second = diffusionlm("train", "demo", *PARTS, cwd=home)
    assert second.returncode == 0 and "was done before" in second.stdout and "bits per byte" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file()} == files


def test_other_settings_are_another_run(first, home):
    other = diffusionlm("train", "demo", *PARTS, "--run.steps", "101", cwd=home)
    assert other.returncode == 2 and other.stdout == ""
    (line,) = other.stderr.splitlines()
    assert "run.steps=100" in line and "it cannot grow to 101" in line
    other = diffusionlm("train", "demo", *PARTS, "--optim.peak_lr", "1e-3", cwd=home)
    assert other.returncode == 2 and "optim.peak_lr (" in other.stderr


def test_the_twin_is_scored_on_the_same_tokens_and_bytes(first, home):
    twin = diffusionlm("train", "demo_arm", *SHORT, "--data.path", "runs/demo/data", cwd=home)
    assert twin.returncode == 0, twin.stderr
    mdm, arm = (json.loads((home / f"runs/{name}/DONE.json").read_text()) for name in ("demo", "demo_arm"))
    for name in ("tokens", "bytes"):
        assert mdm["eval"][name] == arm["eval"][name]
    assert arm["eval"]["nelbo_stderr"] == 0 < mdm["eval"]["nelbo_stderr"]
    assert arm["flops"] == mdm["flops"] and arm["tokens"] == mdm["tokens"]
