"""Fixtures of the tests of data: random texts, and a small prepared dataset."""

import json
import random

import pytest
from support.datasets import HELD_OUT_TEXTS, SHORT_LENGTH, SHORT_TEXTS, WORDS, write_jsonl

from diffusionlm.data import pipeline
from diffusionlm.data.prepare import prepare


@pytest.fixture(scope="session")
def texts():
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(120)]


@pytest.fixture
def jsonl(tmp_path, texts):
    return str(write_jsonl(tmp_path / "corpus.jsonl", texts))


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """A prepared dataset of bytes, with both splits."""
    folder = tmp_path_factory.mktemp("pipeline")
    for name, documents in (("train", SHORT_TEXTS), ("valid", HELD_OUT_TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    sources = {"source": str(folder / "train.jsonl"), "validation": str(folder / "valid.jsonl")}
    prepare(**sources, output=folder / "out", tokenizer="byte", sequence_length=SHORT_LENGTH, progress=False)
    return folder / "out"


@pytest.fixture(scope="session")
def dataset(path):
    return pipeline.open_dataset(path)


@pytest.fixture(scope="session")
def stored(dataset):
    """The tokens of all training rows."""
    return dataset.rows("train", range(dataset.size("train")))["tokens"]
