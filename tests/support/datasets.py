"""Datasets of texts for tests of preparing and reading, and their records by definition."""

import json
from pathlib import Path

import numpy as np

from diffusionlm.data import prepare as prepare_lib
from diffusionlm.data import tokenizers
from diffusionlm.data.pipeline import open_dataset

WORDS = "the a little cat dog saw found red big house and then ran é 😀 \n \t  you 好".split(" ")
LENGTH = 15  # of sequences; records hold one more token

# The small dataset behind the fixture `path`.
SHORT_LENGTH = 9
SHORT_TEXTS = [f"document {i} says {'word ' * (i % 7)}and [ends]" for i in range(40)]
HELD_OUT_TEXTS = [f"held-out document {i}" for i in range(20)]


def prepare(source, output, **settings):
    settings = {"tokenizer": "byte", "sequence_length": LENGTH, "validation_fraction": 0} | settings
    return prepare_lib.prepare(source, output, progress=False, **settings)


def write_jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def rows(path, split="train"):
    dataset = open_dataset(path)
    return dataset.rows(split, range(dataset.size(split)))


def expected_rows(texts, tokenizer, length=LENGTH):
    """Records written down from the definition, a token at a time."""
    documents = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    stream = [(token, number) for number, document in enumerate(documents) for token in document]
    tokens, segments = [], []
    for start in range(0, len(stream) - length, length + 1):
        record = stream[start : start + length + 1]
        numbers = list(dict.fromkeys(number for _, number in record))
        tokens.append([token for token, _ in record])
        segments.append([1 + numbers.index(number) for _, number in record])
    return np.array(tokens), np.array(segments)


class WideTokenizer(tokenizers.ByteTokenizer):
    """Bytes at the end of a vocabulary that 16 bits do not hold."""

    kind, vocab_size, eos_id = "wide", 70_001, 70_000

    def encode(self, text):
        return [69_000 + byte for byte in text.encode()]

    def token_bytes(self):
        return (np.arange(self.vocab_size) // 1000 == 69).astype(np.int32)
