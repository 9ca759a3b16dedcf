"""Weights & Biases gets the lines of metrics.jsonl; a resumed run continues there, and failures stop nothing."""

import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest
from etils import epath
from support.command_line import assert_one_line

from diffusionlm.cli import main as cli
from diffusionlm.config import Config
from diffusionlm.errors import UserError
from diffusionlm.storage import read_json_lines
from diffusionlm.training.metrics import MetricsWriter
from diffusionlm.training.wandb_run import WandbRun


@pytest.fixture
def service(monkeypatch):
    """The interface of the package that is used, which records what it is given."""
    calls = types.SimpleNamespace(inits=[], lines=[], codes=[], failing=set())

    class Run:
        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, values):
            if "log" in calls.failing:
                raise ConnectionError("the service\nis down")
            calls.lines.append(values)

        def finish(self, exit_code):
            calls.codes.append(exit_code)

    def init(**options):
        if "init" in calls.failing:
            raise ValueError("no API key")
        calls.inits.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=dict))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return calls


def test_lines_are_mirrored_and_a_resumed_run_keeps_its_id(service, tmp_path):
    workdir = epath.Path(tmp_path)
    for step in (1, 2):
        with WandbRun(Config(), workdir) as run:
            writer = MetricsWriter(workdir, step - 1, mirror=run)
            writer.write(step, {"loss": 0.5})
            writer.close()
    assert service.lines == read_json_lines(workdir / "metrics.jsonl")
    first, second = service.inits
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["project"] == "diffusionlm" and first["dir"] == str(tmp_path)
    assert first["config"]["optim"]["peak_lr"] == Config().optim.peak_lr
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": first["id"], "project": "diffusionlm"}


def test_a_project_of_the_environment_is_kept(service, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with WandbRun(Config(), epath.Path(tmp_path)):
        pass
    monkeypatch.delenv("WANDB_PROJECT")
    with WandbRun(Config(), epath.Path(tmp_path)):
        pass
    assert [options["project"] for options in service.inits] == ["mine", "mine"]


@pytest.mark.parametrize("call", ["init", "log"])
def test_a_failure_is_said_once_and_stops_nothing(call, service, tmp_path, caplog):
    service.failing.add(call)
    with WandbRun(Config(), epath.Path(tmp_path)) as run:
        for step in range(3):
            run.log(step, {"loss": 1.0})
    assert service.lines == []
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and messages[0].startswith("Weights & Biases failed")
    assert ("no API key" if call == "init" else "the service is down") in messages[0]


def test_a_run_that_fails_is_marked_so(service, tmp_path):
    with pytest.raises(UserError), WandbRun(Config(), epath.Path(tmp_path)):
        raise UserError("disk full")
    assert service.codes == [1]


def test_a_damaged_identity_gives_a_new_one(service, tmp_path, caplog):
    (tmp_path / "wandb.json").write_text('{"id": 3}')
    with WandbRun(Config(), epath.Path(tmp_path)):
        pass
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] == service.inits[0]["id"] != 3
    assert "wandb.json" in caplog.text


OFFLINE = """
import sys
from etils import epath
from diffusionlm.config import Config
from diffusionlm.training.wandb_run import WandbRun
for step in (1, 2):
    with WandbRun(Config(), epath.Path(sys.argv[1])) as run:
        run.log(step, {"loss": 1.5})
"""


@pytest.mark.slow
def test_the_real_package_keeps_both_parts_of_a_run_offline_under_one_id(tmp_path):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", OFFLINE, str(tmp_path)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0 and "failed" not in finished.stderr, finished.stderr
    identity = json.loads((tmp_path / "wandb.json").read_text())["id"]
    parts = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(parts) == 2 and all(name.endswith(identity) for name in parts)
    assert all(any(path.glob("*.wandb")) for path in (tmp_path / "wandb").glob("offline-run-*"))


def test_without_the_package_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    find_spec, asked = importlib.util.find_spec, []

    def found(name):
        asked.append(name)
        return None if name == "wandb" else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    assert cli.main(["train", "demo", "--wandb", "--workdir", str(tmp_path / "run")]) == 2
    assert_one_line(capsys.readouterr(), ["wandb=True needs the package wandb", "[wandb]"])
    assert asked.count("wandb") == 1 and not (tmp_path / "run").exists()
