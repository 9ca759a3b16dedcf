"""The promises of every tokenizer: lossless round trips, exact byte counts, whole dictionaries, clear refusals."""

import json
import pickle

import numpy as np
import pytest
from support.texts import DOCUMENTS, TEXTS

from diffusionlm.data import tokenizers
from diffusionlm.errors import UserError


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sentencepeice"}, "did you mean 'sentencepiece'"),
        ({}, "unknown tokenizer kind None"),
        ({"kind": "sentencepiece"}, "missing required field `sha256`"),
        ({"kind": "sentencepiece", "model": "?", "sha256": "0"}, "sha256='0'.*it is damaged"),
        ({"kind": "sentencepiece", "model": "AAAA", "sha256": "0" * 64}, "damaged"),
    ],
)
def test_refuses_dictionaries(values, message):
    with pytest.raises(UserError, match=message):
        tokenizers.from_dict(values)


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
    "change, message",
    [
        ({"sha256": "0" * 64}, "is damaged: sha256"),
        ({"sha256": None}, "sha256=None: Expected `str`"),
        ({"kind": []}, "unknown tokenizer kind"),
        ({"extra": 1}, "unknown field `extra`"),
    ],
)
def test_refuses_definitions_with_one_change(tokenizer, change, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as caught:
        tokenizers.from_dict(tokenizer.to_dict() | change)
    assert "\n" not in str(caught.value)
