"""Results of finished cells, read from their files."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from diffusionlm.errors import UserError
from diffusionlm.scaling.commands import get
from diffusionlm.scaling.sweep import results, status

SHIPPED = Path(__file__).parents[3] / "docs" / "results" / "isoflop_cpu" / "results.json"


@pytest.mark.parametrize("content", ["", "[]", "3", "{}", '{"eval": {}}', '{"eval": []}', '{"eval": {"x": 1}}'])
def test_a_damaged_result_is_named(finished, sweep, content):
    (finished / "cells" / sweep.cells[0].id / "DONE.json").write_text(content)
    for read in (results.read, status.status):
        with pytest.raises(UserError, match=r"DONE.json.* is damaged .*; delete "):
            read(sweep, finished)


@pytest.fixture
def with_nulls(finished, sweep):
    """The directory of the finished sweep, with null for each number of the first cell's evaluation and losses."""
    directory = finished / "cells" / sweep.cells[0].id
    nothing = dict.fromkeys(("nelbo_nats_per_token", "nelbo_stderr", "bits_per_byte"))
    (directory / "DONE.json").write_text(json.dumps({"eval": {**nothing, "nelbo_per_draw": [None, None]}}))
    (directory / "metrics.jsonl").write_text('{"step": 50, "loss": null}\n{"step": 100, "loss": null}\n')
    return finished


def test_an_evaluation_that_is_not_finite_is_nan_among_the_other_results(with_nulls, sweep, tmp_path):
    cells, unfinished = results.read(sweep, with_nulls)
    assert not unfinished and [math.isfinite(cell.loss) for cell in cells] == [False, True, True]
    first = cells[0]
    losses = [loss for _, loss in first.curve]
    assert all(map(math.isnan, (first.loss_stderr, first.bits_per_byte, *first.loss_per_draw, *losses)))
    (tmp_path / "results.json").write_text(results.to_json(cells))
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    again = results.load(tmp_path / "results.json")
    assert math.isnan(again[0].loss) and again[1:] == cells[1:]


def test_the_status_names_an_evaluation_that_is_not_finite(with_nulls, sweep):
    first, *others = status.status(sweep, with_nulls).cells
    assert (first.state, first.note) == ("done", "its evaluation is not finite") and math.isnan(first.loss)
    assert all(cell.state == "done" and cell.loss > 0 and not cell.note for cell in others)


@pytest.mark.parametrize("content", ["3\n", '{"loss": 1, "step_seconds": 1}\n', '{"step": 1, "loss": "x"}\n'])
def test_damaged_metrics_are_named(finished, sweep, content):
    cell = finished / "cells" / sweep.cells[0].id
    (cell / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match="metrics.jsonl beside it, is damaged"):
        results.read(sweep, finished)
    (cell / "DONE.json").unlink()
    if "x" not in content:  # the status does not read losses of unfinished cells
        with pytest.raises(UserError, match="metrics.jsonl is damaged"):
            status.status(sweep, finished)


def test_the_numbers_of_a_finished_sweep_survive_a_file(finished, sweep, tmp_path):
    cells, unfinished = results.read(sweep, finished)
    assert len(cells) == 3 and not unfinished
    (tmp_path / "results.json").write_text(results.to_json(cells))
    assert results.load(tmp_path / "results.json") == cells


def test_shipped_results_are_those_of_the_registered_cells():
    """A finished cell is found by its id, which therefore must not change."""
    shipped = {result.id: result for result in results.load(SHIPPED)}
    cells = {cell.id: cell for cell in get("isoflop_cpu").select()}
    assert set(shipped) == set(cells) and len(cells) == 71
    for name, result in shipped.items():
        cell = cells[name]
        planned = {key: getattr(cell, key) for key in ("budget", "flops", "params", "tokens", "steps", "seed")}
        assert planned == {key: asdict(result)[key] for key in planned}
