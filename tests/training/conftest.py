"""Runs that the tests of this folder share; no test may change their directories."""

from types import SimpleNamespace

import pytest
from support import fine_tuning, tiny_run


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return tiny_run.make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def uninterrupted(dataset, tmp_path_factory):
    """Return a run from start to end on eight devices, and what its steps were given."""
    return tiny_run.record(tiny_run.tiny(dataset), tmp_path_factory.mktemp("uninterrupted"), mesh_devices=8)


@pytest.fixture(scope="session")
def fine_tuned(tmp_path_factory):
    """Return a dataset of dialogues, a model to start from with its parameters, and a recorded fine-tuning run."""
    dataset = fine_tuning.make_dialogues(tmp_path_factory.mktemp("dialogues"))
    start = fine_tuning.save_base(tmp_path_factory.mktemp("start"), dataset)
    cfg = fine_tuning.tuned(dataset, run={"init_from": str(start[0])})
    return SimpleNamespace(
        dataset=dataset, start=start, run=tiny_run.record(cfg, tmp_path_factory.mktemp("fine_tuned"))
    )
