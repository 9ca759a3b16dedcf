"""JSON, fingerprints, and clear errors for impossible values."""

import ast
import dataclasses
import functools
import inspect
import json
import math
import re
import traceback
from operator import attrgetter
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command_line import PLAIN
from support.invalid_configs import INVALID

from diffusionlm import config, config_data, config_fields, config_io, config_mixture, config_model, fingerprint
from diffusionlm.config import Config
from diffusionlm.errors import UserError
from diffusionlm.options import fields
from diffusionlm.registry import experiment, experiment_names

# What may change between two processes of one run: names, paths, devices, memory trade-offs, and what is written when.
OPERATIONAL = {
    "name",
    "model.remat",
    "model.head_chunk",
    "data.path",
    "data.max_epochs",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "run.microbatches",
    "run.init_from",
    "run.continue_from",
    "run.log_every",
    "run.eval_every",
    "run.checkpoint_every",
    "run.checkpoint_minutes",
    "run.keep",
    "run.keep_every",
    "run.profile_start",
    "run.profile_steps",
    "run.showcase",
    "safety.spike_factor",
    "safety.max_skips",
    "safety.max_rollbacks",
    "safety.rollback_lr",
}


def another(hint, value):
    """A value of the same type that is not `value`."""
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if hint is bool:
        return not value
    if hint is str:
        return value + "x"
    if hint is float:
        return value / 2 or 0.5  # in the range of every field
    return 7 if value is None else value + 1


def changed(cfg, name):
    """`cfg` with another value in the field of that dotted name."""
    head, _, rest = name.partition(".")
    value = getattr(cfg, head)
    hint = fields(type(cfg)).get(name)
    return dataclasses.replace(cfg, **{head: changed(value, rest) if rest else another(hint, value)})


def test_the_list_of_operational_fields_has_no_others():
    assert OPERATIONAL <= set(fields(Config))


@pytest.mark.parametrize("name", fields(Config))
def test_the_fingerprint_changes_with_the_science_only(name):
    before, after = Config(), changed(Config(), name)
    assert attrgetter(name)(before) != attrgetter(name)(after)
    assert (fingerprint.fingerprint(before) == fingerprint.fingerprint(after)) == (name in OPERATIONAL)


FINGERPRINTS = {
    "llada_1b": "0339d32269ce",
    "llada_8b": "250d7f38a83f",
    "smdm_170m": "7c35fb933a43",
    "smdm_1028m_rsl": "f488e57b5be5",
    "tinystories": "9ac2a92d6389",
    "tinystories_arm": "0df12e9d00ef",
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprints_of_experiments_stay(name):
    """A change of a recipe changes its entry; a new scientific field is a `later` one and changes none."""
    assert fingerprint.fingerprint(experiment(name)) == FINGERPRINTS[name]


def test_the_fingerprint_tells_which_field_holds_a_value():
    a = dataclasses.replace(Config(), optim=dataclasses.replace(Config().optim, beta1=0.5, beta2=0.6))
    b = dataclasses.replace(Config(), optim=dataclasses.replace(Config().optim, beta1=0.6, beta2=0.5))
    assert fingerprint.fingerprint(a) != fingerprint.fingerprint(b)


@pytest.mark.parametrize("name", fields(Config))
def test_json_keeps_every_field(name):
    cfg = changed(Config(), name)
    assert config_io.from_json(config_io.to_json(cfg)) == cfg


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_is_valid_and_survives_json(name):
    cfg = experiment(name).validate()
    again = config_io.from_json(config_io.to_json(cfg))
    assert again == cfg
    assert fingerprint.fingerprint(again) == fingerprint.fingerprint(cfg)


def test_json_without_a_field_takes_its_default():
    values = config_io.to_dict(Config())
    del values["run"]["steps"], values["mesh"]
    assert config_io.from_dict(Config, values) == Config()


@pytest.mark.parametrize(
    "values, parts",
    [
        ({"modle": {}}, ["'modle'", "'model'"]),
        ({"model": {"d_modle": 3}}, ["'d_modle'", "'d_model'", "ModelConfig"]),
    ],
)
def test_json_with_an_unknown_field_is_refused(values, parts):
    with pytest.raises(UserError) as error:
        config_io.from_json(json.dumps({"format": config_io.FORMAT, **values}))
    assert all(part in str(error.value) for part in parts)


@functools.cache
def plain_demo():
    """Return the experiment as a masked diffusion model from scratch; the options of a command take a while to read."""
    return experiment("demo", PLAIN)


def demo(overrides):
    """Return the experiment with these fields and values, unchecked."""
    cfg = plain_demo()
    for name, value in overrides.items():
        cfg = with_value(name, value, cfg)
    return cfg


DEFAULTS = Config()


def with_value(name, value, cfg=DEFAULTS):
    """Return `cfg` with a value in the field of that dotted name, unchecked."""
    head, _, rest = name.partition(".")
    return dataclasses.replace(cfg, **{head: with_value(rest, value, getattr(cfg, head)) if rest else value})


@pytest.mark.parametrize("overrides, parts", INVALID)
def test_validation_names_the_values(overrides, parts):
    cfg = demo(overrides)
    with pytest.raises(UserError) as error:
        cfg.validate()
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


OF_ANOTHER_KIND = [("model", None), ("model.norm", "batchnorm"), ("run.steps", "1")]  # which overrides cannot express


def test_every_check_of_validation_has_a_case_above():
    raised = set()
    configs = [demo(overrides) for overrides, _ in INVALID]
    for cfg in configs + [with_value(name, value) for name, value in OF_ANOTHER_KIND]:
        with pytest.raises(UserError) as error:
            cfg.validate()
        *_, (frame, line) = traceback.walk_tb(error.value.__traceback__)
        raised.add((frame.f_code.co_filename, line))
    assert raised == {
        (module.__file__, node.lineno)
        for module in (config, config_data, config_fields, config_mixture, config_model)
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Raise)
    }


def test_values_of_another_kind_are_refused_by_name():
    for name, value in OF_ANOTHER_KIND:
        with pytest.raises(UserError, match=rf"^{name}=.* must be ") as error:
            with_value(name, value).validate()
        assert "\n" not in str(error.value)


FLOATS = [name for name, hint in fields(Config).items() if hint is float]
INTS = [name for name, hint in fields(Config).items() if hint is int]
BOUNDS = {  # least and greatest value
    config_fields.AtLeastMinusOne: (-1, 2**31 - 1),
    config_fields.Positive: (1, 2**31 - 1),
    config_fields.AtLeastTwo: (2, 2**31 - 1),
    config_fields.NonNegative: (0, 2**31 - 1),
    config_fields.Steps: (1, 2**30),
    config_fields.Seed: (0, 2**32 - 1),
}


def bounds(name):
    """The least and the greatest value of the field of that dotted name."""
    if name == "diffusion.timesteps":
        return 0, 2**20
    section, _, field = name.rpartition(".")
    hint = config_fields.field_types(type(attrgetter(section)(Config())))[field]
    return next(limits for kind, limits in BOUNDS.items() if kind.__metadata__[0] in hint.__metadata__)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400], ids=["nan", "inf", "-inf", "10**400"])
@pytest.mark.parametrize("name", FLOATS)
def test_every_float_must_be_finite(name, value):
    cfg = with_value(name, value)
    for refuse in (cfg.validate, lambda: config_io.from_json(config_io.to_json(cfg))):
        with pytest.raises(UserError, match=rf"^{re.escape(name)}=.* must be a finite number$"):
            refuse()


@pytest.mark.parametrize("name", FLOATS)
def test_every_float_has_a_range(name):
    with pytest.raises(UserError, match=rf"^{re.escape(name)}=-1.0 must "):
        with_value(name, -1).validate()


@pytest.mark.parametrize("name", INTS)
def test_every_integer_has_a_range(name):
    least, greatest = bounds(name)
    for outside in (least - 1, greatest + 1):
        with pytest.raises(UserError, match=rf"^{re.escape(name)}={outside} must "):
            with_value(name, outside).validate()
    for inside in (least, greatest):
        config_fields.check_fields(with_value(name, inside))


@pytest.mark.parametrize("value", [1e-300, 1e-40, 1e39])
@pytest.mark.parametrize("name", FLOATS)
def test_every_float_is_one_in_float32(name, value):
    with pytest.raises(UserError, match="^" + re.escape(f"{name}={value} must ")):
        with_value(name, value).validate()


def test_a_value_that_float32_rounds_out_of_its_range_is_refused():
    with pytest.raises(UserError, match=r"^optim.beta2=0.9999999999 must lie in \[0, 1\) in float32 too, .* is 1$"):
        with_value("optim.beta2", 0.9999999999).validate()


VALUES = st.one_of(
    st.floats(),
    st.integers(),
    st.sampled_from([2**31, 2**32, 10**400, -(2**63), 1 - 2**-40, 2.0**-149, 2.0**128, True, None, "", "x", "\ud800"]),
    st.lists(st.integers(), max_size=2),
)


@settings(deadline=None)  # whatever else the machine does
@given(st.sampled_from(sorted(fields(Config))), VALUES)
def test_any_value_of_any_field_is_usable_or_refused_in_one_line(name, value):
    cfg = with_value(name, value)
    try:
        cfg.validate()
    except UserError as error:
        assert "\n" not in str(error)
        return
    read = config_io.from_json(config_io.to_json(cfg))
    assert read == cfg and fingerprint.fingerprint(read) == fingerprint.fingerprint(cfg)
    stored = attrgetter(name)(cfg)
    if isinstance(stored, float):
        number = np.float32(stored)
        assert np.isfinite(number) and (abs(number) >= np.finfo(np.float32).tiny or stored == 0)
        with_value(name, float(number)).validate()
    elif isinstance(stored, int) and name in INTS:
        np.array(stored, np.uint32 if name == "run.seed" else np.int32)


@pytest.mark.parametrize("name", FLOATS)
def test_equal_values_have_equal_fingerprints(name):
    """An int in a float field, from Python or JSON, is the float; -0.0 is 0.0."""
    for value, same in ((1, 1.0), (10000, 10000.0), (-0.0, 0.0)):
        one, other = with_value(name, value), with_value(name, same)
        assert one == other and config_io.to_json(one) == config_io.to_json(other)
        assert fingerprint.fingerprint(one) == fingerprint.fingerprint(other)


def test_an_integer_in_json_is_the_float():
    text = config_io.to_json(Config())
    assert '"rope_theta": 10000.0' in text
    read = config_io.from_json(text.replace('"rope_theta": 10000.0', '"rope_theta": 10000'))
    assert config_io.to_json(read) == text


@pytest.mark.parametrize("value", [True, "1", None, [1.0]])
@pytest.mark.parametrize("name", ["optim.peak_lr", "run.steps"])
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(UserError, match=rf"^{name}=.* must be of type (int|float)$"):
        with_value(name, value).validate()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (config_io.to_dict(Config()), "of format 1"),
        ({"format": 99}, "of format 99, and this version of diffusionlm reads format 2"),
        ([], "not a JSON object"),
    ],
)
def test_json_of_another_format_is_refused_in_one_line(values, message):
    with pytest.raises(UserError, match=message) as error:
        config_io.from_json(json.dumps(values))
    assert "\n" not in str(error.value)


def test_a_removed_field_is_read_where_it_had_the_value_that_remains():
    values = config_io.to_dict(Config().diffusion)
    read = config_io.from_dict(config.DiffusionConfig, values | {"random_length_scope": "example"})
    assert read == Config().diffusion
    with pytest.raises(UserError, match="unknown field 'random_length_scope' in DiffusionConfig"):
        config_io.from_dict(config.DiffusionConfig, values | {"random_length_scope": "batch"})


def test_validate_returns_the_config():
    cfg = Config()
    assert cfg.validate() is cfg


def test_the_appended_mask_row_is_padded_and_never_suppressed_by_name():
    cfg = experiment("demo", {"model.vocab_size": 1023})
    assert (cfg.mask_id, cfg.suppressed_ids) == (1023, ())
    assert (cfg.model.embedding_rows, cfg.model.padded_vocab_size) == (1024, 1024)


def test_a_mask_inside_the_vocabulary_is_suppressed_unless_the_reference_does_not():
    overrides = {"model.mask_row": False, "diffusion.mask_id": 5}
    assert experiment("demo", overrides).validate().suppressed_ids == (5,)
    assert experiment("demo", overrides | {"diffusion.suppress_mask": False}).suppressed_ids == ()
