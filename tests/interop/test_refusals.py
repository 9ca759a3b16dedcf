"""Sources that cannot be imported: one line says why, and nothing is left behind."""

import json
import math
import shutil

import numpy as np
import pytest
from support.foreign_weights import CONFIGS, LLAMA, D, V, make_source, random_tensors, tensor_shapes, write_source

import diffusionlm as dlm
from diffusionlm import memory
from diffusionlm.errors import UserError


def broken(family="llama", fields=None, **changes):
    """Return a function that writes a source with changed tensors (None: removed) and config.json fields."""

    def make(directory):
        tensors = random_tensors(family)
        for name, tensor in changes.items():
            tensors.pop(name, None)
            if tensor is not None:
                tensors[name] = tensor
        return write_source(directory, CONFIGS[family] | (fields or {}), tensors)

    return make


def truncated(directory):
    source = make_source("llama", directory)
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:-100])
    return source


def without_a_shard(directory):
    source = make_source("llama", directory)
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    names = {name: "model-00001-of-00002.safetensors" for name in tensor_shapes("llama")}
    names["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return source


def pickled(directory):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA))
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02")
    return directory


def absent(directory):
    return directory


def damaged(name, content):
    def make(directory):
        source = make_source("llama", directory)
        (source / name).write_bytes(content)
        return source

    return make


def with_long_tokenizer(directory):
    source = make_source("llama", directory)
    vocabulary = {chr(0x4E00 + i): i for i in range(V + 1)}
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    return source


REFUSED = {
    "sliding_window": (broken(fields={"sliding_window": 32}), "has sliding_window=32"),
    "scaled_dream": (
        broken("dream", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        "has rope_scaling of type 'linear', and this version computes none for this family",
    ),
    "activation": (broken(fields={"hidden_act": "gelu"}), "has hidden_act='gelu', and this version computes 'silu'"),
    "attention_bias": (broken(fields={"attention_bias": True}), "has attention_bias=True"),
    "qk_norm": (broken("llada", {"attention_layer_norm": True}), "has attention_layer_norm=True"),
    "architecture": (
        broken(fields={"architectures": ["MambaForCausalLM"]}),
        r"has architectures=\['MambaForCausalLM'\] .* imports GPT2",
    ),
    "field": (broken(fields={"hidden_size": None}), "lacks hidden_size"),
    "missing": (broken(**{"model.norm.weight": None}), "lacks 1 of 21 tensors: model.norm.weight"),
    "unknown": (broken(extra=np.zeros(2, np.float32)), "has 1 tensors that this family does not know: extra"),
    "shape": (
        broken(**{"model.norm.weight": np.zeros(9, np.float32)}),
        r"1 tensors have other shapes .*: model.norm.weight \[9\] instead of \[16\]",
    ),
    "dtype": (
        broken(**{"model.norm.weight": np.zeros(16, np.int64)}),
        "has 'model.norm.weight' in I64, and this version reads F32, F16, BF16",
    ),
    "truncated": (truncated, "model.safetensors is cut short"),
    "shard": (without_a_shard, "lacks 1 of its 2 shards, first model-00002-of-00002.safetensors"),
    "pickle": (pickled, "pytorch_model.bin is a pickle.*convert it to safetensors"),
    "absent": (absent, "no weights at .*: it does not exist"),
    "header": (damaged("model.safetensors", b"\x10\0\0\0\0\0\0\0not a header at "), "has a damaged header"),
    "config": (damaged("config.json", b"{"), "config.json: .*; download it again"),
    "tokenizer": (with_long_tokenizer, f"the tokenizer has {V + 1} ids, and the model {V} input rows"),
    "mask_id": (broken("dream", {"mask_token_id": None}), "config.json has no mask_token_id; .* --mask_id"),
    "mask_range": (broken("dream", {"mask_token_id": V}), f"mask_id={V} must lie in"),
    "ids": (broken(fields={"eos_token_id": V}), rf"eos_token_id={V} must lie in \[0, {V}\)"),
    "id_type": (broken(fields={"bos_token_id": "1"}), "has bos_token_id='1', which must be a token's id"),
    "mask_type": (broken("dream", {"mask_token_id": True}), "has mask_token_id=True, which must be a token's id"),
    "text": (broken(fields={"hidden_size": "16"}), "has hidden_size='16', which must be a whole number of at least"),
    "fraction": (broken(fields={"num_attention_heads": 4.0}), "has num_attention_heads=4.0, which must be a whole"),
    "zero": (broken(fields={"num_attention_heads": 0}), "has num_attention_heads=0, which must be a whole number"),
    "number": (broken(fields={"rope_theta": "abc"}), "has rope_theta='abc', which must be a number, and finite"),
    "truth": (broken(fields={"tie_word_embeddings": 1}), "has tie_word_embeddings=1, which must be true or false"),
    "scaling_text": (broken(fields={"rope_scaling": "linear"}), "has rope_scaling='linear'"),
    "window_text": (broken(fields={"sliding_window": 9, "max_position_embeddings": None}), "has sliding_window=9"),
    "native": (broken(fields={"diffusionlm": {"family": "llama"}}), "has a damaged 'diffusionlm'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_source_is_refused_and_leaves_nothing(case, tmp_path):
    make, message = REFUSED[case]
    source = make(tmp_path / "source")
    with pytest.raises(UserError, match=message) as error:
        dlm.import_weights(source, tmp_path / "model")
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


@pytest.fixture(scope="module")
def exported(native, tmp_path_factory):
    """Return an export of a checkpoint that was made here."""
    directory = tmp_path_factory.mktemp("exported") / "out"
    dlm.export_weights(native(), directory, "llama")
    return directory


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 0}, r"has diffusionlm.max_length=0, which must lie in \[1, 32\]"),
        ({"max_length": 33}, r"has diffusionlm.max_length=33, which must lie in \[1, 32\]"),
        ({"start_id": 9999}, r"diffusionlm.start_id=9999 must lie in \[0, 41\)"),
        ({"bos_id": -3}, r"bos_token_id=-3 must lie in \[0, 41\)"),
        ({"template": {"foo": 1}}, "damaged 'diffusionlm': a chat template of version None"),
        ({"diffusion": {"schedule": "nope"}}, "damaged 'diffusionlm': .*schedule.*'nope'"),
        ({"family": "lama"}, "diffusionlm.family='lama', which must be one of gpt2"),
    ],
)
def test_an_edited_export_is_refused_and_leaves_nothing(changes, message, exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    fields = json.loads(file.read_text())
    for name, value in changes.items():
        old = fields["diffusionlm"][name]
        fields["diffusionlm"][name] = old | value if name == "diffusion" else value
    file.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message):
        dlm.import_weights(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_weights_without_room_are_refused_before_they_are_read(tmp_path, monkeypatch):
    """The host needs room for the tensors, for the rows that pad the vocabulary, and for the largest tensor again."""
    source = make_source("llama", tmp_path / "source", np.float16)
    sizes = [math.prod(shape) for shape in tensor_shapes("llama").values()]
    needed = 2 * (sum(sizes) + 2 * (128 - V) * D + max(sizes))  # the embedding and the head are padded
    monkeypatch.setattr(memory, "host_limit", lambda: (needed - 1, "this machine has"))
    with pytest.raises(UserError, match=r"importing .*source needs at least .*parameters .*, the largest tensor .*"):
        dlm.import_weights(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(memory, "host_limit", lambda: (needed, "this machine has"))
    dlm.import_weights(source, tmp_path / "model")
