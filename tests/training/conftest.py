"""Runs that the tests of this folder share; no test may change their directories."""

import functools

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


class FineTuned:
    """Dialogues, a model to start from with its parameters, and a recorded run; each is made when it is needed."""

    def __init__(self, directory):
        self._directory = directory

    @functools.cached_property
    def dataset(self):
        return fine_tuning.make_dialogues(self._directory("dialogues"))

    @functools.cached_property
    def start(self):
        return fine_tuning.save_base(self._directory("start"), self.dataset)

    @functools.cached_property
    def run(self):
        cfg = fine_tuning.tuned(self.dataset, run={"init_from": str(self.start[0])})
        return tiny_run.record(cfg, self._directory("fine_tuned"))


@pytest.fixture(scope="session")
def fine_tuned(tmp_path_factory):
    """Return a fine-tuning run and what it is made of."""
    return FineTuned(tmp_path_factory.mktemp)
