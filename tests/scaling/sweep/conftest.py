"""A dataset, a tiny sweep, and a directory in which it is finished without any training."""

import shutil

import jax
import pytest
from support import tiny_run, tiny_sweep

from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.scaling.sweep import worker
from diffusionlm.training import loop as trainer


@pytest.fixture(scope="module")
def one_device():
    """Train on one of the eight devices of the tests, as a worker process does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        yield


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return tiny_run.make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def sweep():
    return tiny_sweep.tiny_sweep()


@pytest.fixture
def stubbed(monkeypatch):
    """Replace training by writing the files of a finished run."""
    monkeypatch.setattr(trainer, "train", tiny_sweep.stub_train)


@pytest.fixture(scope="session")
def finished_once(dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        patch.setattr(trainer, "train", tiny_sweep.stub_train)
        worker.run(tiny_sweep.tiny_sweep(), workdir, tiny_sweep.settings(dataset))
    return workdir


@pytest.fixture
def finished(finished_once, one_device, stubbed, tmp_path):
    """The directory of a sweep that one worker has finished."""
    return shutil.copytree(finished_once, tmp_path / "finished")
