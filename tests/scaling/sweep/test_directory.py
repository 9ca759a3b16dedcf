"""The directory of a sweep: it belongs to one sweep and one dataset."""

from dataclasses import replace

import pytest
from support import tiny_run, tiny_sweep
from support.tiny_sweep import settings

from diffusionlm.errors import UserError
from diffusionlm.scaling.sweep import results, status, worker
from diffusionlm.scaling.sweep.recipe import grid

pytestmark = pytest.mark.usefixtures("one_device", "stubbed")


@pytest.mark.slow
def test_a_changed_recipe_does_not_hide_the_cells_that_were_planned_before(finished, sweep, dataset, caplog):
    changed = replace(sweep, cells=sweep.cells[:2])
    assert status.status(changed, finished).unplanned == (sweep.cells[2].id,)
    with pytest.raises(UserError, match="is of sweep 'tiny', not 'other'"):
        status.status(replace(sweep, name="other"), finished)
    recipe = replace(tiny_sweep.RECIPE, peak_lr=3e-3)
    sizes, budgets = {"one": tiny_sweep.MODEL}, (100.5 * tiny_sweep.PER_STEP,)
    edited = replace(sweep, cells=tuple(grid(recipe, objectives=("mdm",), sizes=sizes, budgets=budgets)))
    with pytest.raises(UserError, match="holds 3 cells, and none is of this sweep, whose recipe must have changed"):
        worker.run(edited, finished, settings(dataset))
    caplog.clear()
    assert worker.run(changed, finished, settings(dataset)).done == tuple(cell.id for cell in changed.select())
    assert "1 of the 3 cells" in caplog.text and "the recipe asks for" not in caplog.text


@pytest.mark.slow
def test_directories_and_data_are_not_mixed_up(finished, dataset, sweep, tmp_path):
    with pytest.raises(UserError, match="holds another sweep: sweep tiny there, other here"):
        worker.run(replace(sweep, name="other"), finished, settings(dataset))
    another = tiny_run.make_dataset(tmp_path / "data", seed=1)
    with pytest.raises(UserError, match="begun with other data: dataset .* there.*--data.path"):
        worker.run(sweep, finished, settings(another))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot continue the sweep in .*file: "):
        worker.run(sweep, tmp_path / "file", settings(dataset))
    with pytest.raises(UserError, match="has no sweep.json, so no worker has begun there"):
        results.read(sweep, tmp_path / "new")
    with pytest.raises(UserError, match="is of sweep 'tiny'"):
        results.read(replace(sweep, name="other"), finished)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"sweep": "tiny", "dataset": "x"}', b"\xff"])
def test_a_damaged_identity_is_named(dataset, sweep, tmp_path, content):
    (tmp_path / "sweep.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    actions = [lambda: results.read(sweep, tmp_path), lambda: status.status(sweep, tmp_path)]
    for action in [*actions, lambda: worker.run(sweep, tmp_path, settings(dataset))]:
        with pytest.raises(UserError, match="sweep.json is damaged .*; delete it"):
            action()
