"""Streams into records: TFDS reads them, with tokens of 16 or 32 bits."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from support.datasets import WideTokenizer, expected_rows, prepare, rows

from diffusionlm.data import tokenizers
from diffusionlm.data.stream import FEW_SHARDS, FEW_TOKENS, SHARD_TOKENS, count_shards


def test_tfds_reads_it_back(jsonl, texts, tmp_path):
    prepare(jsonl, tmp_path / "out")
    builder = tfds.builder_from_directory(tmp_path / "out")
    source = builder.as_data_source("train")
    assert builder.info.file_format.value == "array_record"
    tokens, segments = expected_rows(texts, tokenizers.load("byte"))
    assert len(source) == builder.info.splits["train"].num_examples == len(tokens)
    np.testing.assert_array_equal(source[3]["tokens"], tokens[3])
    np.testing.assert_array_equal(source[3]["segment_ids"], segments[3])
    assert source[3]["tokens"].dtype == source[3]["segment_ids"].dtype == np.uint16


def test_large_vocabularies_take_32_bits(jsonl, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(tokenizers.KINDS, "wide", WideTokenizer)
    prepare(jsonl, tmp_path / "out", tokenizer=WideTokenizer())
    np.testing.assert_array_equal(rows(tmp_path / "out")["tokens"], expected_rows(texts, WideTokenizer())[0])
    source = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    assert (source[0]["tokens"].dtype, source[0]["segment_ids"].dtype) == (np.uint32, np.uint16)


@pytest.mark.parametrize(("tokens", "shards"), [(1, 1), (4_000_000, 1), (5_000_000, 2), (40_000_000, 8), (10**9, 15)])
def test_shards_of_a_split(tokens, shards):
    assert count_shards(tokens) == shards


def test_shards_are_neither_large_nor_many_and_small():
    tokens = np.unique(np.geomspace(1, 1e13, 2000).astype(np.int64)).tolist()
    counts = np.array([count_shards(size) for size in tokens])
    assert (np.diff(counts) >= 0).all()
    assert all(size <= SHARD_TOKENS * count for size, count in zip(tokens, counts, strict=True))
    assert all(size >= FEW_TOKENS * count for size, count in zip(tokens, counts, strict=True) if count > 1)
    assert all(count <= max(FEW_SHARDS, 1 + size // SHARD_TOKENS) for size, count in zip(tokens, counts, strict=True))
