"""Numbers of numpy are taken like Python's by every setting, and truth values by none that is a number."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusionlm import config_io, presets
from diffusionlm.config import Config
from diffusionlm.config_fields import Canonical, _kinds, check_fields, field_types
from diffusionlm.errors import UserError
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.scalars import is_real, is_whole, native, real, whole
from diffusionlm.scaling.sweep.recipe import ScalingRecipe, grid

RECIPE = ScalingRecipe("test", sequence_length=16, batch_size=8, peak_lr=1e-3, lr_width=64)
WHOLE = [np.int8, np.int32, np.int64, np.uint16, np.array]
REAL = [np.float16, np.float32, np.float64, np.array]


def number_fields(settings):
    """Yield the name of each field that holds a number, with its kind and its value or one that is as good."""
    for name, hint in field_types(type(settings)).items():
        kinds = _kinds(hint)
        kind = float if float in kinds else int if int in kinds else None
        if kind is not None and bool not in kinds:
            value = getattr(settings, name)
            yield name, kind, kind(8 if value is None else value)


PARTS = [
    *(part for part in vars(Config()).values() if dataclasses.is_dataclass(part)),
    SamplingConfig(),
    LikelihoodConfig(),
    RECIPE,
]
FIELDS = [
    pytest.param(part, *field, id=f"{type(part).__name__}.{field[0]}")
    for part in PARTS
    for field in number_fields(part)
]


def check(settings):
    """Check settings of any kind by their own rules."""
    if isinstance(settings, Canonical):
        check_fields(settings)
    elif not isinstance(settings, ScalingRecipe):  # which checks itself
        settings.validate()


@pytest.mark.parametrize(("part", "name", "kind", "value"), FIELDS)
def test_every_number_may_be_one_of_numpy_and_is_stored_as_python_s(part, name, kind, value):
    for scalar in WHOLE if kind is int else REAL:
        if kind is int and scalar in (np.int8, np.uint16) and not 0 <= value < 128:
            continue  # which it cannot hold
        given = scalar(value)
        stored = getattr(dataclasses.replace(part, **{name: given}), name)
        assert type(stored) is kind and stored == kind(given.item())
    check(dataclasses.replace(part, **{name: (np.int64 if kind is int else np.float64)(value)}))


@pytest.mark.parametrize(("part", "name", "kind", "value"), FIELDS)
@pytest.mark.parametrize("truth", [True, np.True_], ids=["True", "np.True_"])
def test_a_truth_value_is_no_number(part, name, kind, value, truth):
    with pytest.raises(UserError, match=rf"{name}=True") as error:
        check(dataclasses.replace(part, **{name: truth}))
    assert "\n" not in str(error.value)


def test_configs_of_numpy_s_numbers_are_written_and_hashed_as_python_s():
    cfg = Config()
    model = dataclasses.replace(cfg.model, d_model=np.int64(cfg.model.d_model), rope_theta=np.float64(1e4))
    optim = dataclasses.replace(cfg.optim, peak_lr=np.float64(cfg.optim.peak_lr))
    same = dataclasses.replace(cfg, model=model, optim=optim)
    plain = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, rope_theta=10000))
    assert json.dumps(config_io.to_dict(same)) == json.dumps(config_io.to_dict(plain))


def test_grids_take_the_budgets_and_seeds_that_numpy_makes():
    sizes = {"smdm_6m": presets.get("smdm_6m")}
    cells = [
        grid(RECIPE, objectives=["mdm"], sizes=sizes, budgets=budgets, seeds=seeds)
        for budgets, seeds in (([1e15, 1e16], [0, 1]), (np.geomspace(1e15, 1e16, 2), np.arange(2)))
    ]
    assert [cell.id for cell in cells[0]] == [cell.id for cell in cells[1]]
    assert {type(cell.budget) for cell in cells[1]} == {float} and {type(cell.seed) for cell in cells[1]} == {int}
    with pytest.raises(UserError, match="budget=True must be a positive"):
        grid(RECIPE, objectives=["mdm"], sizes=sizes, budgets=[True])


@pytest.mark.slow
@given(st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(), st.booleans(), st.text(), st.none(), st.just([1])))
def test_native_returns_python_s_equal_and_leaves_the_rest(value):
    assert native(value) is value or (type(native(value)) is type(value) and native(value) == value)
    scalar = {int: np.int64, float: np.float64, bool: np.bool_}.get(type(value))
    if scalar is not None:
        converted = native(scalar(value))
        assert type(converted) is type(value)
        assert converted == value or (math.isnan(value) and math.isnan(converted))
    assert is_whole(native(value)) == (type(value) is int)
    assert is_real(native(value)) == (type(value) in (int, float) and value == value)


@pytest.mark.parametrize("value", [True, np.True_, 1.0, np.float32(1), "1", None, [1], np.array([1]), 0, np.int64(0)])
def test_whole_refuses_what_is_no_integer_or_too_small(value):
    with pytest.raises(UserError, match=r"n=.* must be (an integer|at least 1)"):
        whole("n", value, 1)


@pytest.mark.parametrize("value", [True, np.True_, "1", None, np.nan, np.inf, np.array([0.5])])
def test_real_refuses_what_is_no_finite_number(value):
    with pytest.raises(UserError, match=r"x=.* must be a finite number"):
        real("x", value)
