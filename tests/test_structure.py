"""Imports point downwards only, files and functions stay short, and every package is installed."""

import ast
import configparser
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "diffusionlm").rglob("*.py"), *(ROOT / "experiments").glob("*.py")])


@functools.cache
def nodes_of(path):
    """Return the nodes of the syntax tree of a module."""
    return list(ast.walk(ast.parse(path.read_text())))


MOST_LINES = 400


def test_imports_go_down_only():
    """The contracts of setup.cfg hold: floors, no JAX on the ground floor, Orbax in one file."""
    program = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", program, "setup.cfg", "--no-cache"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_module_of_the_ground_floor_is_in_the_contract_without_jax():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    listed = settings["importlinter:contract:ground"]["source_modules"].split()
    modules = {f"diffusionlm.{path.stem}" for path in (ROOT / "diffusionlm").glob("*.py") if path.stem[:2] != "__"}
    assert set(listed) == modules | {"diffusionlm.ownership"}


def test_setup_cfg_lists_every_package():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    directories = {path.parent.relative_to(ROOT) for path in (ROOT / "diffusionlm").rglob("*.py")}
    packages = {".".join(directory.parts) for directory in directories}
    assert set(settings["options"]["packages"].split()) == packages | {"diffusionlm.experiments"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= MOST_LINES
    functions = [node for node in nodes_of(path) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno - node.lineno >= 60}
    # Nearly all of it is its arguments, each with a line of documentation, which is also the help of the command.
    allowed = {"prepare"} if path.parent.name == "data" else set()
    assert not long.keys() - allowed, f"functions of more than 60 lines: {long}"


def test_files_of_tests_are_short():
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in (ROOT / "tests").rglob("*.py")}
    assert len(lengths) > 200
    long = {name: length for name, length in lengths.items() if length > MOST_LINES}
    assert not long, f"files of more than {MOST_LINES} lines: {long}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_reaches_the_terminal_goes_through_the_console(path):
    """A `print` of its own, or a console of rich, would show escape sequences and markup that others wrote."""
    if path.stem in ("console", "output") and path.parent.name in ("diffusionlm", "cli"):
        return
    nodes = nodes_of(path)
    calls = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    imports = [(node.module, name.name) for node in nodes if isinstance(node, ast.ImportFrom) for name in node.names]
    assert "print" not in calls and ("rich.console", "Console") not in imports


def test_the_drawing_in_the_design_is_that_of_the_code():
    program = [sys.executable, "docs/draw_imports.py"]
    drawing = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"```mermaid\n{drawing}```" in (ROOT / "docs" / "design.md").read_text()
