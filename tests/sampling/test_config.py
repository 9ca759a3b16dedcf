"""Defaults for each kind of model; meaningless values are refused."""

import pytest

from diffusionlm.errors import UserError
from diffusionlm.sampling.config import SamplingConfig


def test_defaults_are_one_token_a_step_in_the_order_of_the_objective():
    mdm, arm = (SamplingConfig(length=5).resolve(autoregressive=arm) for arm in (False, True))
    assert (mdm.steps, mdm.strategy) == (5, "ancestral") and (arm.steps, arm.strategy) == (5, "left_to_right")


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(length=0), ["length=0", "1"]),
        (dict(length=-3), ["length=-3"]),
        (dict(length="8"), ["length='8'", "integer"]),
        (dict(steps=0), ["steps=0"]),
        (dict(seed=-1), ["seed=-1"]),
        (dict(temperature=-0.5), ["temperature=-0.5"]),
        (dict(temperature=float("nan")), ["temperature=nan"]),
        (dict(temperature=1e30), ["temperature=1e+30"]),
        (dict(strategy="low_confidance"), ["low_confidance", "did you mean 'low_confidence'"]),
        (dict(steps=2, block_length=2, length=8), ["steps=2", "4 blocks"]),
        (dict(top_p=0.0), ["top_p=0.0"]),
        (dict(top_k=-1), ["top_k=-1"]),
        (dict(guidance=-0.1), ["guidance=-0.1"]),
        (dict(threshold=1.5), ["threshold=1.5"]),
        (dict(strategy="entropie"), ["'entropie'", "'entropy'"]),
        (dict(cache="duel"), ["'duel'", "'dual'"]),
        (dict(guidance_kind="standart"), ["'standart'", "'standard'"]),
        (dict(cache="causal"), ["cache=causal", "masked diffusion", "none or prefix or dual"]),
        (dict(refresh=3), ["refresh=3", "needs cache"]),
    ],
)
def test_settings_without_meaning_are_refused(settings, words):
    with pytest.raises(UserError) as error:
        SamplingConfig(**settings).resolve(autoregressive=False)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(strategy="ancestral"), ["strategy=ancestral", "autoregressive"]),
        (dict(length=8, steps=4), ["steps=4", "autoregressive"]),
        (dict(cache="dual"), ["cache=dual", "autoregressive", "causal or none"]),
    ],
)
def test_settings_that_an_autoregressive_model_cannot_have_are_refused(settings, words):
    with pytest.raises(UserError) as error:
        SamplingConfig(**settings).resolve(autoregressive=True)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
