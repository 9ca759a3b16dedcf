"""Tokenizers of released models: the same ids as independent implementations, exact bytes, and no token out of text."""

import base64
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from support.texts import DOCUMENTS, TEXTS
from support.tokenizer_files import (
    CALL,
    CONTROLS,
    END,
    MASK,
    slow_bpe,
    train_byte_level,
    write_byte_level,
    write_metaspace,
)

from diffusionlm import config, fingerprint
from diffusionlm.data import prepare, tokenizers
from diffusionlm.data.chat_templates import Message, Template
from diffusionlm.errors import UserError


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return tokenizers.load(str(write_byte_level(tmp_path_factory.mktemp("bytes"))))


@pytest.fixture(params=["byte_level", "metaspace", "prefixed"])
def tokenizer(request, byte_level, models, tmp_path_factory):
    if request.param == "byte_level":
        return byte_level
    return tokenizers.load(str(write_metaspace(tmp_path_factory.mktemp("meta"), models[request.param])))


@pytest.mark.parametrize("text", [*TEXTS, *CONTROLS, *DOCUMENTS[:2], "x\u2581 \u2581", "\u2581"])
def test_round_trip_and_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    n = tokenizer.token_bytes()[ids].sum()
    assert n == len(text.encode()) or not tokenizer.lossless
    assert n in (len(text.encode()), len(text.encode()) + 1)  # the space before a text
    control = {tokenizer.piece_id(piece) for piece in (END, MASK, "<s>", "</s>", "<unk>")} - {None}
    assert not control & set(ids) and tokenizer.token_bytes()[[*control]].sum() == 0
    assert tokenizer.decode([*ids, *control]) == text


def test_lossless_tokenizers_say_so(byte_level, models, tmp_path):
    assert byte_level.lossless
    assert tokenizers.load(str(write_metaspace(tmp_path, models["metaspace"]))).lossless
    assert not tokenizers.load(str(write_metaspace(tmp_path, models["prefixed"]))).lossless


def test_bytes_are_those_that_a_token_decodes_to(tokenizer):
    """Between two letters, so that no decoder takes a space off and no half character is alone."""
    sizes, letter = tokenizer.token_bytes(), tokenizer.encode("a")
    others = len(tokenizer.decode([*letter, *letter]).encode())
    for i in range(tokenizer.vocab_size):
        text = tokenizer.decode([*letter, i, *letter])
        if "\ufffd" not in text:
            assert sizes[i] == len(text.encode()) - others
    assert sizes[tokenizer.encode("\ufffd")].sum() in (3, 4)


@pytest.mark.parametrize("kind", ["metaspace", "prefixed"])
def test_agrees_with_sentencepiece(kind, models, tmp_path):
    tokenizer = tokenizers.load(str(write_metaspace(tmp_path, models[kind])))
    library = sentencepiece.SentencePieceProcessor(model_proto=models[kind])
    for text in [*DOCUMENTS, *(text for text in TEXTS if text.strip() and "\u2581" not in text)]:
        assert tokenizer.encode(text) == library.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == library.decode(library.encode(text))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


def test_added_tokens_that_are_text_are_marks(byte_level):
    assert byte_level.marks == (CALL,)  # and not the run of spaces
    ids = byte_level.encode(f"a{CALL}b")
    assert byte_level.piece_id(CALL) in ids and byte_level.decode(ids) == f"a{CALL}b"
    assert byte_level.token_bytes()[byte_level.piece_id(CALL)] == len(CALL)
    assert byte_level.piece_id("a") is None and byte_level.piece_id("<|none|>") is None
    definition = json.loads(train_byte_level().to_str())
    assert byte_level.vocab_size == len(byte_level.token_bytes()) == len(definition["model"]["vocab"]) + 4


def test_dropping_white_space_is_a_loss(byte_level, tmp_path):
    definition = json.loads(byte_level.files()["tokenizer.json"])
    cutters = [{"type": "WhitespaceSplit"}, definition["pre_tokenizer"]]
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": cutters}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = tokenizers.load(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("a b")) == "ab" and not tokenizer.lossless


def test_a_dictionary_is_enough(tokenizer):
    again = tokenizers.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    pickled = pickle.loads(pickle.dumps(tokenizer))
    for other in (again, pickled):
        assert (other.kind, other.sha256, other.vocab_size) == (tokenizer.kind, tokenizer.sha256, tokenizer.vocab_size)
        assert (other.bos_id, other.eos_id, other.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        assert [other.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        assert other.files() == tokenizer.files()


def test_refuses_damaged_dictionaries(byte_level):
    values = byte_level.to_dict()
    content = bytearray(base64.b64decode(values["files"]["tokenizer.json"]))
    content[len(content) // 2] ^= 1
    changed = values["files"] | {"tokenizer.json": base64.b64encode(content).decode()}
    for damage in ({"files": changed}, {"ids": [1, 2, 3]}, {"family": "gpt2"}, {"sha256": "0"}):
        with pytest.raises(UserError, match="damaged"):
            tokenizers.from_dict(values | damage)
    for damage in ({"files": None}, {"files": {"tokenizer.json": "?"}}, {"ids": None}):
        with pytest.raises(UserError, match="damaged|no readable files"):
            tokenizers.from_dict(values | damage)


def test_preparing_takes_a_directory(tmp_path):
    write_byte_level(tmp_path)
    (tmp_path / "text.txt").write_text("".join(DOCUMENTS))
    metadata = prepare.prepare(
        str(tmp_path / "text.txt"), tmp_path / "out", sequence_length=16, tokenizer=str(tmp_path)
    )
    stored = tokenizers.from_dict(metadata.tokenizer)
    assert stored.sha256 == tokenizers.load(str(tmp_path)).sha256
    split = metadata.splits["train"]
    assert split.token_bytes == split.raw_bytes


def test_the_path_of_a_tokenizer_is_no_part_of_a_run():
    fields = [
        fingerprint.scientific_fields(config.Config(data=config.DataConfig(source="x", tokenizer=name)))[
            "data.tokenizer"
        ]
        for name in ("a/tokenizer.json", "b/tokenizer.json", "b")
    ]
    assert len(set(fields)) == 1


def test_gpt2(data_dir):
    tokenizer = tokenizers.load(str(Path(data_dir, "tokenizers", "gpt2")))
    vocab = json.loads(Path(data_dir, "tokenizers", "gpt2", "encoder.json").read_text())
    lines = Path(data_dir, "tokenizers", "gpt2", "vocab.bpe").read_text().splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines]
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.lossless) == (50257, 50256, 50256, True)
    for text in [
        *filter(str.isascii, [*TEXTS, *CONTROLS]),
        Path(data_dir, "tinyshakespeare", "input.txt").read_text()[:20000],
    ]:
        assert tokenizer.encode(text) == slow_bpe(text, vocab, merges)
    check_stories(tokenizer, data_dir)


def test_qwen2(data_dir):
    tokenizer = tokenizers.load(str(Path(data_dir, "tokenizers", "qwen2")))
    assert tokenizer.encode("Hello world") == [9707, 1879]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.pad_id) == (151646, None, 151643)
    assert tokenizer.eos_id == tokenizer.piece_id("<|im_end|>") == 151645
    template = Template("qwen2", "<|im_start|>{role}\n{content}<|im_end|>\n", tokenizer.piece_id(END))
    ids = template.prompt_ids([Message("user", "Hello world")], tokenizer)
    assert ids == [151643, 151644, 872, 198, 9707, 1879, 151645, 198, 151644, 77091, 198]
    with pytest.raises(ValueError, match="token of its own"):
        template.prompt_ids([Message("user", "now <|im_end|>")], tokenizer)
    for text in CONTROLS:
        assert 151643 not in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    check_stories(tokenizer, data_dir)


def test_mistral(data_dir, tmp_path):
    model = Path(data_dir, "tokenizers", "mistral-v1", "tokenizer.model").read_bytes()
    tokenizer, original = (
        tokenizers.load(str(write_metaspace(tmp_path, model))),
        tokenizers.SentencePieceTokenizer(model),
    )
    stories = Path(data_dir, "tinystories", "valid.jsonl").read_text().splitlines()[:20]
    for text in [*(json.loads(line)["text"] for line in stories), *CONTROLS, "\u4f60\u597d \U0001f600\n\ttab"]:
        assert tokenizer.encode(text) == original.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    np.testing.assert_array_equal(tokenizer.token_bytes(), original.token_bytes())


def check_stories(tokenizer, data_dir):
    sizes = tokenizer.token_bytes()
    for line in Path(data_dir, "tinystories", "valid.jsonl").read_text().splitlines()[:50]:
        text = json.loads(line)["text"]
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and sizes[ids].sum() == len(text.encode())
