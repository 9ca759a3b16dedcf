"""Streams into records: TFDS reads them, with tokens of 16 or 32 bits."""

import numpy as np
import tensorflow_datasets as tfds
from support.datasets import WideTokenizer, expected_rows, prepare, rows

from diffusionlm.data import tokenizers


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
