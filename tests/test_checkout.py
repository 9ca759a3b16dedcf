"""A checkout that is only on the path has its experiments, and an installed package is left alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusionlm import checkout

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
import diffusionlm as dlm
assert dlm.__file__.startswith(sys.argv[1]), dlm.__file__
import diffusionlm.experiments.tinystories as module  # importable by itself, with its relative imports
assert dlm.experiment("tinystories").run.steps == 8000 and "isoflop_cpu" in dlm.sweep.names()
assert module.__file__.startswith(sys.argv[1]), module.__file__
assert sys.modules["diffusionlm.experiments"].__path__ == [sys.argv[1] + "/experiments"]
print("jax" in sys.modules, "experiments" in sys.modules)
"""


def test_a_checkout_on_the_path_finds_its_experiments(tmp_path):
    """Without `site` no editable installation is found, so the path is all that there is."""
    places = [str(ROOT), *(place for place in sys.path if place.endswith("-packages"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-S", "-c", SCRIPT, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False False\n"), done.stderr


@pytest.mark.parametrize("files", [["experiments/__init__.py"], ["setup.cfg", "diffusionlm/experiments/__init__.py"]])
def test_an_installed_package_takes_nothing_from_beside_it(files, tmp_path, monkeypatch):
    """A foreign package may be called `experiments`, and a wheel has its own experiments inside."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = list(sys.meta_path)
    for file in ("diffusionlm/__init__.py", "experiments/__init__.py", *files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    checkout.find_experiments(tmp_path / "diffusionlm")
    assert sys.meta_path == before
    (tmp_path / "setup.cfg").touch()
    if "setup.cfg" not in files:
        checkout.find_experiments(tmp_path / "diffusionlm")
        assert len(sys.meta_path) == len(before) + 1
