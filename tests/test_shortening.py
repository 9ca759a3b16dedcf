"""Fewer steps: the proportions of the recipe fit at every length, and a refusal gives the options that work."""

import re

import pytest

from diffusionlm.config_io import with_fields
from diffusionlm.errors import UserError
from diffusionlm.registry import experiment
from diffusionlm.shortening import shortened, validate

NAMES = ["demo", "demo_arm", "tinystories", "llada_8b", "llada_8b_sft", "smdm_170m_road", "diffullama_7b", "mdm_10m"]


@pytest.mark.parametrize("name", NAMES)
def test_every_length_has_valid_proportions(name):
    recipe = experiment(name)
    for steps in {1, 2, 3, 7, 60, 1001, recipe.run.steps // 2, recipe.run.steps - 1}:
        cfg = with_fields(recipe, shortened(recipe, steps))  # which validates
        assert cfg.run.steps == steps
        for part, whole in [("arm_steps", recipe.diffusion.arm_steps), ("anneal_steps", recipe.diffusion.anneal_steps)]:
            here = getattr(cfg.diffusion, part)
            assert (here > 0) == (whole > 0) or part == "anneal_steps" or steps == 1
            assert abs(here - whole * steps / recipe.run.steps) <= 1


def refusal(name, overrides):
    with pytest.raises(UserError) as error:
        validate(experiment(name, overrides))
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("demo", {"run.steps": 60}),
        ("demo", {"run.steps": 300, "diffusion.arm_steps": 290}),
        ("tinystories_arm", {"run.steps": 60}),
        ("mdm_10m_arm", {"run.steps": 20}),
        ("llada_8b", {"run.steps": 100, "optim.decay_steps": 30}),
    ],
)
def test_the_options_of_a_refusal_work(name, overrides):
    message = refusal(name, overrides)
    options = dict(re.findall(r"--([\w.]+) (\d+)", message.partition("that is ")[2]))
    assert int(options["run.steps"]) == overrides["run.steps"]
    assert not set(options) & (set(overrides) - {"run.steps"}), "what was given stays"
    assert validate(experiment(name, overrides | options)).run.steps == overrides["run.steps"]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("demo", {"run.steps": 0}),
        ("demo", {"run.steps": 60, "data.sequence_length": 999}),  # another mistake remains
        ("demo", {"optim.warmup_steps": 100000}),  # steps are as many as in the recipe
        ("demo", {"name": "elsewhere", "run.steps": 60}),  # not registered
    ],
)
def test_other_mistakes_get_no_options(name, overrides):
    assert "that is" not in refusal(name, overrides)
