"""The digest in the id of a cell."""

from dataclasses import replace

import pytest

from diffusionlm.config import Config
from diffusionlm.config_io import with_fields
from diffusionlm.fingerprint import scientific_fields
from diffusionlm.scaling.sweep import identity


def test_it_depends_on_science_and_not_on_operation():
    config = Config()
    moved = with_fields(config, {"data.path": "elsewhere", "mesh.tensor": 2, "run.microbatches": 2})
    assert identity.digest(moved) == identity.digest(config)
    for changes in ({"run.seed": 1}, {"optim.peak_lr": 1e-3}, {"diffusion.alignment": "shifted"}):
        assert identity.digest(with_fields(config, changes)) != identity.digest(config), changes


@pytest.mark.parametrize("name", ["model.new", "objective.new"])
def test_a_new_field_at_its_default_changes_nothing(monkeypatch, name):
    config = replace(Config(), run=replace(Config().run, seed=3))
    before = identity.digest(config)

    def with_new_field(value):
        return lambda config: scientific_fields(config) | {name: value if config.run.seed == 3 else 0}

    monkeypatch.setattr(identity, "_defaults", lambda: scientific_fields(Config()) | {name: 0})
    monkeypatch.setattr(identity, "scientific_fields", with_new_field(0))
    assert identity.digest(config) == before
    monkeypatch.setattr(identity, "scientific_fields", with_new_field(1))
    assert identity.digest(config) != before


def test_a_removed_field_changes_nothing(monkeypatch):
    before = identity.digest(Config())

    def without(config):
        return {name: value for name, value in scientific_fields(config).items() if name != "diffusion.timesteps"}

    monkeypatch.setattr(identity, "scientific_fields", without)
    assert identity.digest(Config()) == before
