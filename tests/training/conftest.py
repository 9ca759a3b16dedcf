"""Runs that the tests of this folder share; no test may change their directories."""

from types import SimpleNamespace

import jax
import pytest
from support import fine_tuning, tiny_run

from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.training import loop as trainer


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Train on one of the eight devices, which is quicker, as `tiny_run.record` does unless it is asked for more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        yield


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return tiny_run.make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def uninterrupted(dataset, tmp_path_factory):
    """Return a run from start to end, and what its steps were given."""
    return tiny_run.record(tiny_run.tiny(dataset), tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="session")
def fine_tuned(tmp_path_factory):
    """Return a dataset of dialogues, a model to start from with its parameters, and a recorded fine-tuning run."""
    dataset = fine_tuning.make_dialogues(tmp_path_factory.mktemp("dialogues"))
    start = fine_tuning.save_base(tmp_path_factory.mktemp("start"), dataset)
    cfg = fine_tuning.tuned(dataset, run={"init_from": str(start[0])})
    return SimpleNamespace(
        dataset=dataset, start=start, run=tiny_run.record(cfg, tmp_path_factory.mktemp("fine_tuned"))
    )
