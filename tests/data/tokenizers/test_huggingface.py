"""Tokenizers of released models: the same ids as independent implementations, exact bytes, and no token out of text."""

import base64
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
from sentencepiece import sentencepiece_model_pb2
from support.texts import DOCUMENTS, TEXTS

from diffusionlm import config, config_io
from diffusionlm.data import prepare, tokenizers
from diffusionlm.data.chat_templates import Message, Template
from diffusionlm.errors import UserError

END, MASK, CALL = "<|endoftext|>", "<|mdm_mask|>", "<tool_call>"
CONTROLS = [*(f"a {piece}b" for piece in (END, MASK, "<s>", "</s>", "<unk>")), f"{END}{END}", " <s>", "<0x0A>"]
ASCII_WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


def train_byte_level():
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(DOCUMENTS, trainer)
    made.add_special_tokens([END, MASK])
    made.add_tokens([CALL, "    "])
    return made


def write_byte_level(directory, *, settings=None):
    train_byte_level().save(str(directory / "tokenizer.json"))
    named = {"eos_token": END, "mask_token": {"content": MASK}} if settings is None else settings
    (directory / "tokenizer_config.json").write_text(json.dumps(named))
    return directory


def write_merges(directory, name):
    """The vocabulary and merges of `train_byte_level` as files of their own."""
    definition = json.loads(train_byte_level().to_str())
    vocab = definition["model"]["vocab"]
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges_of(definition)))
    (directory / "added_tokens.json").write_text(json.dumps({END: len(vocab), CALL: len(vocab) + 1}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, "eos_token": END}))
    return directory


def merges_of(definition):
    return [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in definition["model"]["merges"]]


def write_metaspace(directory, model):
    """A SentencePiece BPE model as a tokenizer.json in the form of LLaMA's.

    It joins the pair first whose piece was learnt first, which is what its scores say.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    learnt = sorted((-p.score, i, p.piece) for i, p in enumerate(proto.pieces) if p.type == p.NORMAL)
    merges = [(p[:k], p[k:]) for _, _, p in learnt for k in range(1, len(p)) if p[:k] in vocab and p[k:] in vocab]
    prefix = proto.normalizer_spec.add_dummy_prefix
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    special = dict.fromkeys(("single_word", "lstrip", "rstrip"), False) | {"normalized": True, "special": True}
    definition = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [{"id": i, "content": piece} | special for i, piece in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "\u2581"}] * prefix + [spaces],
        },
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": merges,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(definition))
    named = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(named))
    return directory


def slow_bpe(text, vocab, merges):
    """Byte pair encoding by its definition: in each word, join the pair that was learnt first, until none is left."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + k) for k, byte in enumerate(hidden)}
    rank = {pair: k for k, pair in enumerate(merges)}
    ids = []
    for word in ASCII_WORDS.findall(text):
        parts = [letters[byte] for byte in word.encode()]
        while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in rank]:
            first, k = min(pairs, key=rank.get), 0
            while k < len(parts) - 1:
                if (parts[k], parts[k + 1]) == first:
                    parts[k : k + 2] = ["".join(first)]
                k += 1
        ids += [vocab[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return tokenizers.load(str(write_byte_level(tmp_path_factory.mktemp("bytes"))))


@pytest.fixture(scope="module")
def models():
    """The serialized SentencePiece models: ours, and one with LLaMA's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    ours = tokenizers.train_sentencepiece(DOCUMENTS, 400).files()["tokenizer.model"]
    return {"metaspace": ours, "prefixed": model.getvalue()}


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


def test_lossless_ones_say_so(byte_level, models, tmp_path):
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
    ours = tokenizers.load(str(write_metaspace(tmp_path, models[kind])))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=models[kind])
    for text in [*DOCUMENTS, *(text for text in TEXTS if text.strip() and "\u2581" not in text)]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 2)


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


def test_added_tokens_that_are_text_are_marks(byte_level):
    assert byte_level.marks == (CALL,)  # and not the run of spaces
    ids = byte_level.encode(f"a{CALL}b")
    assert byte_level.piece_id(CALL) in ids and byte_level.decode(ids) == f"a{CALL}b"
    assert byte_level.token_bytes()[byte_level.piece_id(CALL)] == len(CALL)
    assert byte_level.piece_id("a") is None and byte_level.piece_id("<|none|>") is None
    definition = json.loads(train_byte_level().to_str())
    assert byte_level.vocab_size == len(byte_level.token_bytes()) == len(definition["model"]["vocab"]) + 4


def test_a_role_makes_a_control_token(tmp_path):
    """A mask that its maker forgot to flag as special must not come out of a text either."""
    write_byte_level(tmp_path, settings={"eos_token": END, "mask_token": CALL, "pad_token": None})
    tokenizer = tokenizers.load(str(tmp_path))
    assert tokenizer.marks == ()
    assert tokenizer.piece_id(CALL) not in tokenizer.encode(f"a{CALL}b")
    assert tokenizer.decode(tokenizer.encode(f"a{CALL}b")) == f"a{CALL}b"
    assert tokenizer.token_bytes()[tokenizer.piece_id(CALL)] == 0
    assert tokenizer.pad_id == tokenizer.eos_id == tokenizer.piece_id(END)


def test_dropping_white_space_is_a_loss(byte_level, tmp_path):
    definition = json.loads(byte_level.files()["tokenizer.json"])
    cutters = [{"type": "WhitespaceSplit"}, definition["pre_tokenizer"]]
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": cutters}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = tokenizers.load(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("a b")) == "ab" and not tokenizer.lossless


def test_ids_of_the_model_count_where_the_files_are_silent(tmp_path):
    write_byte_level(tmp_path, settings={"bos_token": None, "eos_token": END})
    told = {"bos_token_id": 7, "eos_token_id": [7, 8], "pad_token_id": 9}
    tokenizer = tokenizers.load_directory(tmp_path, told)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, tokenizer.piece_id(END), 9)
    assert tokenizers.load(str(tmp_path)).pad_id == tokenizer.eos_id
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert tokenizers.load(str(tmp_path)).sha256 == tokenizer.sha256
    (tmp_path / "tokenizer_config.json").unlink()
    silent = tokenizers.load_directory(tmp_path, told)
    assert (silent.bos_id, silent.eos_id) == (7, 7)


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
        with pytest.raises(UserError, match="no readable files"):
            tokenizers.from_dict(values | damage)


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
    for ours, theirs in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        (tmp_path / "old" / theirs).write_bytes((tmp_path / "new" / ours).read_bytes())
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
        (lambda d: broken(write_merges(d, "GPT2Tokenizer"), "merges.txt", "a b c\n"), "'a b c' is no merge"),
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


def test_preparing_takes_a_directory(tmp_path):
    write_byte_level(tmp_path)
    (tmp_path / "text.txt").write_text("".join(DOCUMENTS))
    made = prepare.prepare(str(tmp_path / "text.txt"), tmp_path / "made", sequence_length=16, tokenizer=str(tmp_path))
    stored = tokenizers.from_dict(made.tokenizer)
    assert stored.sha256 == tokenizers.load(str(tmp_path)).sha256
    split = made.splits["train"]
    assert split.token_bytes == split.raw_bytes


def test_where_a_tokenizer_lies_is_no_part_of_a_run():
    told = [
        config_io.scientific_fields(config.Config(data=config.DataConfig(source="x", tokenizer=name)))["data.tokenizer"]
        for name in ("a/tokenizer.json", "b/tokenizer.json", "b")
    ]
    assert len(set(told)) == 1


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
    ours, theirs = tokenizers.load(str(write_metaspace(tmp_path, model))), tokenizers.SentencePieceTokenizer(model)
    stories = Path(data_dir, "tinystories", "valid.jsonl").read_text().splitlines()[:20]
    for text in [*(json.loads(line)["text"] for line in stories), *CONTROLS, "\u4f60\u597d \U0001f600\n\ttab"]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    np.testing.assert_array_equal(ours.token_bytes(), theirs.token_bytes())


def check_stories(tokenizer, data_dir):
    sizes = tokenizer.token_bytes()
    for line in Path(data_dir, "tinystories", "valid.jsonl").read_text().splitlines()[:50]:
        text = json.loads(line)["text"]
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and sizes[ids].sum() == len(text.encode())
