"""Comparisons of results: differences with their errors, item by item where that is possible."""

import json
import math

import numpy as np
import pytest
from support.command_line import assert_one_line

from diffusionlm.cli import main as cli
from diffusionlm.evaluation import report

SHA = "0" * 64


def write(path, metrics, records=None, task="infilling", **config):
    """A result, with the values of its items by the names of their texts."""
    path.parent.mkdir(exist_ok=True)
    figures = {name: {"value": value, "stderr": stderr} for name, (value, stderr) in metrics.items()}
    values = {"task": task, "metrics": figures, "config": config, "checkpoint": "x", "params_sha256": SHA}
    if records is not None:
        values["records"] = path.stem + ".items.jsonl"
        lines = [{"task": task, "version": "1", "params_sha256": SHA, "options": {}}]
        for key, record in records.items():
            lines.append({"sha256": key * 64, "seconds": 0.5, "record": record})
        path.with_name(values["records"]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    path.write_text(json.dumps(values))
    return path


def scores(values):
    """Records of one score, and their mean with its error."""
    n = len(values)
    mean = (float(np.mean(list(values.values()))), float(np.std(list(values.values()), ddof=1) / math.sqrt(n)))
    return {key: {"rouge1": value} for key, value in values.items()}, mean


def test_a_mean_over_items_is_compared_item_by_item(tmp_path):
    """The items b, c and d are shared, and differ by 0.1, 0.3 and 0.2: mean 0.2, variance 0.01."""
    first, mean1 = scores({"a": 0.9, "b": 0.1, "c": 0.5, "d": 0.2})
    other, mean2 = scores({"d": 0.4, "b": 0.2, "c": 0.8})
    paths = [write(tmp_path / "1.json", {"rouge1": mean1}, first), write(tmp_path / "2.json", {"rouge1": mean2}, other)]
    a, b = report.read(paths)
    change = report.difference("rouge1", a, b)
    assert change.value == pytest.approx(0.2) and change.stderr == pytest.approx(0.1 / math.sqrt(3))
    assert change.paired == 3


def test_a_sum_over_items_is_not_taken_for_a_mean(tmp_path):
    records = {"a": {"tokens": 3}, "b": {"tokens": 5}}
    paths = [write(tmp_path / f"{n}.json", {"tokens": (8 + n, 0)}, records) for n in (0, 1)]
    assert report.difference("tokens", *report.read(paths)) == (1, 0, 0)


def test_records_without_a_metric_and_values_of_items_are_understood(tmp_path):
    """Two directions of one task share a file of records; the harness' documents come as values of items."""
    records = [{"a": {"same": 1}, "b": {"same": 0}, "c": {"back": second}} for second in (0, 1)]
    items = [{"acc": {"x": 1.0, "y": 0.0, "z": float(n)}} for n in (0, 1)]
    paths = []
    for n in (0, 1):
        figures = {"same": (0.5, 0.1), "acc": ((1 + n) / 3, 0.3)}
        path = write(tmp_path / f"{n}.json", figures, records[n])
        path.write_text(json.dumps(json.loads(path.read_text()) | {"items": items[n]}))
        paths.append(path)
    a, b = report.read(paths)
    assert report.difference("same", a, b) == (0, None, 2)
    change = report.difference("acc", a, b)  # 0, 0 and 1: mean 1/3, variance 1/3
    assert (change.value, change.stderr, change.paired) == (pytest.approx(1 / 3), pytest.approx(1 / 3), 3)


def test_independent_figures_add_their_variances(tmp_path):
    a, b = report.read([write(tmp_path / "a.json", {"x": (1, 0.3)}), write(tmp_path / "b.json", {"x": (3, 0.4)})])
    assert report.difference("x", a, b) == (2, 0.5, 0)
    c = report.read([write(tmp_path / "c.json", {"x": (3, None), "y": (None, None)})])[0]
    assert report.difference("x", a, c) == (2, None, 0) and report.difference("y", a, c) is None


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        ((0.12345, 0.0278), "0.123 \u00b1 0.028"),
        ((-12.3, 1.234), "-12.3 \u00b1 1.2"),
        ((1234.5, 21.9), "1,234 \u00b1 22"),
        ((0.5, 0.0), "0.5000"),
        ((12345, 0.0), "12,345"),
        ((0.5, None), "0.5000 \u00b1 ?"),
        ((None, None), ""),
    ],
)
def test_figures_have_two_digits_of_their_error(tmp_path, figure, text):
    table = report.tables(report.read([write(tmp_path / "a.json", {"x": figure})]))[0]
    assert table.rows == [["x", text]]


def test_tables_name_what_differs(tmp_path, capsys):
    a = write(tmp_path / "one" / "r.json", {"x": (1, 0.1), "only": (2, 0)}, guidance=0.0, steps=8)
    b = write(tmp_path / "two" / "r.json", {"x": (1, 0.1)}, guidance=0.5, steps=8)
    c = write(tmp_path / "c.json", {"nats": (1, 0.1)}, task="perplexity")
    assert cli.main(["evaluate", "report", str(a), str(b), str(c)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "|  | one/r | two/r | two/r - one/r |" in lines and "| only | 2 |  |  |" in lines
    assert "- differs: guidance: 0.0 (one/r), 0.5 (two/r)" in lines and not any("steps" in line for line in lines)
    assert [line for line in lines if line.startswith("## ")] == ["## infilling", "## perplexity"]


def test_a_page_escapes_what_the_files_hold(tmp_path, capsys):
    path = write(tmp_path / "a.json", {"<b>|": (1, 0.1)}, task="<script>")
    page = tmp_path / "page.html"
    assert cli.main(["evaluate", "report", str(path), "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"written: {page}\n"
    assert "<script>" not in page.read_text() and "&lt;script&gt;" in page.read_text()
    assert "| <b>\\| |" in report.render(report.read([path]), "md")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ["missing RESULTS"]),
        ("{tmp}/none.json", ["none.json does not exist"]),
        ("{tmp}/a.json {tmp}/a.json", ["given twice"]),
        (
            "{tmp}/bad.json",
            ["bad.json is no result of an evaluation", "truncated", "give the .json that --output wrote"],
        ),
        ("{tmp}/half.json", ["half.json is no result of an evaluation", "metrics"]),
        ("{tmp}/a.items.jsonl", ["a.items.jsonl holds the records", "{tmp}/a.json"]),
        ("{tmp}/up.json", ["'../a.items.jsonl'"]),
        ("{tmp}/a.json --output x.txt", ["'x.txt'", ".md or .html"]),
        ("{tmp}/a.json --output {tmp}/none/x.md", ["none"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, parts, capsys):
    write(tmp_path / "a.json", {"x": (1, 0.1)}, {"a": {"x": 1}})
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "half.json").write_text('{"task": "x"}')
    values = json.loads((tmp_path / "a.json").read_text()) | {"records": "../a.items.jsonl"}
    (tmp_path / "up.json").write_text(json.dumps(values))
    assert cli.main(["evaluate", "report", *words.format(tmp=tmp_path).split()]) == 2
    assert_one_line(capsys.readouterr(), [part.format(tmp=tmp_path) for part in parts])
