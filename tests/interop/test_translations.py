"""Scaled rotary positions, norms of queries and keys, and windows: against transformers, and there and back."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.foreign_weights import CONFIGS, L, logits

import diffusionlm as dlm
from diffusionlm import config_io
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import ModelConfig
from diffusionlm.config_model import RopeScaling
from diffusionlm.errors import UserError
from diffusionlm.interop.config_json import from_model_config, to_model_config
from diffusionlm.interop.families import FAMILIES
from diffusionlm.model import positions

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
VARIANTS = json.loads((PARITY / "variants.json").read_text())
SPELLINGS = json.loads((PARITY / "rope.json").read_text())
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}


def model_config(path):
    return config_io.from_dict(ModelConfig, checkpoint.load_sidecar(path).model)


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """Return a function that imports the weights of a tiny model under a variant's config.json."""

    def make(name):
        directory = tmp_path_factory.mktemp("variant")
        (directory / "source").mkdir()
        shutil.copy(PARITY / VARIANTS[name]["weights"] / "model.safetensors", directory / "source")
        (directory / "source" / "config.json").write_text(json.dumps(VARIANTS[name]["config"]))
        return dlm.import_weights(directory / "source", directory / "model")

    return make


# Each kind of scaling and each family's window once; families share how they read both.
QUICK = ("llama llama3", "llama dynamic", "qwen3 linear", "qwen3 yarn", "mistral window", "qwen2 window")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_logits_are_those_of_transformers_beyond_the_first_length_too(name, variant, tmp_path):
    """The texts have 41 tokens, and the models 32 positions, or 16 before they were scaled."""
    golden, model = np.load(PARITY / "variants.npz"), variant(name)
    actual, expected = logits(model, golden["ids"])[0], golden[name]
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()
    # Each variant differs from the plain model by much more than that.
    plain = dataclasses.replace(model_config(model), rope_scaling=RopeScaling(), sliding_window=0)
    assert plain != model_config(model)
    dlm.export_weights(model, tmp_path / "out", name.split()[0])
    dlm.import_weights(tmp_path / "out", tmp_path / "again")
    assert model_config(tmp_path / "again") == model_config(model)


# --- rotary settings


def read(family="llama", **fields):
    known = {name: value for name, value in CONFIGS[family].items() if name != "rope_theta"}
    return to_model_config(FAMILIES[family], known | fields)


REFUSED = {  # although transformers reads one of two values, or ignores what its own warnings call wrong
    "two thetas",
    "two thetas in scaling",
    "two types",
    "no type",
    "scaling and other parameters",
    "half rotated",
    "half rotated inside",
    "half rotated, scaled",
    "default with a factor",
    "dynamic with a length",
    "llama3 with two lengths",
    "yarn without rounding",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_rotary_settings_mean_what_transformers_reads_or_are_refused(name):
    fields, expected = SPELLINGS[name]["fields"], SPELLINGS[name]["frequencies"]
    size = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
    if expected is None or name in REFUSED:
        with pytest.raises(UserError, match="config.json (has|lacks) .*(rope|partial_rotary|original_max)") as error:
            read(**size, **fields)
        assert "\n" not in str(error.value)
        return
    cfg = read(**size, **fields)
    actual = positions.frequencies(cfg.rope_theta, cfg.head_dim, cfg.rope_scaling)
    np.testing.assert_allclose(actual, expected, rtol=2e-6)
    radius_BxTxJ = np.linalg.norm(positions.rope_tables(cfg, np.arange(9)[None], np.array([9])), axis=2)
    np.testing.assert_allclose(radius_BxTxJ, SPELLINGS[name]["attention_factor"], rtol=2e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "dream", "diffullama"])
def test_every_family_reads_the_base_wherever_it_stands(family):
    for fields in ({"rope_theta": 700.0}, {"rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}}):
        assert read(family, **fields) == read(family, rope_theta=700)
    assert read(family).rope_theta == 10000.0


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 10**400, True, "2", [2.0], {}])
@pytest.mark.parametrize("key", ["rope_theta", "rope_parameters.rope_theta", "rope_scaling.factor"])
def test_a_number_that_is_none_is_refused(key, value):
    outer, _, inner = key.partition(".")
    with pytest.raises(UserError, match=f"has {key}=.*, which must be a number, and finite"):
        read(**{outer: LINEAR | {inner: value} if inner else value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "of type 'longrope', and this version computes linear"),
        ({"rope_scaling": LINEAR | {"alpha": 2}}, "has rope_scaling.alpha=2, which type linear does not use"),
        ({"rope_scaling": LINEAR | {"factor": 0.5}}, "rope_scaling.factor=0.5 must be at least 1"),
        ({"rope_scaling": {"factor": 2.0}}, "whose rope_type must be one of"),
        ({"rope_scaling": [LINEAR]}, "must be an object or null"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "whose rope_type must be one of"),
        ({"rope_scaling": YARN | {"attention_factor": 0.0}}, "attention_factor=0.0, which must be positive"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 2.5}}, "=2.5, which must be a whole number"),
        ({"original_max_position_embeddings": 16}, "and no rope_parameters that uses it"),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}, "of which readers take one or the other"),
    ],
)
def test_rotary_settings_that_are_no_network_of_ours_are_refused(fields, message):
    with pytest.raises(UserError, match=message) as error:
        read(**fields)
    assert "\n" not in str(error.value)


def test_the_longest_text_is_that_of_the_scaling():
    """Dynamic scaling begins at config.json's length; YaRN's length may be given beside the factor alone."""
    assert read(rope_scaling={"rope_type": "dynamic", "factor": 4.0}).max_length == 4 * 64
    assert read(rope_scaling=YARN | {"factor": 8.0}).max_length == 128
    assert read(rope_scaling=YARN).max_length == read(rope_scaling=LINEAR).max_length == 64


# --- windows

WINDOWS = {  # config.json's fields -> the window; the models have 2 layers and 64 positions
    "mistral": [
        ({"sliding_window": 9}, 9),
        ({"sliding_window": None}, 0),
        ({"sliding_window": 64}, 0),  # no text fills it
        ({"sliding_window": 63}, 63),
    ],
    "qwen2": [
        ({"use_sliding_window": False, "sliding_window": 9}, 0),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, 9),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": L}, 0),  # above the last layer
        ({"use_sliding_window": True, "sliding_window": 9}, 0),  # from layer 28 on
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, 0),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, 0),
        ({"use_sliding_window": True, "max_window_layers": 0}, 0),  # 4096
        ({"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention"] * L}, 9),
        ({"use_sliding_window": True, "sliding_window": 9, "layer_types": ["full_attention"] * L}, 0),
    ],
}
WINDOWS["qwen3"] = WINDOWS["qwen2"]


@pytest.mark.parametrize(("family", "case"), [(name, i) for name, cases in WINDOWS.items() for i in range(len(cases))])
def test_windows_are_read_as_transformers_does(family, case):
    fields, window = WINDOWS[family][case]
    without = {key: value for key, value in CONFIGS[family].items() if key != "sliding_window"}
    cfg = to_model_config(FAMILIES[family], without | fields)
    assert cfg.sliding_window == window
    written = from_model_config(FAMILIES[family], cfg, cfg.vocab_size, {})
    assert to_model_config(FAMILIES[family], written) == cfg


def test_a_mistral_without_the_key_has_a_window_of_4096():
    without = {key: value for key, value in CONFIGS["mistral"].items() if key != "sliding_window"}
    for length, window in ((64, 0), (4096, 0), (4097, 4096)):
        cfg = to_model_config(FAMILIES["mistral"], without | {"max_position_embeddings": length})
        assert (cfg.sliding_window, cfg.max_length) == (window, length)
    assert from_model_config(FAMILIES["mistral"], read("mistral"), 40, {})["sliding_window"] is None


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window=0, which must be a whole number or null"),
        ("mistral", {"sliding_window": True}, "sliding_window=True, which must be a whole number or null"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window=1, which must be true or false"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            "max_window_layers=1 and use_sliding_window=True, and this version computes a window in all layers or in",
        ),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": "0"}, "use_sliding|max_window_layers='0'"),
        ("qwen2", {"layer_types": ["sliding_attention"] * L}, "layer_types=.*use_sliding_window=False"),
        ("qwen2", {"layer_types": ["full_attention"]}, "must name the kind of each of its layers"),
        ("qwen2", {"layer_types": ["chunked_attention"] * L, "use_sliding_window": True}, "in all layers or in none"),
        ("llama", {"sliding_window": 9}, "has sliding_window=9"),
        ("dream", {"use_sliding_window": True, "sliding_window": 9}, "has use_sliding_window=True"),
    ],
)
def test_windows_that_our_network_lacks_are_refused(family, fields, message):
    with pytest.raises(UserError, match=message) as error:
        read(family, **({"sliding_window": 9} | fields if family == "qwen2" else fields))
    assert "\n" not in str(error.value)


# --- exports

CFG = {"vocab_size": 40, "mask_row": False, "max_length": 32, "causal": True}
NETWORKS = {
    "linear": {"rope_scaling": RopeScaling("linear", 2.0)},
    "dynamic": {"rope_scaling": RopeScaling("dynamic", 2.0, 16), "max_length": 32},
    "llama3": {"rope_scaling": RopeScaling("llama3", 2.0, 16, 1.5, 3.0)},
    "yarn": {"rope_scaling": RopeScaling("yarn", 2.0, 16, beta_fast=9.0, beta_slow=2.0, attention_factor=1.5)},
    "norms": {"qk_norm": True},
    "window": {"sliding_window": 9},
}
SCALED = {"llama", "mistral", "qwen2", "qwen3", "diffullama"}
FORMATS = {
    **dict.fromkeys(("linear", "dynamic", "llama3", "yarn"), SCALED),
    "norms": {"qwen3"},
    "window": {"mistral", "qwen2", "qwen3"},
}


@pytest.mark.parametrize("feature", NETWORKS)
@pytest.mark.parametrize("format", [name for name, family in FAMILIES.items() if family.fields])
def test_a_format_has_a_network_or_refuses_it(format, feature):
    """A feature that a format lacks is never left out in silence; what is written means the same network again."""
    constants = {name: value for name, value in FAMILIES[format].constants.items() if name != "rope_bf16_tables"}
    plain = ModelConfig(**CFG | constants | {"causal": not FAMILIES[format].mdm})
    if format not in FORMATS[feature]:
        with pytest.raises(UserError, match="this format has"):
            from_model_config(FAMILIES[format], dataclasses.replace(plain, **NETWORKS[feature]), 40, {})
        return
    cfg = dataclasses.replace(plain, **NETWORKS[feature])
    assert to_model_config(FAMILIES[format], from_model_config(FAMILIES[format], cfg, 40, {})) == cfg


def test_dynamic_scaling_for_other_lengths_than_its_factor_says_is_refused():
    cfg = ModelConfig(**CFG | NETWORKS["dynamic"] | {"max_length": 33})
    with pytest.raises(UserError, match="this format means max_length=32, and the model has 33"):
        from_model_config(FAMILIES["llama"], cfg, 40, {})
