"""Tokenizers: lossless round trips, exact byte counts, self-contained dictionaries, and clear refusals."""

import base64
import hashlib
import io
import json
import pickle

import numpy as np
import pytest
import sentencepiece
from support.texts import DOCUMENTS, TEXTS

from diffusionlm.data import tokenizers
from diffusionlm.errors import UserError


@pytest.fixture(scope="module")
def trained():
    return tokenizers.train_sentencepiece(DOCUMENTS, 400)


@pytest.fixture(params=["byte", "sentencepiece"])
def tokenizer(request, trained):
    return trained if request.param == "sentencepiece" else tokenizers.load("byte")


@pytest.mark.parametrize("text", TEXTS + DOCUMENTS[:2])
def test_round_trip_and_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.eos_id not in ids and tokenizer.bos_id not in ids


def test_round_trip_of_random_text(tokenizer):
    rng = np.random.default_rng(0)
    token_bytes = tokenizer.token_bytes()
    for _ in range(200):
        codes = rng.integers(0, rng.choice([128, 0x3000, 0x110000]), rng.integers(1, 60))
        text = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert token_bytes[ids].sum() == len(text.encode())


def test_control_ids_stand_for_no_text(tokenizer):
    ids = tokenizer.encode("a b")
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "a b"
    assert tokenizer.token_bytes()[tokenizer.eos_id] == 0
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.pad_id == tokenizer.eos_id


def test_a_dictionary_is_enough(tokenizer):
    again = tokenizers.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert (again.kind, again.sha256, again.vocab_size) == (tokenizer.kind, tokenizer.sha256, tokenizer.vocab_size)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_travels_to_other_processes(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.sha256 == tokenizer.sha256
    assert again.encode(TEXTS[8]) == tokenizer.encode(TEXTS[8])


def test_byte_ids():
    tokenizer = tokenizers.load("byte")
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (257, 256, None)
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_trained_pieces(trained):
    assert trained.vocab_size == 400
    assert (trained.bos_id, trained.eos_id) == (1, 2)
    assert [trained.decode([3 + byte]) for byte in range(128)] == [chr(byte) for byte in range(128)]
    assert not [i for i in range(259, 400) if "\n" in trained.decode([i])]
    assert len(trained.encode("\n\n\t")) == 3


def test_training_is_deterministic_and_silent(trained, capfd):
    assert tokenizers.train_sentencepiece(iter(DOCUMENTS), 400).sha256 == trained.sha256
    assert tokenizers.train_sentencepiece(DOCUMENTS[1:], 400).sha256 != trained.sha256
    assert capfd.readouterr() == ("", "")


def test_long_lines_are_learned_from():
    line = " ".join(f"supercalifragilistic{i}" for i in range(2000))
    assert len(tokenizers.train_sentencepiece([line], 320).encode(" supercalifragilistic")) <= 2


def test_errors_of_the_texts_come_through():
    def texts():
        yield "some text"
        raise UserError("the text cannot be read")

    with pytest.raises(UserError, match="cannot be read"):
        tokenizers.train_sentencepiece(texts(), 300)


def test_agrees_with_the_library_on_ordinary_text(trained):
    model = base64.b64decode(trained.to_dict()["model"])
    assert trained.sha256 == hashlib.sha256(model).hexdigest()
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert [trained.encode(text) for text in DOCUMENTS] == [library.encode(text) for text in DOCUMENTS]


def test_a_model_file_of_other_settings(tmp_path):
    """Models trained elsewhere normalise and add a leading space; they keep doing so, and a pad piece is used."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_writer=model, vocab_size=110, pad_id=3, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = tokenizers.load(str(tmp_path / "tokenizer.model"))
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert not tokenizer.lossless
    assert tokenizer.encode("the  word") == library.encode("the  word")
    assert tokenizer.decode(tokenizer.encode("the  word")) == "the word"
    assert tokenizer.token_bytes()[tokenizer.encode("the word")].sum() == len(" the word")
    assert (tokenizer.pad_id, tokenizer.eos_id) == (3, 2)


def test_loads_a_model_file(trained, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(base64.b64decode(trained.to_dict()["model"]))
    assert tokenizers.load(str(tmp_path / "tokenizer.model")).sha256 == trained.sha256


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sentencepeice"}, "did you mean 'sentencepiece'"),
        ({}, "unknown tokenizer kind None"),
        ({"kind": "sentencepiece"}, "no readable model"),
        ({"kind": "sentencepiece", "model": "?", "sha256": ""}, "no readable model"),
        ({"kind": "sentencepiece", "model": "AAAA", "sha256": "0" * 64}, "damaged"),
    ],
)
def test_refuses_dictionaries(values, message):
    with pytest.raises(UserError, match=message):
        tokenizers.from_dict(values)


def test_refuses_a_changed_model(trained):
    model = bytearray(base64.b64decode(trained.to_dict()["model"]))
    model[len(model) // 2] ^= 1
    with pytest.raises(UserError, match="damaged"):
        tokenizers.from_dict(trained.to_dict() | {"model": base64.b64encode(model).decode()})


def test_refuses_names_and_files(tmp_path):
    (tmp_path / "broken.model").write_bytes(b"no model")
    for name, message in {
        "bytes": "unknown tokenizer 'bytes'",
        "sentencepiece": "unknown tokenizer 'sentencepiece'",
        str(tmp_path / "absent.model"): "No such file",
        str(tmp_path): "unknown tokenizer",
        str(tmp_path / "broken.model"): "not a SentencePiece model",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            tokenizers.load(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["hello world"], 300, "at most 285"),
        (["hello"], 100, "at least 263"),
        ([], 300, "no text"),
        (["", "\n\n"], 300, "no text"),
    ],
)
def test_refuses_text_that_does_not_give_the_pieces(texts, vocab_size, message, capfd):
    with pytest.raises(UserError, match=message) as error:
        tokenizers.train_sentencepiece(texts, vocab_size)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
