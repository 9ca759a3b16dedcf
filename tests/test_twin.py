"""NAME_arm is the autoregressive twin of every experiment: one trunk, the same data, no trace of masks."""

import dataclasses

import pytest

from diffusionlm import flops
from diffusionlm.errors import UserError
from diffusionlm.registry import experiment, experiment_names
from diffusionlm.twin import autoregressive_twin

MDMS = [name for name in experiment_names() if experiment(name).objective == "mdm"]


@pytest.mark.parametrize("name", MDMS)
def test_every_experiment_has_a_valid_twin(name):
    base = experiment(name)
    twin = autoregressive_twin(base).validate()
    assert (twin.name, twin.objective, twin.mask_id) == (f"{name}_arm", "arm", None)
    assert twin.suppressed_ids == ()
    assert (twin.data, twin.run, twin.mesh) == (base.data, base.run, base.mesh)
    trunks = [flops.parameters(cfg.model).non_embedding for cfg in (base, twin)]
    assert trunks[0] == trunks[1]
    assert experiment(f"{name}_arm").objective == "arm"


@pytest.mark.parametrize("name", ["smdm_170m", "arithmetic", "reversal"])
def test_the_derived_twin_is_the_one_that_was_written_by_hand(name):
    assert autoregressive_twin(experiment(name)) == experiment(f"{name}_arm")


def test_a_run_that_begins_as_an_autoregressive_model_has_a_twin_of_its_first_rate():
    base = experiment("tinystories")
    twin = autoregressive_twin(base)
    assert twin.optim == dataclasses.replace(base.optim, peak_lr=base.optim.arm_peak_lr, arm_peak_lr=0.0)
    assert twin.diffusion.arm_steps == 0 and twin.diffusion.random_length == base.diffusion.random_length


def test_an_autoregressive_experiment_has_no_twin():
    with pytest.raises(UserError, match="'demo_arm' is autoregressive itself, so it has no twin 'demo_arm_arm'"):
        experiment("demo_arm_arm")
