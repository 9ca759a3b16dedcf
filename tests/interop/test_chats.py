"""Chat templates and end tokens of released models at import, and back again through an export."""

import json

import pytest
from support import stub_hub
from support.foreign_weights import CONFIGS, V, make_source
from support.tokenizer_files import END

import diffusionlm as dlm
from diffusionlm import hub
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.data import jinja_templates
from diffusionlm.data.chat_templates import Message
from diffusionlm.data.tokenizers import from_dict, load
from diffusionlm.errors import UserError
from diffusionlm.interop import chats
from diffusionlm.interop.importing import summary

LLADA_PIECES = chats.FAMILIES["llada"].pieces
DREAM_PIECES = chats.FAMILIES["dream"].pieces
CHAT = "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant: ' }}"


def make_chat_source(family, directory, *, settings=None, pieces=(), files=None):
    """A tiny model with a tokenizer of letters and control tokens, whose ids fit into it."""
    source = make_source(family, directory)
    letters = ["\u2581", *"adehimnorstuwy:.?_"]
    vocab = {piece: i for i, piece in enumerate([END, *pieces, *letters])}
    assert len(vocab) <= V
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    marks = {"pattern": {"String": " "}, "content": "\u2581"}
    definition = {
        "added_tokens": [{"id": vocab[piece], "content": piece} | flags for piece in (END, *pieces)],
        "normalizer": {"type": "Replace", **marks},
        "decoder": {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (source / "tokenizer.json").write_text(json.dumps(definition))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": END} | (settings or {})))
    for name, content in (files or {}).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return source


def imported(source, output, **options):
    dlm.import_weights(source, output, **options)
    return checkpoint.load_sidecar(output)


@pytest.mark.parametrize(
    "settings, files, options, name, source",
    [
        ({"chat_template": CHAT}, {}, {}, "tokenizer_config.json", CHAT),
        ({}, {"chat_template.jinja": CHAT}, {}, "chat_template.jinja", CHAT),
        ({"chat_template": "old"}, {"chat_template.jinja": CHAT}, {}, "chat_template.jinja", CHAT),
        (
            {"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": CHAT}]},
            {},
            {},
            "tokenizer_config.json (default)",
            CHAT,
        ),
        (
            {"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": CHAT}]},
            {},
            {"chat_template": "rag"},
            "tokenizer_config.json (rag)",
            "r",
        ),
        (
            {},
            {"chat_template.jinja": CHAT, "additional_chat_templates/rag.jinja": "r"},
            {"chat_template": "rag"},
            "additional_chat_templates/rag.jinja",
            "r",
        ),
        ({"chat_template": CHAT}, {}, {"chat_template": "none"}, None, None),
        ({}, {}, {}, None, None),
    ],
)
def test_the_template_beside_the_weights_is_kept(tmp_path, settings, files, options, name, source):
    directory = make_chat_source("llama", tmp_path / "source", settings={"bos_token": END} | settings, files=files)
    sidecar = imported(directory, tmp_path / "model", **options)
    if name is None:
        assert sidecar.template is None and "chat template" not in summary(sidecar)
        return
    template = jinja_templates.from_dict(sidecar.template)
    assert (template.name, template.source, template.tokens["bos_token"]) == (name, source, END)
    assert f"chat template: {name}" in summary(sidecar)


@pytest.mark.parametrize(
    "family, pieces, name, templated",
    [
        ("llada", LLADA_PIECES, "source", True),
        ("llada", LLADA_PIECES[:2], "source", False),  # a base model's tokenizer
        ("dream", DREAM_PIECES, "dream-instruct", True),
        ("dream", DREAM_PIECES, "dream-base", False),
        ("llama", LLADA_PIECES, "instruct", False),
    ],
)
def test_a_family_s_own_template_stands_in_where_the_tokenizer_has_its_pieces(
    tmp_path, family, pieces, name, templated
):
    sidecar = imported(make_chat_source(family, tmp_path / name, pieces=pieces), tmp_path / "model")
    assert (sidecar.template is not None) == templated
    if templated:
        assert f"the one that {family} published" in summary(sidecar)
        tokenizer = from_dict(sidecar.tokenizer)
        ids = jinja_templates.from_dict(sidecar.template).prompt_ids([Message("user", "hi")], tokenizer)
        assert {tokenizer.piece_id(piece) for piece in pieces} <= set(ids)


@pytest.mark.parametrize(
    "family, settings, files, ends",
    [
        ("llama", {}, {}, (2,)),  # config.json's, besides the tokenizer's
        ("llama", {}, {"generation_config.json": {"eos_token_id": [0, 7, 2, 9]}}, (2, 7, 9)),
        ("llama", {}, {"generation_config.json": {"eos_token_id": 7}}, (2, 7)),
        ("llada", {}, {}, (2, 4)),  # the end of a turn, in the family's own template
        ("llada", {"chat_template": CHAT}, {}, (2, 4)),
    ],
)
def test_every_end_of_a_text_is_known(tmp_path, family, settings, files, ends):
    source = make_chat_source(family, tmp_path / "source", pieces=LLADA_PIECES, settings=settings, files=files)
    sidecar = imported(source, tmp_path / "model")
    assert (sidecar.eos_id, sidecar.end_ids) == (0, ends)
    assert dlm.load(tmp_path / "model").config.eos_ids == (0, *ends)


def test_an_export_keeps_the_template_and_the_ends(tmp_path):
    settings = {"bos_token": END, "chat_template": CHAT}
    source = make_chat_source("llada", tmp_path / "source", pieces=LLADA_PIECES, settings=settings)
    sidecar = imported(source, tmp_path / "model")
    dlm.export_weights(tmp_path / "model", tmp_path / "export", "llada")
    generation = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, *sidecar.end_ids]
    again = imported(tmp_path / "export", tmp_path / "again")
    assert (again.template, again.end_ids, again.eos_id) == (sidecar.template, sidecar.end_ids, sidecar.eos_id)


MANY = {"chat_template": [{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}]}


@pytest.mark.parametrize(
    "settings, files, options, message",
    [
        (MANY, {}, {}, "several chat templates and no default; choose with --chat_template: rag, tool_use"),
        (MANY, {}, {"chat_template": "rga"}, "unknown chat_template 'rga'; choose one of rag, tool_use, or none"),
        ({}, {}, {"chat_template": "rag"}, "there is no chat template beside the weights"),
        ({"chat_template": 3}, {}, {}, "the chat template of tokenizer_config.json is int, not a text"),
        ({"chat_template": [CHAT]}, {}, {}, "a chat_template without a name"),
        ({"chat_template": "{% for"}, {}, {}, "tokenizer_config.json, cannot be read: "),
        ({"chat_template": "a" * (1 << 19)}, {}, {}, "524,288 characters, more than 262,144"),
        ({}, {"chat_template.jinja": "a" * (1 << 21)}, {}, "chat_template.jinja has 2,097,152 bytes"),
        ({}, {"generation_config.json": {"eos_token_id": [0, V]}}, {}, rf"eos_token_id={V} must lie in \[0, {V}\)|\[0"),
        ({}, {"generation_config.json": "{"}, {}, "generation_config.json"),
    ],
)
def test_what_is_wrong_with_a_template_is_one_line_and_writes_nothing(tmp_path, settings, files, options, message):
    source = make_chat_source("llama", tmp_path / "source", settings=settings, files=files)
    with pytest.raises(UserError, match=message) as error:
        dlm.import_weights(source, tmp_path / "model", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "model").exists()


def test_the_template_beside_a_named_tokenizer_counts(tmp_path):
    other = make_chat_source("llama", tmp_path / "other", settings={"chat_template": CHAT})
    source = make_source("llama", tmp_path / "source")
    assert load(str(other)).vocab_size <= V and CONFIGS["llama"]
    assert imported(source, tmp_path / "model", tokenizer=str(other)).template["source"] == CHAT
    with pytest.raises(UserError, match="chat_template=x needs a tokenizer"):
        dlm.import_weights(source, tmp_path / "again", chat_template="x")


def test_a_tokenizer_of_the_hub_brings_its_template(tmp_path, monkeypatch):
    stub = stub_hub.install(monkeypatch, tmp_path / "hub")
    other = make_chat_source("llama", tmp_path / "other", settings={"chat_template": CHAT})
    (tmp_path / "empty").mkdir()
    hub.push(tmp_path / "empty", "me/other", private=False, message="x")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        stub.add("me/other", name, (other / name).read_text())
    found = imported(make_source("llama", tmp_path / "source"), tmp_path / "model", tokenizer="hf://me/other")
    assert found.template["source"] == CHAT and found.tokenizer == load(str(other)).to_dict()
