"""The sweep verbs, as a user types them."""

import importlib.util
import io
import json
import shutil
import time

import jax
import pytest
from rich.console import Console
from support import child_processes, tiny_run, tiny_sweep
from support.tiny_sweep import tiny_sweep as make_sweep

from diffusionlm.cli.main import main
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.scaling import commands as sweep
from diffusionlm.scaling.sweep import tables
from diffusionlm.scaling.sweep.lease import Leases
from diffusionlm.training import loop as trainer

SWEEP_FILE = """
from support.tiny_sweep import tiny_sweep
import diffusionlm as dlm

@dlm.register_sweep("mine")
def mine() -> dlm.Sweep:
    \"\"\"A sweep in a file of its own.\"\"\"
    return tiny_sweep()
"""


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """Keep programs between tests, on one device."""
    with (
        child_processes.compiled_programs(tmp_path_factory.getbasetemp() / "compiled"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(trainer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the name of a sweep in a user's file, the directory where `sweep run` finished it, and its dataset.

    A stand-in trained, since other tests train the cells of this sweep.
    """
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(SWEEP_FILE)
    name, workdir = f"{folder / 'mine.py'}:mine", folder / "sweep"
    dataset = tiny_run.make_dataset(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train", tiny_sweep.stub_train)
        assert main(["sweep", "run", name, "--workdir", str(workdir), "--data.path", str(dataset)]) == 0
    return name, workdir, dataset


@pytest.mark.slow
def test_run_reports_its_work_and_a_second_call_finds_nothing_to_do(finished, capsys):
    name, workdir, dataset = finished
    assert main(["sweep", "run", name, "--workdir", str(workdir), "--data.path", str(dataset)]) == 0
    captured = capsys.readouterr().out
    assert "cells it finished: 0; of the whole sweep done: 3, failed: 0" in captured
    assert f"diffusionlm sweep status {name} --workdir {workdir}" in captured


@pytest.mark.slow
def test_status_as_json_and_as_a_table(finished, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    name, workdir, _ = finished
    assert main(["sweep", "status", name, "--workdir", str(workdir), "--json"]) == 0
    progress = json.loads(capsys.readouterr().out)
    assert [progress[state] for state in ("done", "running", "failed", "pending")] == [3, 0, 0, 0]
    assert progress["flops_spent"] == progress["flops"] == sum(cell["flops"] for cell in progress["cells"])
    assert all(cell["state"] == "done" and cell["loss"] > 0 for cell in progress["cells"])
    assert main(["sweep", "status", name, "--workdir", str(workdir)]) == 0
    shown = capsys.readouterr().out
    assert "3 done, 0 running, 0 failed, 0 pending" in shown and progress["cells"][0]["id"] in shown


def test_a_report_asks_for_matplotlib_before_any_work(capsys, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    monkeypatch.setattr(sweep, "get", pytest.fail)
    assert main(["sweep", "report", "smdm_isoflop", "--workdir", str(tmp_path)]) == 2
    assert "the report of a sweep needs the package matplotlib" in capsys.readouterr().err


@pytest.mark.slow
def test_status_of_what_has_not_begun(capsys, tmp_path):
    assert main(["sweep", "status", "smdm_isoflop", "--workdir", str(tmp_path / "none"), "--json", "--all"]) == 0
    progress = json.loads(capsys.readouterr().out)
    assert progress["pending"] == 300 and progress["flops_spent"] == 0
    assert not (tmp_path / "none").exists(), "who only looks makes nothing"
    assert main(["sweep", "status", "smdm_isoflop", "--workdir", str(tmp_path / "none"), "--json"]) == 0
    said = "no worker of smdm_isoflop has begun there"
    assert f"{tmp_path / 'none'} does not exist: {said}" in capsys.readouterr().err
    assert main(["sweep", "status", "smdm_isoflop", "--workdir", str(tmp_path), "--json"]) == 0
    assert f"{tmp_path} has no sweep.json: {said}" in capsys.readouterr().err
    assert main(["sweep", "status", "smdm_isoflop", "--workdir", str(tmp_path), "--all"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out.count("\n") == 1
    assert "smdm_isoflop: 300 cells pending; `diffusionlm sweep plan smdm_isoflop --cells` lists them" in captured.out


def test_a_dead_workers_cell_is_pending(tmp_path, monkeypatch):
    cells = make_sweep().select()
    leases = Leases(tmp_path / "leases")
    alive = leases.claim(cells[0].id)
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now - 200)
        leases.claim(cells[1].id, seconds=100.0)
    progress = sweep.status(make_sweep(), tmp_path)
    assert [cell.state for cell in progress.cells] == ["running", "pending", "pending"]
    assert "no heartbeat of" in progress.cells[1].note
    alive.release()


@pytest.mark.slow
def test_watch_ends_when_all_is_done_and_needs_a_terminal(finished, capsys):
    name, workdir, _ = finished
    shown = io.StringIO()
    tables.watch(sweep.get(name), workdir, console=Console(file=shown, force_terminal=True, width=120))
    assert "3 done, 0 running, 0 failed, 0 pending" in shown.getvalue()
    assert main(["sweep", "status", name, "--workdir", str(workdir), "--watch"]) == 2
    assert "watch needs a terminal" in capsys.readouterr().err


@pytest.mark.slow
def test_report_writes_a_page_and_warns_of_missing_cells(finished, capsys, tmp_path):
    name, workdir, _ = finished
    assert main(["sweep", "report", name, "--workdir", str(workdir), "--output", str(tmp_path / "report")]) == 0
    captured = capsys.readouterr()
    assert f"{tmp_path}/report/report.html" in captured.out and "warning:" in captured.err
    written = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"report.html", "report.json", "results.json", "cells.csv"} <= written
    assert len(json.loads((tmp_path / "report" / "results.json").read_text())) == 3
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    identity = json.loads((workdir / "sweep.json").read_text())
    assert identity["dataset"] in content["context"]["dataset"] and "held-out text, scored" in content["context"]
    assert content["verdict"].startswith("This sweep gives no scaling law for ")
    assert captured.out.startswith(content["verdict"] + "\n")


@pytest.mark.parametrize(
    ("words", "overlay", "use"),
    [
        (["--overlay", "smdm_mdm", "--overlay", "quokka"], ["smdm_mdm", "quokka"], []),
        (["--overlay=smdm_mdm, quokka", "--json", "--overlay", "chinchilla"], ["smdm_mdm", "quokka", "chinchilla"], []),
        (["--use", "a", "--overlay", "quokka", "--use=b,unflagged"], ["quokka"], ["a", "b", "unflagged"]),
        (["--noise", "0.1"], None, []),
    ],
)
def test_overlays_and_flags_add_up(monkeypatch, words, overlay, use):
    calls = []
    monkeypatch.setattr(sweep, "report", lambda *args, **options: calls.append(options) or {})
    assert main(["sweep", "report", "points.csv", "--output", "out", *words]) == 0
    assert (calls[0]["overlay"], calls[0]["use"], calls[0]["output"]) == (overlay, use, "out")


@pytest.mark.parametrize("words", [["--overlay"], ["--overlay", "--json"]])
def test_an_overlay_without_a_name_is_one_line(capsys, words):
    assert main(["sweep", "report", "points.csv", *words]) == 2
    assert "overlay needs a value" in capsys.readouterr().err


def test_the_help_of_a_report_says_how_to_give_several_overlays_and_in_which_unit_noise_is(capsys):
    assert main(["sweep", "report", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "smdm_mdm,smdm_arm" in shown and "nats, or bits with --unit bits" in shown


WRONG_OUTPUTS = [
    ("/etc/passwd", "output=/etc/passwd must be a directory, and it is a file"),
    ("/proc/x", "cannot write the report to '/proc/x': No such file"),
]


@pytest.mark.parametrize(("output", "why"), WRONG_OUTPUTS)
def test_a_report_that_cannot_be_written_is_one_line(finished, capsys, output, why):
    name, workdir, _ = finished
    assert main(["sweep", "report", name, "--workdir", str(workdir), "--output", output]) == 2
    captured = capsys.readouterr().err
    assert why in captured and captured.count("\n") == 1


def test_a_report_of_nothing_leaves_nothing(finished, capsys, tmp_path):
    name, workdir, _ = finished
    (tmp_path / "sweep.json").write_bytes((workdir / "sweep.json").read_bytes())
    assert main(["sweep", "report", name, "--workdir", str(tmp_path)]) == 2
    assert "no finished cell to report" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
    (tmp_path / "cells" / "mdm_of_another_recipe").mkdir(parents=True)
    assert main(["sweep", "report", name, "--workdir", str(tmp_path)]) == 2
    assert "none is of this sweep, whose recipe must have changed since" in capsys.readouterr().err


def test_a_function_that_returns_no_sweep_is_one_line(capsys, tmp_path):
    text = "import diffusionlm as dlm\n\n@dlm.register_sweep('none')\ndef none():\n    dlm.sweep.names()\n\n"
    text += "@dlm.register_sweep('cells')\ndef cells():\n    return [1] * 1000\n\n"
    text += "@dlm.register_sweep('config')\ndef config():\n    return dlm.experiment('demo')\n"
    (tmp_path / "wrong.py").write_text(text)
    for name, message in {
        "none": "returns nothing: is its `return` missing?",
        "config": "is a Config; give a Sweep",
        "cells": "returns a list",
    }.items():
        assert main(["sweep", "plan", f"{tmp_path / 'wrong.py'}:{name}"]) == 2
        captured = capsys.readouterr().err
        assert message in captured and captured.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "name the sweep first; usage: diffusionlm sweep run NAME"),
        (["run", "isoflop_cpuu"], "unknown sweep 'isoflop_cpuu'; did you mean 'isoflop_cpu'"),
        (["run", "isoflop_cpu", "--workdir", "W"], "sweep 'isoflop_cpu' names no data: give --data.path"),
        (["run", "isoflop_cpu", "--workdir", "W", "--run.seed", "3"], "run.seed=3 is part of what a cell measures"),
        (["run", "isoflop_cpu", "--workdir", "W", "--data.path", "nowhere"], "dataset 'nowhere' does not exist"),
        (["run", "isoflop_cpu", "--workers", "2"], "unknown option 'workers'"),
        (["status", "isoflop_cpu", "--json", "--watch"], "json and watch exclude each other"),
        (["report", "isoflop_cpu", "--workdir", "W"], "has no sweep.json, so no worker has begun there"),
        (["reprot", "isoflop_cpu"], "unknown verb 'sweep reprot'; did you mean 'sweep report'"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *words]) == 2
    captured = capsys.readouterr().err
    assert message in captured and captured.count("\n") == 1


def test_tiny_sweep_has_the_steps_that_its_users_expect():
    assert [cell.steps for cell in tiny_sweep.tiny_sweep().select()] == [100, 100, 120]


def test_status_and_report_name_a_cell_whose_evaluation_is_not_finite(finished, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    name, workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "copy")
    cell = sweep.get(name).cells[0].id
    path = tmp_path / "copy" / "cells" / cell / "DONE.json"
    done = json.loads(path.read_text())
    done["eval"] |= {"nelbo_nats_per_token": None, "nelbo_stderr": None, "bits_per_byte": None}
    done["eval"]["nelbo_per_draw"] = [None] * len(done["eval"]["nelbo_per_draw"])
    path.write_text(json.dumps(done))
    assert main(["sweep", "status", name, "--workdir", str(tmp_path / "copy"), "--json"]) == 0
    progress = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [cell["loss"] is None for cell in progress["cells"]] == [True, False, False]
    assert main(["sweep", "status", name, "--workdir", str(tmp_path / "copy")]) == 0
    assert capsys.readouterr().out.count("its evaluation is not finite") == 1
    assert main(["sweep", "report", name, "--workdir", str(tmp_path / "copy")]) == 0
    assert capsys.readouterr().err.count(f"warning: {cell} is left out: its evaluation is not finite") == 1
