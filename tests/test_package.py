"""The package as a notebook imports it: names are there, and loaded only when they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusionlm as dlm
from diffusionlm.errors import UserError


def test_importing_loads_no_jax_and_no_backend():
    script = """
import sys
import diffusionlm
import diffusionlm.config, diffusionlm.registry, diffusionlm.presets, diffusionlm.flops
diffusionlm.UserError, diffusionlm.Config, diffusionlm.SamplingConfig, diffusionlm.presets, diffusionlm.flops
assert diffusionlm.experiment("demo", {"run.steps": 7}).run.steps == 7
from diffusionlm.cli.main import main
main(["experiments"]), main(["train", "demo", "--help"]), main(["sample", "--help"]), main(["chat", "--help"])
heavy = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorflow_datasets", "grain", "numpy", "sentencepiece"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_every_public_name_is_there():
    for name in dlm.__all__:
        assert getattr(dlm, name) is not None
    assert dir(dlm) == sorted(dlm.__all__)  # completion in a notebook shows nothing else
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        dlm.tarin  # noqa: B018


def test_a_notebook_overrides_fields_as_the_command_line_does():
    cfg = dlm.experiment("demo", {"run.steps": 100, "optim.peak_lr": 1, "diffusion.mask_id": None, "data.path": "a b"})
    assert (cfg.run.steps, cfg.optim.peak_lr, cfg.diffusion.mask_id, cfg.data.path) == (100, 1.0, None, "a b")
    assert isinstance(cfg.optim.peak_lr, float)
    assert dlm.experiment("demo") == dlm.experiment("demo", {})
    with pytest.raises(UserError, match="unknown option 'run.stepz'; did you mean 'run.steps'"):
        dlm.experiment("demo", {"run.stepz": 100})
    with pytest.raises(UserError, match="run.steps=1.5 must be an integer"):
        dlm.experiment("demo", {"run.steps": 1.5})
    with pytest.raises(UserError, match="unknown experiment 'dmo'; did you mean 'demo'"):
        dlm.experiment("dmo")


def test_type_checkers_see_every_public_name():
    tree = ast.parse(Path(dlm.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.asname: f"{node.module}.{alias.name}" for node in block.body for alias in node.names}
    modules = {name: f"diffusionlm.{module}" for name, module in dlm._MODULES.items()}
    assert imported == modules | {name: f"diffusionlm.{module}.{name}" for name, module in dlm._NAMES.items()}


def test_a_mistake_in_a_notebook_is_one_line(capsys):
    shell = pytest.importorskip("IPython.core.interactiveshell", reason="needs IPython").InteractiveShell()
    result = shell.run_cell("import diffusionlm as dlm\ndlm.experiment('dmo')")
    assert isinstance(result.error_in_exec, UserError)
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("UserError: unknown experiment 'dmo'; did you mean 'demo'?")
