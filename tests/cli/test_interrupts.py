"""Ctrl-C while the command starts, and while it ends: one line at most, and no traceback."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from support.slow_cases import slow

MODEL = str(Path(__file__).parents[2] / "docs/results/models/tinystories")

# The command, sent SIGINT some seconds after it begins to import a module.
PROGRAM = """
import os, runpy, signal, sys, threading

class Interrupter:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            if seconds:
                timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
                timer.daemon = True
                timer.start()
            else:
                os.kill(os.getpid(), signal.SIGINT)

module, seconds = sys.argv[1], float(sys.argv[2])
sys.argv[1:] = sys.argv[3:]
sys.meta_path.insert(0, Interrupter())
if module != "ignored":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
else:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    module = "numpy"
runpy.run_module("diffusionlm", run_name="__main__", alter_sys=True)
"""


def interrupted(module: str, seconds: float, command: list[str]) -> tuple[int, list[str]]:
    """Return the exit code, and the lines on stderr."""
    words = [sys.executable, "-c", PROGRAM, module, str(seconds), *command]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120)
    return ran.returncode, ran.stderr.split("\n")


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("diffusionlm.cli", ["--version"]),
        slow(("logging", ["--version"])),
        slow(("msgspec", ["--version"])),
        slow(("diffusionlm.cli.weights", ["--version"])),
        ("jax", ["sample", MODEL]),  # which the verb imports
        ("numpy.linalg", ["sample", MODEL]),  # inside of C code, which would raise another error
    ],
)
def test_ctrl_c_while_the_command_is_imported_is_one_line(module, command):
    code, lines = interrupted(module, 0, command)
    assert code == 130
    assert [line for line in lines if line] == ["diffusionlm: interrupted"]


def test_a_background_job_ignores_ctrl_c_as_its_shell_has_it():
    assert interrupted("ignored", 0, ["--version"]) == (0, [""])


@pytest.mark.slow
def test_ctrl_c_at_any_time_of_the_start_shows_no_traceback():
    seen = set()
    for i in range(24):
        seconds = random.Random(i).uniform(0.001, 1.5)
        code, lines = interrupted(
            "diffusionlm.cli", seconds, [["--version"], ["experiments"], ["sample", MODEL]][i % 3]
        )
        # The last is the system's own end of a process, once Python has taken its handlers away.
        assert code in (0, 130, -2), f"after {seconds} s: {lines}"
        assert len([line for line in lines if line]) <= 1, f"after {seconds} s: {lines}"
        seen.add(code)
    assert 130 in seen
