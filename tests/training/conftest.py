"""One uninterrupted run for all tests of this folder."""

import pytest
from support import tiny_run


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return tiny_run.make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def uninterrupted(dataset, tmp_path_factory):
    """Return a run from start to end on eight devices, and what its steps were given; tests must not change it."""
    return tiny_run.record(tiny_run.tiny(dataset), tmp_path_factory.mktemp("uninterrupted"), mesh_devices=8)
