"""Settings: JSON, the fingerprint of a run's science, and one clear sentence for values that cannot be."""

import ast
import dataclasses
import inspect
import json
import traceback
from operator import attrgetter
from typing import Literal, get_args, get_origin

import pytest
from support.invalid_configs import INVALID

from diffusionlm import config, config_io
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
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "run.microbatches",
    "run.init_from",
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
    assert (config_io.fingerprint(before) == config_io.fingerprint(after)) == (name in OPERATIONAL)


# As they were when `later` came: runs that began before must find themselves.
FINGERPRINTS = {
    "llada_1b": "fb2867ad99b1",
    "llada_8b": "8c723347deaf",
    "smdm_170m": "17ac11c7777d",
    "smdm_1028m_rsl": "fb0bf553c6a7",
    "tinystories": "6ca1c8e9d88e",
    "tinystories_arm": "cba462dc9f60",
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprints_of_experiments_stay(name):
    """A change of a recipe changes its entry; a new field, made with `later`, changes none."""
    assert config_io.fingerprint(experiment(name)) == FINGERPRINTS[name]


def test_a_later_field_is_part_of_the_science_once_it_is_set():
    @dataclasses.dataclass(frozen=True)
    class Before:
        run: config.OptimConfig = config.OptimConfig()

    @dataclasses.dataclass(frozen=True)
    class Section(config.OptimConfig):
        added: int = config.later(0)

    @dataclasses.dataclass(frozen=True)
    class After:
        run: Section = Section()

    assert config_io.fingerprint(After()) == config_io.fingerprint(Before())
    assert config_io.fingerprint(After(Section(added=1))) != config_io.fingerprint(Before())


def test_the_fingerprint_tells_which_field_holds_a_value():
    a = dataclasses.replace(Config(), optim=dataclasses.replace(Config().optim, beta1=0.5, beta2=0.6))
    b = dataclasses.replace(Config(), optim=dataclasses.replace(Config().optim, beta1=0.6, beta2=0.5))
    assert config_io.fingerprint(a) != config_io.fingerprint(b)


@pytest.mark.parametrize("name", fields(Config))
def test_json_keeps_every_field(name):
    cfg = changed(Config(), name)
    assert config_io.from_json(config_io.to_json(cfg)) == cfg


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_is_valid_and_survives_json(name):
    cfg = experiment(name).validate()
    again = config_io.from_json(config_io.to_json(cfg))
    assert again == cfg
    assert config_io.fingerprint(again) == config_io.fingerprint(cfg)


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
        config_io.from_json(json.dumps(values))
    assert all(part in str(error.value) for part in parts)


@pytest.mark.parametrize("overrides, parts", INVALID)
def test_validation_names_the_values(overrides, parts):
    cfg = experiment("demo", overrides)
    with pytest.raises(UserError) as error:
        cfg.validate()
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


def test_every_check_of_validation_has_a_case_above():
    raised = set()
    for overrides, _ in INVALID:
        try:
            experiment("demo", overrides).validate()
        except UserError as error:
            raised.add(traceback.extract_tb(error.__traceback__)[-1].lineno)
    tree = ast.parse(inspect.getsource(config))
    checks = [node for node in ast.walk(tree) if getattr(node, "name", "") in ("validate", "_positive")]
    assert raised == {node.lineno for check in checks for node in ast.walk(check) if isinstance(node, ast.Raise)}


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
