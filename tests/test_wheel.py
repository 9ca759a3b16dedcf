"""The wheel: everything that the package needs is in it, and it works outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
SCRIPT = """
import diffusionlm as dlm
from diffusionlm.cli.main import main
from diffusionlm.evaluation.harness import TASKS
from diffusionlm.registry import sweeps
assert dlm.__file__.startswith({target!r}), dlm.__file__
assert {{"demo", "llada_8b"}} <= set(dlm.experiment_names()) and "smdm_isoflop" in sweeps.names()
assert list(TASKS.glob("*.yaml"))
assert main(["train", "demo", "--workdir", {run!r}, "--data.source", {text!r}, "--model.vocab_size", "400",
             "--model.d_model", "16", "--model.n_layers", "1", "--model.n_heads", "2", "--model.n_kv_heads", "2",
             "--model.head_dim", "8", "--model.d_ff", "32", "--run.steps", "4", "--diffusion.arm_steps", "2",
             "--optim.warmup_steps", "1", "--run.eval_records", "8", "--run.eval_draws", "2", "--run.showcase", "False",
             "--data.sequence_length", "16", "--data.batch_size", "8"]) == 0
assert main(["sample", {run!r}, "--length", "4", "--html", {page!r}]) == 0
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, directory = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    for name in ("diffusionlm", "experiments"):  # a copy, as building leaves files behind that end in the next wheel
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("building a wheel takes setuptools from the package index, which cannot be reached")
    assert done.returncode == 0, done.stderr
    (path,) = directory.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(wheel):
    files = subprocess.run(["git", "ls-files", "diffusionlm"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    experiments = [f"diffusionlm/experiments/{path.name}" for path in (CHECKOUT / "experiments").glob("*.py")]
    assert {*files.stdout.split(), *experiments} <= set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith("diffusionlm_jax-")  # `diffusionlm` is another project on the package index


@pytest.mark.slow
def test_the_wheel_trains_and_samples_outside_the_checkout(wheel, tmp_path):
    target, text = tmp_path / "target", tmp_path / "text.txt"
    shutil.copy(CHECKOUT / "README.md", text)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    places = {"run": tmp_path / "run", "text": text, "page": tmp_path / "page.html", "target": target}
    script = SCRIPT.format(**{name: str(place) for name, place in places.items()})
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert places["page"].stat().st_size > 1000
