"""Results of finished cells, read from their files."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from support import mutated_json, tiny_sweep

from diffusionlm.errors import UserError
from diffusionlm.scaling.commands import get
from diffusionlm.scaling.sweep import results, status
from diffusionlm.scaling.sweep.recipe import Sweep, grid

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
        assert result.objective in results.OBJECTIVES and result.flops > 0
        assert result.budget > 0 or math.isnan(result.budget)  # a point of others may belong to none
        counts = (result.params, result.params_non_embedding, result.tokens, result.unique_tokens, result.steps)
        assert all(type(count) is int and count > 0 for count in counts) and not result.loss_stderr < 0
        assert all(len(point) == 2 for point in result.curve)
    assert mutation.kind not in ("missing", "extra") or mutation.path[-1] == 0 or isinstance(mutation.path[-1], int)


@pytest.fixture
def road(finished, sweep):
    """The tiny sweep as a road, whose single cell has finished in a directory of its own."""
    recipe = replace(tiny_sweep.RECIPE, arm_share=0.5)
    cells = grid(recipe, objectives=("mdm",), sizes={"one": tiny_sweep.MODEL}, budgets=(100.5 * tiny_sweep.PER_STEP,))
    directory = finished.parent / "road"
    shutil.copytree(finished / "cells" / sweep.cells[0].id, directory / "cells" / cells[0].id)
    (directory / "sweep.json").write_text((finished / "sweep.json").read_text().replace("tiny", "road"))
    return Sweep(tuple(cells), name="road", others=sweep.cells), directory


def test_a_road_keeps_its_exact_autoregressive_losses(road):
    sweep, directory = road
    cell = directory / "cells" / sweep.cells[0].id
    done = json.loads((cell / "DONE.json").read_text())
    done["eval"] |= {"autoregressive_nats_per_token": 3.5, "autoregressive_bits_per_byte": 1.5}
    (cell / "DONE.json").write_text(json.dumps(done))
    with (cell / "metrics.jsonl").open("a") as file:
        for step, loss in ((50, 3.25), (100, 3.5)):
            figures = {f"eval_autoregressive_{unit}": loss for unit in ("nats_per_token", "bits_per_byte")}
            figures["eval_nelbo_nats_per_token"] = 3.25
            file.write(json.dumps({"step": step, **figures}) + "\n")
    (result,), _ = results.read(sweep, directory)
    assert (result.objective, result.arm_share) == ("arm50", 0.5)
    assert (result.first_autoregressive_loss, result.autoregressive_loss) == (3.25, 3.5)
    path = directory / "results.json"
    path.write_text(results.to_json([result]))
    assert results.load(path) == [result]
    with (cell / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "eval_autoregressive_nats_per_token": "low"}\n')
    with pytest.raises(UserError, match="eval_autoregressive_nats_per_token"):
        results.read(sweep, directory)


def test_results_of_before_are_read_and_written_unchanged(tmp_path):
    assert results.to_json(results.load(SHIPPED)) == SHIPPED.read_text()
    cells = results.load(SHIPPED)
    assert {(cell.arm_share, cell.autoregressive_loss) for cell in cells} == {(0.0, None)}


@pytest.mark.parametrize(
    ("field", "value"), [("objective", "arm50/.."), ("objective", "rnn"), ("arm_share", 1.0), ("arm_share", -0.1)]
)
def test_a_road_that_cannot_be_is_refused(tmp_path, field, value):
    rows = json.loads(SHIPPED.read_text())[:1]
    (tmp_path / "results.json").write_text(json.dumps([rows[0] | {field: value}]))
    with pytest.raises(UserError, match=field):
        results.load(tmp_path / "results.json")


def test_cells_of_another_sweep_are_reused(road, finished, sweep, tmp_path):
    """A cell that both sweeps have is taken from the other, unless it has finished here."""
    mine, directory = road
    path = tmp_path / "results.json"
    others, _ = results.read(sweep, finished)
    path.write_text(results.to_json(others))
    own, _ = results.read(mine, directory)
    assert results.read(mine, directory, reuse=path) == (own + others, 0)
    assert results.read(mine, directory, everything=True) == (own, 3)
    assert results.read(mine, directory, everything=True, reuse=path) == (own + others, 0)
    assert results.read(sweep, finished, reuse=path) == (others, 0), "none is there twice"


def test_what_cannot_be_compared_is_not_reused(road, finished, sweep, tmp_path):
    mine, directory = road
    with pytest.raises(UserError, match=r"cannot read .*missing.json: No such file"):
        results.read(mine, directory, reuse=tmp_path / "missing.json")
    with pytest.raises(UserError, match=r"has no cell of sweep 'road'; give the results.json of one that shares some"):
        results.read(mine, directory, reuse=SHIPPED)
    others, _ = results.read(sweep, finished)
    path = tmp_path / "results.json"
    path.write_text(results.to_json([replace(other, unique_tokens=7) for other in others]))
    with pytest.raises(UserError, match=r"training on other text: 7 different tokens there, [\d,]+ in this sweep"):
        results.read(mine, directory, reuse=path)
