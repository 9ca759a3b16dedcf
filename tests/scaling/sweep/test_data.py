"""The dataset of a sweep."""

from dataclasses import replace

import pytest
from support import tiny_sweep
from support.tiny_sweep import settings, stub_train

from diffusionlm.data.pipeline import open_dataset
from diffusionlm.errors import UserError
from diffusionlm.scaling.sweep import worker
from diffusionlm.scaling.sweep.recipe import Sweep, grid
from diffusionlm.training import loop as trainer

pytestmark = pytest.mark.usefixtures("one_device", "stubbed")


def test_data_that_are_missing_or_do_not_fit_are_refused(dataset, sweep, tmp_path):
    with pytest.raises(UserError, match="names no data: give --data.path.* --tokenizer byte --sequence_length 16"):
        worker.run(sweep, tmp_path / "new")
    shorter = replace(tiny_sweep.RECIPE, sequence_length=8)
    other = grid(shorter, objectives=("mdm",), sizes={"one": tiny_sweep.MODEL}, budgets=(1e9,))
    with pytest.raises(UserError, match="has 257 tokens and sequences of 16, and the cells need 257 and 8: make"):
        worker.run(Sweep(tuple(other), name="short"), tmp_path / "short", settings(dataset))


@pytest.mark.slow
def test_a_sweep_prepares_its_own_source(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"word{i} and {i * 7919 % 1000}" for i in range(5_000)))
    model = replace(tiny_sweep.MODEL, vocab_size=300)
    budget = 100.5 * tiny_sweep.RECIPE.flops_per_step(model, "mdm")
    cells = grid(tiny_sweep.RECIPE, objectives=("mdm",), sizes={"one": model}, budgets=(budget,))
    opened = []

    def train(cfg, workdir, **options):
        opened.append(open_dataset(cfg.data.path).metadata.vocab_size)
        return stub_train(cfg, workdir, **options)

    monkeypatch.setattr(trainer, "train", train)
    sweep = tiny_sweep.tiny_sweep(cells=tuple(cells), source=str(text))
    assert len(worker.run(sweep, tmp_path / "sweep").ran) == 1
    assert (tmp_path / "sweep" / "data" / "meta.json").exists() and opened == [300]
