"""Sweeps whose cells are trained on a mixture."""

import json
import shutil
from dataclasses import replace

import pytest
from support import tiny_run, tiny_sweep
from support.tiny_sweep import settings

from diffusionlm.config_mixture import parse
from diffusionlm.data.mixtures import open_mixture
from diffusionlm.errors import UserError
from diffusionlm.scaling.sweep import worker
from diffusionlm.scaling.sweep.recipe import Sweep, check_operational, grid

pytestmark = pytest.mark.usefixtures("one_device", "stubbed")

MIXTURE = "web=0.75,code=0.25"


def cells(mixture=MIXTURE):
    recipe = replace(tiny_sweep.RECIPE, mixture=mixture)
    return grid(recipe, objectives=("mdm",), sizes={"one": tiny_sweep.MODEL}, budgets=(100.5 * tiny_sweep.PER_STEP,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for seed, name in enumerate(("web", "code")):
        shutil.move(tiny_run.make_dataset(folder / f"of_{name}", seed), folder / name)
    return folder


def test_the_mixture_is_part_of_a_cell():
    (cell,), (plain,), (alone,) = cells(), cells(""), cells("web=1")
    assert cell.config.data.mixture == MIXTURE and cell.id != plain.id == alone.id
    assert cell.steps == plain.steps
    with pytest.raises(UserError, match="mixture='web=1;9:code=1' changes at a batch"):
        cells("web=1;9:code=1")
    for name in ("data.mixture", "run.continue_from"):
        with pytest.raises(UserError, match=f"{name}=x is part of what a cell measures"):
            check_operational({name: "x"})


def test_its_datasets_are_in_the_folder_that_a_worker_names(folder, tmp_path):
    sweep = Sweep(tuple(cells()), name="mixed")
    assert len(worker.run(sweep, tmp_path / "sweep", settings(folder)).ran) == 1
    identity = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    mixture = open_mixture(parse(MIXTURE), folder)
    assert identity["dataset"] == mixture.sha256
    rows = min(mixture.datasets[0].size("train") / 0.75, mixture.datasets[1].size("train") / 0.25)
    assert identity["unique_tokens"] == int(rows) * tiny_run.LENGTH  # until a source begins again
    with pytest.raises(UserError, match=f"dataset '{tmp_path}/web' does not exist"):
        worker.run(sweep, tmp_path / "other", settings(tmp_path))
    both = Sweep((*cells(), *cells("")), name="both")
    with pytest.raises(UserError, match="cells of several mixtures"):
        worker.run(both, tmp_path / "both", settings(folder))
