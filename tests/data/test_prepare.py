"""Preparing: the records are the documents, in order, for every way of getting there; failures leave nothing behind."""

import base64
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.datasets import LENGTH, expected_rows, prepare, rows, write_jsonl

from diffusionlm.data import prepare as prepare_lib
from diffusionlm.data import stream, text_files, tokenizers
from diffusionlm.data.pipeline import open_dataset
from diffusionlm.errors import UserError
from diffusionlm.ownership.claims import whole_directory


def test_records_are_the_documents_with_eos_cut(jsonl, texts, tmp_path):
    metadata = prepare(jsonl, tmp_path / "out")
    stored = rows(tmp_path / "out")
    tokens, segments = expected_rows(texts, tokenizers.load("byte"))
    np.testing.assert_array_equal(stored["tokens"], tokens)
    np.testing.assert_array_equal(stored["segment_ids"], segments)
    split = metadata.splits["train"]
    assert (split.records, split.documents) == (len(tokens), len(texts))
    assert split.raw_bytes == split.token_bytes == sum(len(text.encode()) for text in texts)
    assert split.tokens == split.raw_bytes + len(texts)


def test_bytes_of_a_trained_tokenizer_are_the_raw_bytes(jsonl, texts, tmp_path):
    metadata = prepare(jsonl, tmp_path / "out", tokenizer="sentencepiece", vocab_size=330, sequence_length=3)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.metadata == metadata
    assert dataset.tokenizer.vocab_size == metadata.vocab_size == 330
    split = metadata.splits["train"]
    stored = dataset.tokenizer.token_bytes()[rows(tmp_path / "out")["tokens"]].sum()
    tail = split.tokens - 4 * split.records
    last = [*itertools.chain.from_iterable([*dataset.tokenizer.encode(t), dataset.tokenizer.eos_id] for t in texts)]
    dropped = dataset.tokenizer.token_bytes()[last[len(last) - tail :]].sum()
    assert stored + dropped == split.raw_bytes == split.token_bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.slow
def test_equal_records_for_any_workers_and_shards(jsonl, tmp_path, monkeypatch):
    pieces = functools.partialmethod(text_files.Files.pieces, piece_bytes=1000, group_bytes=1)
    monkeypatch.setattr(text_files.Files, "pieces", pieces)
    monkeypatch.setattr(stream, "BLOCK_TOKENS", 64)
    datasets = [prepare(jsonl, tmp_path / "1", validation_fraction=0.3)]
    for workers, shard_tokens in ((2, 1 << 26), (3, 2000)):
        monkeypatch.setattr(stream, "SHARD_TOKENS", shard_tokens)
        datasets.append(prepare(jsonl, tmp_path / str(workers), workers=workers, validation_fraction=0.3))
    assert len(datasets[0].splits["train"].shards) == 1 and len(datasets[2].splits["train"].shards) == 5
    assert datasets[0].sha256 == datasets[1].sha256 == datasets[2].sha256
    for split, name in itertools.product(("train", "validation"), ("tokens", "segment_ids")):
        first, second, third = (rows(tmp_path / str(workers), split)[name] for workers in (1, 2, 3))
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, third)


def test_identity_tells_contents_apart(texts, tmp_path):
    def identity(name, texts, **settings):
        return prepare(str(write_jsonl(tmp_path / f"{name}.jsonl", texts)), tmp_path / name, **settings).sha256

    plain = identity("plain", texts)
    assert identity("same", texts) == plain
    assert plain not in (identity("order", texts[::-1]), identity("length", texts, sequence_length=LENGTH + 1))
    joined = [texts[0] + "\n" + texts[1], *texts[2:]]
    assert identity("joined", joined) != plain


@pytest.mark.parametrize(
    ("module", "function"),
    [(prepare_lib, "encode_splits"), (stream, "write_shard"), (stream, "write_tfds_metadata")],
)
def test_a_mistake_of_the_user_leaves_nothing_and_another_failure_what_is_done(
    module, function, jsonl, tmp_path, monkeypatch
):
    def failing(error):
        def fail(*args, **kwargs):
            raise error

        return fail

    for error, left in ((UserError("a mistake"), False), (OSError("the disk is gone"), True)):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, failing(error))
            with pytest.raises(UserError, match="a mistake|the disk is gone"):
                prepare(jsonl, tmp_path / "out")
        assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["corpus.jsonl"]
        assert any(p.is_dir() for p in tmp_path.iterdir()) == left and not (tmp_path / "out").exists()
    prepare(jsonl, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "out"]


def test_what_a_killed_job_leaves_does_not_open(jsonl, tmp_path):
    program = (
        "import os, signal; from diffusionlm.data import prepare, stream;"
        "stream.write_tfds_metadata = lambda *args: os.kill(os.getpid(), signal.SIGKILL);"
        f"prepare.prepare({jsonl!r}, {str(tmp_path / 'out')!r}, tokenizer='byte', sequence_length=15,"
        "validation_fraction=0)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == -9
    (partial,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert not (tmp_path / "out").exists() and any(partial.iterdir())
    for path in (partial, tmp_path / "out"):
        with pytest.raises(UserError, match="diffusionlm data prepare"):
            open_dataset(path)
    prepare(jsonl, tmp_path / "out")  # the next one goes on with it
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["out"]


def test_what_a_living_job_writes_is_left_alone(jsonl, tmp_path):
    with whole_directory(tmp_path / "out") as living:
        with pytest.raises(UserError, match="out is in use by process "):
            prepare(jsonl, tmp_path / "out")
        assert living.is_dir()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["out"]


@pytest.mark.slow
def test_quiet_without_a_main_module(jsonl, tmp_path):
    """As a notebook or `python -c` calls it: workers start, nothing warns or prints, TensorFlow is not imported."""
    program = (
        "import sys; from diffusionlm.data.prepare import prepare; from diffusionlm.data import pipeline;"
        f"prepare({jsonl!r}, {str(tmp_path / 'out')!r}, tokenizer='byte', sequence_length=15, workers=2,"
        "progress=False, validation_fraction=0.2);"
        f"data = pipeline.open_dataset({str(tmp_path / 'out')!r});"
        "next(pipeline.train_batches(data, batch_size=4, seed=0));"
        "assert 'tensorflow' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line(jsonl, tmp_path, monkeypatch):
    write_shard = stream.write_shard
    monkeypatch.setattr(stream, "write_shard", lambda job, path: write_shard(job, "/dev/full"))
    with pytest.raises(UserError, match="cannot write the dataset .*No space left on device"):
        prepare(jsonl, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_real_stories(data_dir, tmp_path):
    stories = Path(data_dir) / "tinystories" / "valid.jsonl"
    metadata = prepare(
        str(stories), tmp_path / "out", tokenizer="sentencepiece", vocab_size=1024, validation_fraction=0.1
    )
    texts = [json.loads(line)["text"] for line in stories.read_text().splitlines()]
    splits = metadata.splits.values()
    assert sum(split.documents for split in splits) == len(texts)
    assert sum(split.token_bytes for split in splits) == sum(len(text.encode()) for text in texts)
    assert len(base64.b64decode(metadata.tokenizer["model"])) > 10_000
