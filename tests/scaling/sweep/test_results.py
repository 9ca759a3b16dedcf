"""Results of finished cells, read from their files."""

import json
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


def test_an_evaluation_that_is_not_finite_is_named(finished, sweep):
    """The report needs every loss; the status shows the other cells."""
    nothing = dict.fromkeys(("nelbo_nats_per_token", "nelbo_stderr", "bits_per_byte"))
    path = finished / "cells" / sweep.cells[0].id / "DONE.json"
    path.write_text(json.dumps({"eval": {**nothing, "nelbo_per_draw": [None]}}))
    with pytest.raises(UserError, match="the evaluation of cell .* is not finite .*run it again"):
        results.read(sweep, finished)
    cell = next(cell for cell in status.status(sweep, finished).cells if cell.id == sweep.cells[0].id)
    assert (cell.state, cell.loss, cell.note) == ("done", None, "its evaluation is not finite")


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
