"""Results of finished cells, read from their files."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from support import mutated_json

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
    done = json.loads((directory / "DONE.json").read_text())
    evaluation = {**nothing, "nelbo_per_draw": [None, None]}
    (directory / "DONE.json").write_text(json.dumps(done | {"eval": evaluation}))
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


ROWS = json.loads(SHIPPED.read_text())[:2]
for row in ROWS:
    row["curve"] = row["curve"][:2]


@hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
def test_a_results_file_with_one_change_is_refused_in_one_line_or_makes_sense(data, tmp_path):
    mutation = data.draw(mutated_json.mutations(ROWS))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(mutation.values))
    try:
        loaded = results.load(path)
    except UserError as error:
        message = str(error)
        assert "results.json" in message and "\n" not in message and "\x1b" not in message and len(message) < 600
        return
    for result in loaded:
        assert result.objective in ("mdm", "arm") and result.budget > 0 and result.flops > 0
        counts = (result.params, result.params_non_embedding, result.tokens, result.unique_tokens, result.steps)
        assert all(type(count) is int and count > 0 for count in counts) and not result.loss_stderr < 0
        assert all(len(point) == 2 for point in result.curve)
    assert mutation.kind not in ("missing", "extra") or mutation.path[-1] == 0 or isinstance(mutation.path[-1], int)
