"""The files of released tokenizers: merges, roles, names, and which files of a directory count."""

import json

import pytest
from support.texts import DOCUMENTS
from support.tokenizer_files import (
    CALL,
    END,
    merges_of,
    slow_bpe,
    train_byte_level,
    write_byte_level,
    write_merges,
)

from diffusionlm.data import tokenizers
from diffusionlm.errors import UserError


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast"])
def test_merges_as_they_are_defined(name, tmp_path):
    tokenizer = tokenizers.load(str(write_merges(tmp_path, name)))
    definition = json.loads(train_byte_level().to_str())
    for text in [*DOCUMENTS, "it's  we'll\n\n don't 1234 +-= x \n", "   ", "\t\tif x:\n\t\t\ty()\n"]:
        if text.isascii():
            assert tokenizer.encode(text) == slow_bpe(text, definition["model"]["vocab"], merges_of(definition))
    assert tokenizer.eos_id == len(definition["model"]["vocab"]) == tokenizer.vocab_size - 2


def test_qwen2_cuts_words_and_composes_accents(tmp_path):
    """It takes digits one by one, a sign with the word behind it, and NFC."""
    tokenizer = tokenizers.load(str(write_merges(tmp_path, "Qwen2Tokenizer")))
    assert not tokenizer.lossless
    assert tokenizer.encode("1234") == [tokenizer.encode(digit)[0] for digit in "1234"]
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"
    for text in ("(word", "a  b", "x\r\n\n y", "I'LL"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_role_makes_a_control_token(tmp_path):
    """A mask that its maker forgot to flag as special must not come out of a text either."""
    write_byte_level(tmp_path, settings={"eos_token": END, "mask_token": CALL, "pad_token": None})
    tokenizer = tokenizers.load(str(tmp_path))
    assert tokenizer.marks == ()
    assert tokenizer.piece_id(CALL) not in tokenizer.encode(f"a{CALL}b")
    assert tokenizer.decode(tokenizer.encode(f"a{CALL}b")) == f"a{CALL}b"
    assert tokenizer.token_bytes()[tokenizer.piece_id(CALL)] == 0
    assert tokenizer.pad_id == tokenizer.eos_id == tokenizer.piece_id(END)


def test_ids_of_the_model_count_where_the_files_are_silent(tmp_path):
    write_byte_level(tmp_path, settings={"bos_token": None, "eos_token": END})
    config = {"bos_token_id": 7, "eos_token_id": [7, 8], "pad_token_id": 9}
    tokenizer = tokenizers.load_directory(tmp_path, config)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, tokenizer.piece_id(END), 9)
    assert tokenizers.load(str(tmp_path)).pad_id == tokenizer.eos_id
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert tokenizers.load(str(tmp_path)).sha256 == tokenizer.sha256
    (tmp_path / "tokenizer_config.json").unlink()
    silent = tokenizers.load_directory(tmp_path, config)
    assert (silent.bos_id, silent.eos_id) == (7, 7)


def test_files_are_the_originals(tmp_path, models):
    write_byte_level(tmp_path)
    tokenizer = tokenizers.load(str(tmp_path / "tokenizer.json"))  # with what lies beside it
    names = ["tokenizer.json", "tokenizer_config.json"]
    assert tokenizer.files() == {name: (tmp_path / name).read_bytes() for name in names}
    assert tokenizer.sha256 == tokenizers.load(str(tmp_path)).sha256
    assert tokenizers.ByteTokenizer().files() == {}
    assert tokenizers.SentencePieceTokenizer(models["prefixed"]).files() == {"tokenizer.model": models["prefixed"]}


def test_the_original_names_of_gpt2(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "old").mkdir()
    write_merges(tmp_path / "new", "GPT2Tokenizer")
    for name in ("tokenizer_config.json", "added_tokens.json"):
        (tmp_path / "new" / name).unlink()
    for name, openai_name in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        (tmp_path / "old" / openai_name).write_bytes((tmp_path / "new" / name).read_bytes())
    new, old = tokenizers.load(str(tmp_path / "new")), tokenizers.load(str(tmp_path / "old"))
    assert new.sha256 == old.sha256 and sorted(old.files()) == ["merges.txt", "vocab.json"]
    assert old.eos_id is None  # this vocabulary has no such piece


def test_which_files_of_a_directory_count(tmp_path, models):
    assert tokenizers.load_directory(tmp_path, {}) is None
    (tmp_path / "tokenizer.model").write_bytes(models["prefixed"])
    assert tokenizers.load_directory(tmp_path, {}).kind == "sentencepiece"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 400}))
    with pytest.raises(UserError, match="adds '<pad>' to tokenizer.model"):
        tokenizers.load_directory(tmp_path, {})
    write_byte_level(tmp_path)
    assert tokenizers.load_directory(tmp_path, {}).kind == "huggingface"


def broken(directory, name, content):
    (directory / name).write_text(content)
    return directory


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: write_merges(d, "BertTokenizer"), "'?BertTokenizer.*GPT2Tokenizer"),
        (lambda d: broken(d, "tokenizer.json", "{"), "tokenizer.json of the tokenizer is damaged"),
        (lambda d: broken(d, "tokenizer.json", "[]"), "a JSON list, not an object"),
        (lambda d: broken(d, "tokenizer.json", "{}"), "no vocabulary"),
        (lambda d: broken(write_byte_level(d), "tokenizer_config.json", "\x00"), "tokenizer_config.json"),
        (
            lambda d: broken(write_byte_level(d), "tokenizer_config.json", '{"added_tokens_decoder": {"1": {}}}'),
            "added",
        ),
        (lambda d: broken(write_merges(d, "GPT2Tokenizer"), "merges.txt", "a b c\n"), "'a b c' is not a merge"),
        (lambda d: broken(write_merges(d, "GPT2Tokenizer"), "added_tokens.json", '{"<x>": 999}'), "999"),
        (
            lambda d: broken(d, "tokenizer.json", json.dumps({"model": {"vocab": {"a": 0}}, "decoder": None})),
            "decodes by nothing",
        ),
        (
            lambda d: broken(
                d, "tokenizer.json", json.dumps({"model": {"vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}})
            ),
            "decodes by WordPiece",
        ),
        (
            lambda d: broken(
                d, "tokenizer.json", json.dumps({"model": {"vocab": {"a": 0}}, "decoder": {"type": "ByteLevel"}})
            ),
            "damaged, or newer",
        ),
        (
            lambda d: broken(d, "tokenizer.json", json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}})),
            "a Unigram model; only",
        ),
    ],
)
def test_refuses_files(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        tokenizers.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_refuses_names(tmp_path):
    for name, message in {
        str(tmp_path / "tokenizer.json"): "No such file",
        str(tmp_path): "unknown tokenizer",
        str(tmp_path / "tokenizer.jsn"): "tokenizer.json",
    }.items():
        with pytest.raises(UserError, match=message):
            tokenizers.load(name)
