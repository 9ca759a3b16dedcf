"""The command line of a sandbox, what it shows, and which one is taken."""

import json
from pathlib import Path

import pytest

from diffusionlm.errors import UserError
from diffusionlm.evaluation import sandbox
from diffusionlm.evaluation.sandbox import backends, run
from diffusionlm.evaluation.sandbox.backends import Job, Layout, Limits
from diffusionlm.evaluation.sandbox.run import Outcome, Sandbox

JOB = Job(
    program="/tmp/p.py",
    directory="/tmp/root",
    limits=Limits(seconds=7, clock=8, memory=64 << 20, processes=3, file=2 << 20, open_files=9),
    layout=Layout("/opt/bin/python", ("/opt/bin/python", "/opt/lib"), (("usr/lib", "/lib"),)),
    user=1000,
    group=100,
)


def pairs(words, option, count=2):
    return [tuple(words[i + 1 : i + 1 + count]) for i, word in enumerate(words) if word == option]


def test_the_command_line_of_bubblewrap():
    words = backends.bubblewrap(JOB)
    options, command = words[: words.index("--")], words[words.index("--") + 1 :]
    for kind in ("user", "pid", "net", "ipc", "uts"):
        assert f"--unshare-{kind}" in options
    assert {"--die-with-parent", "--new-session", "--clearenv", "--disable-userns"} <= set(options)
    assert pairs(options, "--cap-drop", 1) == [("ALL",)]
    shown = [("/opt/bin/python",) * 2, ("/opt/lib",) * 2, ("/tmp/p.py", "/work/program.py")]
    assert set(pairs(options, "--ro-bind")) == {*shown, (backends.STARTER, "/work/starter.py")}
    assert not {"--bind", "--dev", "--proc", "--share-net", "--setenv"} & set(options)
    assert pairs(options, "--dev-bind") == [(path, path) for path in ("/dev/null", "/dev/zero", "/dev/urandom")]
    assert "--tmpfs" not in options and options[-4:] == ["--remount-ro", "/", "--chdir", "/work"]
    assert command[0] == "/opt/bin/python" and command[-2] == "inside"
    spec = json.loads(command[-1])
    assert spec["limits"] == {
        "seconds": 7,
        "clock": 8,
        "memory": 64 << 20,
        "processes": 3,
        "file": 2 << 20,
        "open_files": 9,
        "output": 1 << 20,
    }
    assert spec["command"] == ["/opt/bin/python", "-s", "-P", "-B", "/work/program.py"]
    assert spec["environment"]["HOME"] == "/work"


def test_a_layout_shows_the_interpreter_and_libraries_alone():
    layout = backends.layout()
    prefix = Path(layout.python).parents[1]
    for path in layout.read_only:
        assert path == layout.python or Path(path) in (prefix / "lib", prefix / "lib64") or path in backends.LIBRARIES


def test_the_first_sandbox_that_works_is_taken(monkeypatch):
    monkeypatch.setattr(run, "why_not", lambda place: "it is broken" if place.name == "bubblewrap" else None)
    assert sandbox.find(allow_code_execution=False).name == "namespaces"
    assert sandbox.find(allow_code_execution=True).name == "namespaces"
    monkeypatch.setattr(run, "why_not", lambda place: None)
    assert sandbox.find(allow_code_execution=False).name == "bubblewrap"


def test_without_a_sandbox_nothing_runs_unless_it_is_allowed(monkeypatch):
    monkeypatch.setattr(run, "why_not", lambda place: f"no {place.name}")
    reasons = "bubblewrap: no bubblewrap; namespaces: no namespaces.*--allow_code_execution"
    with pytest.raises(UserError, match=reasons) as error:
        sandbox.find(allow_code_execution=False)
    assert "\n" not in str(error.value)
    assert sandbox.find(allow_code_execution=True).name == "unprotected"


def test_a_sandbox_that_cannot_be_made_says_why(monkeypatch):
    monkeypatch.setattr(Sandbox, "run", lambda self, program: Outcome("exit", 1, "bwrap: no\npermissions\n"))
    assert run.why_not(Sandbox("namespaces", backends.layout())) == "bwrap: no permissions"
    monkeypatch.setenv("PATH", "")
    assert run.why_not(Sandbox("bubblewrap", backends.layout())) == "bwrap is not installed"
