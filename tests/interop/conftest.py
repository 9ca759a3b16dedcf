"""Fixtures for importing and exporting: a ladder of one tiny model, and checkpoints that tests share."""

import functools

import numpy as np
import pytest
from support.foreign_weights import TINY_SMDM, import_options, make_source, save_native

import diffusionlm as dlm
from diffusionlm import presets


@pytest.fixture(scope="module", autouse=True)
def tiny_ladder():
    """Replace SMDM's ladder by one tiny size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "names", lambda: ["smdm_tiny"])
        patch.setattr(presets, "get", lambda name: TINY_SMDM)
        yield


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    """Return a function: the checkpoint that a family's tiny model is imported to, once a family and dtype."""

    @functools.cache
    def path(family, dtype=np.float32):
        directory = tmp_path_factory.mktemp(family)
        source = make_source(family, directory / "source", dtype)
        return dlm.import_weights(source, directory / "model", **import_options(family))

    return path


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    """Return a function: a checkpoint that was made here, once for each alignment and model config."""

    @functools.cache
    def path(alignment="same", **changes):
        directory = tmp_path_factory.mktemp("native") / "model"
        save_native(directory, alignment, **changes)
        return directory

    return path
