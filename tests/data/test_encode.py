"""Encoding: documents fall into splits by their hash, and tokenizers see training documents only."""

import hashlib

import numpy as np
from support.datasets import expected_rows, prepare, rows, write_jsonl

from diffusionlm.data import tokenizers


def is_held_out(text, fraction):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) < fraction * 2**256


def test_documents_are_held_out_by_their_hash(texts, tmp_path):
    doubled = [*texts, *texts[::-1]]
    metadata = prepare(str(write_jsonl(tmp_path / "corpus.jsonl", doubled)), tmp_path / "out", validation_fraction=0.25)
    tokenizer = tokenizers.load("byte")
    for split, held_out in (("train", False), ("validation", True)):
        expected = [text for text in doubled if is_held_out(text, 0.25) == held_out]
        assert metadata.splits[split].documents == len(expected)
        np.testing.assert_array_equal(rows(tmp_path / "out", split)["tokens"], expected_rows(expected, tokenizer)[0])
    assert 0.1 < metadata.splits["validation"].documents / len(doubled) < 0.4


def test_the_tokenizer_is_trained_on_training_documents_only(jsonl, texts, tmp_path):
    metadata = prepare(jsonl, tmp_path / "out", tokenizer="sentencepiece", vocab_size=330, validation_fraction=0.5)
    training = [text for text in texts if not is_held_out(text, 0.5)]
    assert metadata.tokenizer["sha256"] == tokenizers.train_sentencepiece(training, 330).sha256
