"""Settings: JSON, the fingerprint of a run's science, and one clear sentence for values that cannot be."""

import ast
import dataclasses
import inspect
import json
import traceback
from operator import attrgetter
from typing import Literal, get_args, get_origin

import pytest

from diffusionlm import config
from diffusionlm.arguments import experiment, experiment_names, fields
from diffusionlm.config import Config
from diffusionlm.errors import UserError

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

# Overrides of `demo`, and what the message must name.
INVALID = [
    ({"run.seed": 2**32}, ["run.seed=4294967296", "below 2**32"]),
    ({"model.d_model": 0}, ["model.d_model=0", "at least 1"]),
    ({"model.head_chunk": -1}, ["model.head_chunk=-1", "at least 1"]),
    ({"model.n_heads": 4, "model.n_kv_heads": 3}, ["model.n_kv_heads=3", "model.n_heads=4"]),
    ({"model.head_dim": 31}, ["model.head_dim=31", "even"]),
    ({"model.lora_rank": -1}, ["model.lora_rank=-1", "[0, model.d_model="]),
    ({"diffusion.anneal_steps": -1}, ["diffusion.anneal_steps=-1", "full attention"]),
    ({"diffusion.anneal_steps": 10**6}, ["diffusion.anneal_steps=1000000", "run.steps=", "never be full"]),
    ({"diffusion.cart_p": 1.0}, ["diffusion.cart_p=1.0", "(0, 1)"]),
    ({"diffusion.t_min": 1.5}, ["diffusion.t_min=1.5", "(0, 1)"]),
    ({"diffusion.t_min": "nan"}, ["diffusion.t_min=nan", "(0, 1)"]),
    ({"diffusion.timesteps": -5}, ["diffusion.timesteps=-5", "0"]),
    ({"diffusion.random_length": 1.1}, ["diffusion.random_length=1.1", "[0, 1]"]),
    ({"diffusion.polynomial_power": 0}, ["diffusion.polynomial_power=0.0", "positive"]),
    (
        {"diffusion.geometric_min": 30, "diffusion.geometric_max": 20},
        ["diffusion.geometric_min=30.0", "diffusion.geometric_max=20.0"],
    ),
    ({"diffusion.mask_sampling": "exact_count", "diffusion.timesteps": 8}, ["exact_count", "timesteps=8"]),
    ({"diffusion.mask_sampling": "exact_count", "diffusion.schedule": "cosine"}, ["exact_count", "schedule=cosine"]),
    ({"optim.weight_decay": -0.1}, ["optim.weight_decay=-0.1", "negative"]),
    ({"optim.warmup_steps": 2000, "run.steps": 1500}, ["optim.warmup_steps=2000", "run.steps=1500"]),
    (
        {"optim.schedule": "wsd", "optim.warmup_steps": 500, "optim.decay_steps": 1100, "run.steps": 1500},
        ["optim.warmup_steps=500", "optim.decay_steps=1100", "run.steps=1500"],
    ),
    (
        {
            "optim.schedule": "wsd",
            "optim.drop_step": 95,
            "optim.drop_lr": 1e-4,
            "optim.decay_steps": 10,
            "optim.warmup_steps": 5,
            "run.steps": 100,
        },
        ["optim.drop_step=95", "(5)", "(90)"],
    ),
    ({"data.sequence_length": 0}, ["data.sequence_length=0", "at least 1"]),
    ({"data.batch_size": 0}, ["data.batch_size=0", "at least 1"]),
    ({"mesh.data": -1}, ["mesh.data=-1", "mesh.fsdp=-1", "at most one"]),
    ({"mesh.tensor": 0}, ["mesh.tensor=0", "positive"]),
    ({"run.steps": 0}, ["run.steps=0", "at least 1"]),
    ({"run.eval_draws": 1}, ["run.eval_draws=1", "at least 2"]),
    ({"objective": "arm"}, ["objective=arm", "model.causal=True"]),
    (
        {"objective": "arm", "model.causal": True, "diffusion.anneal_steps": 5},
        ["diffusion.anneal_steps=5", "objective=mdm"],
    ),
    ({"model.causal": True}, ["objective=mdm", "model.causal=False"]),
    ({"model.mask_row": False}, ["objective=mdm", "model.mask_row", "diffusion.mask_id"]),
    (
        {"diffusion.mask_id": 900, "model.vocab_size": 900, "model.mask_row": False},
        ["diffusion.mask_id=900", "model.vocab_size=900"],
    ),
    ({"diffusion.mask_id": 5}, ["diffusion.mask_id=5", "model.mask_row"]),
    ({"data.sequence_length": 256, "model.max_length": 128}, ["data.sequence_length=256", "model.max_length=128"]),
    ({"run.microbatches": 5, "data.batch_size": 32}, ["run.microbatches=5", "data.batch_size=32"]),
    ({"data.batch_size": 33}, ["antithetic", "33"]),
    (
        {"data.packing": "examples", "diffusion.random_length": 0.01, "run.showcase": False},
        ["diffusion.random_length=0.01", "data.packing=examples"],
    ),
    (
        {"data.packing": "examples", "diffusion.random_length": 0.0, "run.showcase": True},
        ["run.showcase=True", "data.packing=examples"],
    ),
    ({"data.pad_group": 2, "data.packing": "chunk"}, ["data.pad_group=2", "data.packing=examples"]),
    (
        {"data.pad_group": 3, "data.batch_size": 32} | {"data.packing": "examples", "diffusion.random_length": 0.0},
        ["data.pad_group=3", "data.batch_size=32"],
    ),
    ({"data.pad_group": -2, "data.packing": "examples"}, ["data.pad_group=-2", "data.batch_size"]),
    ({"optim.schedule": "wsd", "optim.drop_step": 100}, ["optim.drop_step=100", "optim.drop_lr"]),
    ({"optim.peak_lr": float("nan")}, ["optim.peak_lr=nan"]),
    ({"optim.beta2": 1.0}, ["optim.beta2=1.0", "[0, 1)"]),
    ({"model.norm_eps": -1e-5}, ["model.norm_eps=-1e-05"]),
    ({"model.rope_theta": 0.0}, ["model.rope_theta=0.0"]),
    ({"run.eval_every": -1}, ["run.eval_every=-1"]),
    ({"safety.max_skips": -1}, ["safety.max_skips=-1"]),
    ({"safety.spike_factor": 0.5}, ["safety.spike_factor=0.5", "above 1"]),
    ({"safety.rollback_lr": 0}, ["safety.rollback_lr=0", "(0, 1]"]),
]


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
    assert (config.fingerprint(before) == config.fingerprint(after)) == (name in OPERATIONAL)


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
    assert config.fingerprint(experiment(name)) == FINGERPRINTS[name]


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

    assert config.fingerprint(After()) == config.fingerprint(Before())
    assert config.fingerprint(After(Section(added=1))) != config.fingerprint(Before())


def test_the_fingerprint_tells_which_field_holds_a_value():
    a = dataclasses.replace(Config(), optim=dataclasses.replace(Config().optim, beta1=0.5, beta2=0.6))
    b = dataclasses.replace(Config(), optim=dataclasses.replace(Config().optim, beta1=0.6, beta2=0.5))
    assert config.fingerprint(a) != config.fingerprint(b)


@pytest.mark.parametrize("name", fields(Config))
def test_json_keeps_every_field(name):
    cfg = changed(Config(), name)
    assert config.from_json(config.to_json(cfg)) == cfg


@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_is_valid_and_survives_json(name):
    cfg = experiment(name).validate()
    again = config.from_json(config.to_json(cfg))
    assert again == cfg
    assert config.fingerprint(again) == config.fingerprint(cfg)


def test_json_without_a_field_takes_its_default():
    values = config.to_dict(Config())
    del values["run"]["steps"], values["mesh"]
    assert config.from_dict(Config, values) == Config()


@pytest.mark.parametrize(
    "values, parts",
    [
        ({"modle": {}}, ["'modle'", "'model'"]),
        ({"model": {"d_modle": 3}}, ["'d_modle'", "'d_model'", "ModelConfig"]),
    ],
)
def test_json_with_an_unknown_field_is_refused(values, parts):
    with pytest.raises(UserError) as error:
        config.from_json(json.dumps(values))
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
