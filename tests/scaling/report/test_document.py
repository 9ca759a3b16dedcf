"""The files of a report."""

import csv
import json
import shutil
import sys

import pytest
from support.simulated_sweep import complete

from diffusionlm.errors import UserError
from diffusionlm.scaling.report import document, plots

WORDS = {"title": "A sweep & <its> laws", "convention": "N counts non-embedding parameters, C = 6 N D."}


@pytest.mark.slow
def test_all_files_are_there_and_nothing_else(report):
    directory, _ = report
    pictures = {"isoflop.png", "laws.png", "gap.png", "residuals.png", "envelope.png"}
    tables = {"report.html", "report.json", "results.json", "cells.csv", "optima.csv"}
    assert {path.name for path in directory.iterdir()} == pictures | tables
    for name in pictures:
        assert (directory / name).read_bytes().startswith(b"\x89PNG")


def test_the_json_is_strict_and_what_was_returned(report):
    directory, content = report
    text = (directory / "report.json").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse) == content
    assert content["cells"] == 48 and content["incomplete"] == 2
    assert set(content["laws"]) == {"mdm", "arm"} and set(content["laws"]["mdm"]) == {"params", "tokens", "loss"}
    exponent = content["laws"]["mdm"]["loss"]["exponent"]
    assert exponent["low"] < exponent["value"] < exponent["high"] and exponent["interval"] == "95%"
    assert content["predictions"]["arm"]["loss"]["value"] < content["optima"][3]["loss"]["value"]
    assert {pair["small"] for pair in content["paired_errors"]} == {True}
    assert content["cross_checks"]["arm"]["parametric"]["params_exponent"] == pytest.approx(0.62, abs=0.1)
    assert {cell["objective"] for cell in content["next_cells"]} == {"mdm", "arm"}
    assert list(content["overlay"]) == ["smdm_mdm", "quokka"]


def test_the_tables_hold_all_cells_and_optima(report):
    directory, content = report
    with (directory / "cells.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in cells] == [result.loss for result in complete()]
    assert max(abs(float(row["loss"]) - float(row["fitted_loss"])) for row in cells) < 0.03
    with (directory / "optima.csv").open() as file:
        optima = list(csv.DictReader(file))
    assert len(optima) == 8
    for row, other in zip(optima, content["optima"], strict=True):
        assert float(row["params_low"]) == other["params"]["low"]


@pytest.mark.slow
def test_the_same_results_give_the_same_report(report, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "render", lambda *args: {})  # which takes most of the time
    again = document.write(complete(), tmp_path, **WORDS, overlay=("smdm_mdm", "quokka"), incomplete=2)
    assert again == report[1]


@pytest.mark.slow
def test_a_later_report_replaces_an_earlier_one(report, tmp_path):
    directory = tmp_path / "report"
    shutil.copytree(report[0], directory)
    content = document.write([r for r in complete() if r.objective == "mdm"], directory, **WORDS)
    assert not (directory / "gap.png").exists()  # one objective has none
    assert content["gaps"] == [] and any("only the objective mdm" in line for line in content["warnings"])
    assert json.loads((directory / "report.json").read_text()) == content


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_sweep_that_has_only_begun_is_reported(tmp_path, count):
    content = document.write(complete()[:count], tmp_path, **WORDS, incomplete=48 - count)
    assert content["laws"] == {"mdm": {}} and content["predictions"] == {"mdm": None}
    assert any("no power laws" in line for line in content["warnings"])
    assert (tmp_path / "report.html").exists() and (tmp_path / "isoflop.png").exists()


def test_context_and_warnings_of_the_sweep_are_in_the_report(tmp_path):
    context = {"dataset": "sha256 abc"}
    content = document.write(complete()[:2], tmp_path, **WORDS, context=context, warnings=["of the data"])
    text = (tmp_path / "report.html").read_text()
    assert content["warnings"][0] == "of the data" and "What was measured" in text
    assert content["context"] == context | {"counts": WORDS["convention"]}
    assert all(value in text for value in content["context"].values())


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no finished cell"):
        document.write([], tmp_path, **WORDS)
    with pytest.raises(UserError, match="unknown published law"):
        document.write(complete(), tmp_path, **WORDS, overlay=["smdm"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file must be a directory, and it is a file"):
        document.write(complete()[:2], tmp_path / "file", **WORDS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"needs the package matplotlib; .*\[plots\]"):
        document.write(complete()[:2], tmp_path, **WORDS)
