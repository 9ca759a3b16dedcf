"""What config.json must say and must not say: architectures, unknown keys, null and absent fields, and sizes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.foreign_weights import (
    CONFIGS,
    GPT2,
    LLAMA,
    D,
    F,
    G,
    H,
    V,
    import_options,
    make_source,
    random_tensors,
    write_source,
)

import diffusionlm as dlm
from diffusionlm import untrusted
from diffusionlm.errors import UserError
from diffusionlm.interop import config_keys, importing
from diffusionlm.interop.config_json import to_model_config
from diffusionlm.interop.families import FAMILIES

WITH_CONFIG = [name for name in FAMILIES if CONFIGS[name] is not None]
# Their tensors have LLaMA's names and shapes, and their networks compute something else.
OTHERS = {
    "GraniteForCausalLM": "granite",
    "HeliumForCausalLM": "helium",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "SmolLM3ForCausalLM": "smollm3",
    "GemmaForCausalLM": "gemma",
    "CohereForCausalLM": "cohere",
    "OlmoForCausalLM": "olmo",
    "StableLmForCausalLM": "stablelm",
}
# Keys of other networks that change what LLaMA's tensors compute.
FOREIGN_KEYS = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015,
    "no_rope_layers": [1, 1, 0],
    "use_bias": True,
    "clip_qkv": 8.0,
    "attn_logit_softcapping": 50.0,
    "qk_layernorm": False,
    "num_local_experts": 8,
    "query_pre_attn_scalar": 144,
    "parallel_attn": None,
}


def refusal(directory, fields, tensors="llama", **options):
    """Return the message with which a directory is refused."""
    source = write_source(directory / "source", fields, random_tensors(tensors))
    with pytest.raises(UserError) as error:
        dlm.import_weights(source, directory / "model", **options)
    assert "\n" not in str(error.value) and not (directory / "model").exists()
    return str(error.value)


@pytest.mark.parametrize("family", [None, "llama", "diffullama"])
@pytest.mark.parametrize("changes", [["architectures", "model_type"], ["architectures"], ["model_type"]])
@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_is_refused_whatever_family_is_named(name, changes, family, tmp_path):
    other = {"architectures": [name], "model_type": OTHERS[name]}
    message = refusal(tmp_path, LLAMA | {key: other[key] for key in changes}, family=family)
    assert (name if "architectures" in changes else OTHERS[name]) in message
    assert family is None or f"the family {family} has" in message
    assert "--family" not in message  # no family would be right


@pytest.mark.parametrize("named", FAMILIES)
@pytest.mark.parametrize("actual", WITH_CONFIG)
def test_a_family_reads_its_own_architectures_only(named, actual):
    fields = CONFIGS[actual]
    if set(fields.get("architectures", [])) <= set(FAMILIES[named].architectures) and (
        fields["model_type"] in FAMILIES[named].architectures.values()
    ):
        config_keys.require_architecture(named, fields)
        return
    with pytest.raises(UserError, match=f"and the family {named} has .*; import it with --family"):
        config_keys.require_architecture(named, fields)


@pytest.mark.parametrize("family", WITH_CONFIG)
def test_an_architecture_and_a_model_type_that_contradict_each_other_are_refused(family):
    architecture, model_type = next(iter(FAMILIES[family].architectures.items()))
    config_keys.require_architecture(family, {"architectures": [architecture], "model_type": model_type})
    for wrong in ("helium", "gpt2" if model_type != "gpt2" else "llama", 7, ["llama"]):
        with pytest.raises(UserError, match="the two contradict each other"):
            config_keys.require_architecture(family, {"architectures": [architecture], "model_type": wrong})
    for wrong in ("LlamaForCausalLM", [architecture, "MambaForCausalLM"], {}, [1]):
        with pytest.raises(UserError, match=f"and the family {family} has architectures="):
            config_keys.require_architecture(family, {"architectures": wrong, "model_type": model_type})


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_keys_of_other_networks_are_refused(key, tmp_path):
    assert f"has {key}=" in refusal(tmp_path, LLAMA | {key: FOREIGN_KEYS[key]})


@pytest.mark.parametrize("family", WITH_CONFIG)
def test_every_family_refuses_every_key_that_it_does_not_know(family):
    @given(st.text(), st.sampled_from([None, False, True, 0, 1, 2.5, "x", [], {}]))
    def refused(key, value):
        if key in read:
            return
        with pytest.raises(UserError, match="does not know") as error:
            config_keys.require_known(FAMILIES[family], CONFIGS[family] | {key: value})
        assert str(error.value) == untrusted.printable(error.value)

    table = FAMILIES[family]
    read = {*table.fields.values(), *table.supported, *table.harmless, *config_keys.HARMLESS}
    read |= {*config_keys.SWITCHED_OFF, "layer_types"}.union(*(rule.keys for rule in table.translations))
    refused()
    for key, value in FOREIGN_KEYS.items():
        with pytest.raises(UserError, match=f"has {key}="):
            config_keys.require_known(FAMILIES[family], CONFIGS[family] | {key: value})


def test_other_names_of_sizes_of_gpt2_are_refused(tmp_path):
    """Transformers reads them instead of GPT-2's own."""
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
        with pytest.raises(UserError, match=f"has {key}=8"):
            config_keys.require_known(FAMILIES["gpt2"], GPT2 | {key: 8})


@pytest.mark.parametrize("family", ["llama", "gpt2", "llada"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        ("rope_interleaved", True),
        ("quantization_config", {"bits": 4}),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", "full_attention"),
    ],
)
def test_features_that_are_switched_on_are_refused(key, value, family):
    with pytest.raises(UserError, match=f"has {key}=.*computes"):
        to_model_config(FAMILIES[family], CONFIGS[family] | {key: value})


NULLS = [  # family, key, what its reference computes for null
    ("llama", "head_dim", D // H),
    ("llama", "num_key_value_heads", H),
    ("mistral", "num_key_value_heads", H),
    ("mistral", "head_dim", D // H),
    ("qwen2", "num_key_value_heads", H),
    ("dream", "num_key_value_heads", H),
    ("gpt2", "n_inner", 4 * D),
    ("llada", "n_kv_heads", H),
    ("llada", "mlp_hidden_size", 4 * D),
    ("llada", "embedding_size", V),
]


@pytest.mark.parametrize(("family", "key", "value"), NULLS)
def test_null_means_what_the_reference_computes_for_it(family, key, value):
    expected = to_model_config(FAMILIES[family], CONFIGS[family] | {key: value})
    assert to_model_config(FAMILIES[family], CONFIGS[family] | {key: None}) == expected


def test_null_where_the_reference_computes_nothing_is_refused(tmp_path):
    for family in WITH_CONFIG:
        table = FAMILIES[family]
        for native, key in table.fields.items():
            if not callable(table.optional.get(native)):
                with pytest.raises(UserError, match=f"config.json (lacks|has) {key}"):
                    to_model_config(table, CONFIGS[family] | {key: None})


def test_the_width_of_an_mlp_follows_from_its_ratio():
    fields = CONFIGS["llada"] | {"mlp_hidden_size": None, "mlp_ratio": 2}
    assert to_model_config(FAMILIES["llada"], fields).d_ff == 2 * D
    for ratio in (None, "4", 1.5, -1):
        with pytest.raises(UserError, match="mlp_hidden_size"):
            to_model_config(FAMILIES["llada"], fields | {"mlp_ratio": ratio})


# The defaults of the classes of configurations that read these files: transformers 5.24, and the code of the releases.
_LLAMA = {"attention_bias": False, "head_dim": None, "hidden_act": "silu", "mlp_bias": False}
_LLAMA |= {"num_key_value_heads": None, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False}
_COMMON = {key: _LLAMA[key] for key in ("hidden_act", "rope_scaling", "rope_theta", "tie_word_embeddings")}
READERS_DEFAULTS = {
    "llama": _LLAMA,
    "diffullama": _LLAMA,
    "mistral": _COMMON | {"head_dim": None, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _COMMON | {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False},
    "qwen3": _COMMON
    | {"num_key_value_heads": 32, "head_dim": 128, "attention_bias": False, "use_sliding_window": False},
    "dream": _COMMON | {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False},
    "gpt2": {
        "activation_function": "gelu_new",
        "add_cross_attention": False,
        "layer_norm_epsilon": 1e-5,
        "n_inner": None,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
        "tie_word_embeddings": True,
    },
    "llada": {
        "activation_type": "swiglu",
        "alibi": False,
        "attention_layer_norm": False,
        "bias_for_layer_norm": None,
        "block_group_size": 1,
        "block_type": "sequential",
        "embedding_size": 50304,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "default",
        "layer_norm_with_affine": True,
        "max_sequence_length": 1024,
        "mlp_hidden_size": None,
        "multi_query_attention": None,
        "n_kv_heads": None,
        "rms_norm_eps": 1e-5,
        "rope": False,
        "rope_full_precision": True,
        "rope_theta": 10000.0,
        "scale_logits": False,
        "weight_tying": True,
    },
}
READERS_OF_ROPE = ("llama", "diffullama", "mistral", "qwen2", "qwen3", "dream")
READERS_DEFAULTS["diffugpt"] = READERS_DEFAULTS["gpt2"]


@pytest.mark.parametrize("family", WITH_CONFIG)
def test_an_absent_field_means_what_readers_take_for_it(family):
    def outcome(fields):
        try:
            return to_model_config(table, fields)
        except UserError:
            return None

    table = FAMILIES[family]
    for key, default in READERS_DEFAULTS[family].items():
        for longest in (64, 8192):  # whether texts are longer than a window or not
            fields = CONFIGS[family] | ({"max_position_embeddings": longest} if family in READERS_OF_ROPE else {})
            without = {name: value for name, value in fields.items() if name != key}
            assert outcome(without) == outcome(without | {key: default}), (key, longest)


HUGE = 2**31 - 1
SIZES = [
    *(("llama", key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")),
    *(("llama", key) for key in ("head_dim", "intermediate_size", "vocab_size")),
    *(("gpt2", key) for key in ("n_embd", "n_layer", "n_head", "n_inner", "n_positions", "vocab_size")),
    *(("llada", key) for key in ("d_model", "n_layers", "n_heads", "mlp_hidden_size", "embedding_size")),
]


@pytest.mark.parametrize("size", [HUGE, 10**30, D * F * V])
@pytest.mark.parametrize(("family", "key"), SIZES)
def test_sizes_are_those_of_the_tensors_before_anything_is_made(family, key, size, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "abstract_leaves", None)  # the first thing that has these sizes
    monkeypatch.setattr(importing, "placements", None)
    message = refusal(tmp_path, CONFIGS[family] | {key: size}, family)
    assert message.startswith(f"{tmp_path / 'source'}: config.json ")


def test_a_refused_size_is_named_with_the_tensors(tmp_path):
    message = refusal(tmp_path / "1", LLAMA | {"num_hidden_layers": HUGE})
    assert f"has num_hidden_layers={HUGE}, and the weights have 2 layers" in message
    message = refusal(tmp_path / "2", LLAMA | {"hidden_size": HUGE, "head_dim": 4})
    assert f"has hidden_size={HUGE}, and no tensor of the weights has a dimension of {HUGE}" in message
    message = refusal(tmp_path / "3", LLAMA | {"num_attention_heads": 2 * H, "num_key_value_heads": G, "head_dim": 8})
    assert "has num_attention_heads=8 and head_dim=8, together 64, and no tensor" in message


def test_a_number_that_no_float_holds_is_refused(tmp_path):
    for i, number in enumerate(["1e999", "NaN", "-Infinity", "1" + "0" * 400]):
        source = make_source("llama", tmp_path / str(i))
        text = json.dumps(LLAMA).replace('"rms_norm_eps": 1e-06', f'"rms_norm_eps": {number}')
        (source / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json"):
            dlm.import_weights(source, tmp_path / "model")


def test_a_llama_that_could_be_diffullama_is_said_to_be_one(tmp_path, caplog):
    """Only that: neither a family that was named nor an export of ours leaves the question open."""
    said = "import them with --family diffullama"
    source = make_source("llama", tmp_path / "source")
    dlm.import_weights(source, tmp_path / "plain")
    assert [said in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    dlm.import_weights(source, tmp_path / "named", "llama")
    dlm.import_weights(make_source("mistral", tmp_path / "other"), tmp_path / "mistral", **import_options("mistral"))
    dlm.export_weights(tmp_path / "plain", tmp_path / "out", "llama")
    dlm.import_weights(tmp_path / "out", tmp_path / "again")
    assert not caplog.records


def test_an_export_is_imported_as_what_it_was_exported_as(imported, tmp_path):
    dlm.export_weights(imported("diffullama"), tmp_path / "out", "diffullama")
    with pytest.raises(UserError, match="was exported as diffullama; import it without --family llama"):
        dlm.import_weights(tmp_path / "out", tmp_path / "again", "llama")
