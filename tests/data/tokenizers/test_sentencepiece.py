"""SentencePiece: pieces of the models trained here, models of other settings, and agreement with the library."""

import base64
import hashlib
import io

import pytest
import sentencepiece
from support.texts import DOCUMENTS

from diffusionlm.data import tokenizers
from diffusionlm.errors import UserError


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


def test_refuses_a_changed_model(trained):
    model = bytearray(base64.b64decode(trained.to_dict()["model"]))
    model[len(model) // 2] ^= 1
    with pytest.raises(UserError, match="damaged"):
        tokenizers.from_dict(trained.to_dict() | {"model": base64.b64encode(model).decode()})


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
