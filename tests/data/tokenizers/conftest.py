"""Fixtures of the tests of tokenizers: trained SentencePiece models."""

import io

import pytest
import sentencepiece
from support.texts import DOCUMENTS

from diffusionlm.data import tokenizers


@pytest.fixture(scope="session")
def trained():
    """A SentencePiece tokenizer that was trained here."""
    return tokenizers.train_sentencepiece(DOCUMENTS, 400)


@pytest.fixture(scope="session")
def models(trained):
    """The serialized SentencePiece models: one trained here, and one with LLaMA's settings."""
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
    return {"metaspace": trained.files()["tokenizer.model"], "prefixed": model.getvalue()}
