"""Preparing: the records are the documents, in order, for every way of getting there; failures leave nothing behind."""

import base64
import gzip
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from diffusionlm import storage as files
from diffusionlm.data import corpora, encode, stream, tokenizers
from diffusionlm.data import prepare as prepare_lib
from diffusionlm.data.pipeline import open_dataset
from diffusionlm.errors import UserError

WORDS = "the a little cat dog saw found red big house and then ran é 😀 \n \t  you 好".split(" ")
LENGTH = 15  # of sequences; records hold one more token


def prepare(source, output, **settings):
    settings = {"tokenizer": "byte", "sequence_length": LENGTH, "validation_fraction": 0} | settings
    return prepare_lib.prepare(source, output, progress=False, **settings)


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for _ in range(120)]


@pytest.fixture
def jsonl(tmp_path, texts):
    return str(write_jsonl(tmp_path / "corpus.jsonl", texts))


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


def test_records_are_the_documents_with_eos_cut(jsonl, texts, tmp_path):
    metadata = prepare(jsonl, tmp_path / "out")
    found = rows(tmp_path / "out")
    tokens, segments = expected_rows(texts, tokenizers.load("byte"))
    np.testing.assert_array_equal(found["tokens"], tokens)
    np.testing.assert_array_equal(found["segment_ids"], segments)
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


def test_equal_records_for_any_workers_and_shards(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_BYTES", 1000)
    monkeypatch.setattr(stream, "BLOCK_TOKENS", 64)
    made = [prepare(jsonl, tmp_path / "1", validation_fraction=0.3)]
    for workers, shard_tokens in ((2, 1 << 26), (3, 2000)):
        monkeypatch.setattr(stream, "SHARD_TOKENS", shard_tokens)
        made.append(prepare(jsonl, tmp_path / str(workers), workers=workers, validation_fraction=0.3))
    assert len(made[0].splits["train"].shards) == 1 and len(made[2].splits["train"].shards) == 5
    assert made[0].sha256 == made[1].sha256 == made[2].sha256
    for split, name in itertools.product(("train", "validation"), ("tokens", "segment_ids")):
        one, two, three = (rows(tmp_path / str(workers), split)[name] for workers in (1, 2, 3))
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


def test_identity_tells_contents_apart(texts, tmp_path):
    def identity(name, texts, **settings):
        return prepare(str(write_jsonl(tmp_path / f"{name}.jsonl", texts)), tmp_path / name, **settings).sha256

    plain = identity("plain", texts)
    assert identity("same", texts) == plain
    assert plain not in (identity("order", texts[::-1]), identity("length", texts, sequence_length=LENGTH + 1))
    joined = [texts[0] + "\n" + texts[1], *texts[2:]]
    assert identity("joined", joined) != plain


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


class WideTokenizer(tokenizers.ByteTokenizer):
    """Bytes at the end of a vocabulary that 16 bits do not hold."""

    kind, vocab_size, eos_id = "wide", 70_001, 70_000

    def encode(self, text):
        return [69_000 + byte for byte in text.encode()]

    def token_bytes(self):
        return (np.arange(self.vocab_size) // 1000 == 69).astype(np.int32)


def test_large_vocabularies_take_32_bits(jsonl, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(tokenizers.KINDS, "wide", WideTokenizer)
    prepare(jsonl, tmp_path / "out", tokenizer=WideTokenizer())
    np.testing.assert_array_equal(rows(tmp_path / "out")["tokens"], expected_rows(texts, WideTokenizer())[0])
    source = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    assert (source[0]["tokens"].dtype, source[0]["segment_ids"].dtype) == (np.uint32, np.uint16)


def test_compressed_jsonl_is_the_same(jsonl, tmp_path):
    plain = prepare(jsonl, tmp_path / "plain")
    compressed = tmp_path / "corpus.jsonl.gz"
    compressed.write_bytes(gzip.compress(Path(jsonl).read_bytes()))
    assert prepare(str(compressed), tmp_path / "compressed").sha256 == plain.sha256
    compressed.write_bytes(compressed.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"corpus\.jsonl\.gz:\d+: damaged gzip"):
        prepare(str(compressed), tmp_path / "damaged")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "half', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'["text"]', "a JSON list, not an object"),
        (b'{"texts": "misnamed"}', "no field 'text'; did you mean 'texts'"),
        (b'{"text": 3}', "field 'text' is int, not a string"),
        (b'{"text": null}', "field 'text' is NoneType, not a string"),
        (b'{"text": "\xff\xfe"}', "invalid UTF-8 at byte 10"),
        (b'{"text": "ab\\ud83d"}', "half a surrogate pair at character 2"),
    ],
)
def test_malformed_lines(line, reason, texts, tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", texts).read_bytes().splitlines(keepends=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b"".join([*good[:7], line + b"\n", *good[7:], line + b"\n"]))
    with pytest.raises(UserError) as error:
        prepare(str(bad), tmp_path / "out")
    assert str(error.value).startswith(f"{bad}:8: ") and reason in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"bad\.jsonl:8: "):
        prepare(str(bad), tmp_path / "out", tokenizer="sentencepiece", vocab_size=330)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "good.jsonl"]
    skipped = prepare(str(bad), tmp_path / "skipped", on_error="skip")
    assert skipped.malformed == 2
    assert skipped.sha256 == prepare(str(tmp_path / "good.jsonl"), tmp_path / "good").sha256


def test_empty_documents_and_blank_lines_are_counted(texts, tmp_path):
    source = write_jsonl(tmp_path / "corpus.jsonl", ["", *texts, ""])
    source.write_text(source.read_text() + "\n  \n")
    metadata = prepare(str(source), tmp_path / "out")
    assert (metadata.empty, metadata.malformed, metadata.splits["train"].documents) == (4, 0, len(texts))


def is_held_out(text, fraction):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) < fraction * 2**256


def test_documents_are_held_out_by_their_hash(texts, tmp_path):
    doubled = [*texts, *texts[::-1]]
    metadata = prepare(str(write_jsonl(tmp_path / "corpus.jsonl", doubled)), tmp_path / "out", validation_fraction=0.25)
    tokenizer = tokenizers.load("byte")
    for split, wanted in (("train", False), ("validation", True)):
        own = [text for text in doubled if is_held_out(text, 0.25) == wanted]
        assert metadata.splits[split].documents == len(own)
        np.testing.assert_array_equal(rows(tmp_path / "out", split)["tokens"], expected_rows(own, tokenizer)[0])
    assert 0.1 < metadata.splits["validation"].documents / len(doubled) < 0.4


def test_the_tokenizer_is_trained_on_training_documents_only(jsonl, texts, tmp_path):
    metadata = prepare(jsonl, tmp_path / "out", tokenizer="sentencepiece", vocab_size=330, validation_fraction=0.5)
    training = [text for text in texts if not is_held_out(text, 0.5)]
    assert metadata.tokenizer["sha256"] == tokenizers.train_sentencepiece(training, 330).sha256


def test_a_validation_source(jsonl, texts, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", texts[:20])
    metadata = prepare(jsonl, tmp_path / "out", validation=str(other), validation_fraction=None)
    assert {name: split.documents for name, split in metadata.splits.items()} == {"train": 120, "validation": 20}


def test_text_files_are_documents(texts, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.{'md' if i % 2 else 'txt'}").write_bytes(text.encode())
    (folder / "ignored.csv").write_text("no text")
    plain = prepare(str(folder), tmp_path / "folder")
    assert plain.splits["train"].documents == len(texts)
    np.testing.assert_array_equal(rows(tmp_path / "folder")["tokens"], expected_rows(texts, tokenizers.load("byte"))[0])
    files = sorted(str(p) for p in folder.iterdir() if p.suffix != ".csv")
    assert prepare(files, tmp_path / "files").sha256 == plain.sha256
    assert prepare(str(folder / "0[0-9]*.txt"), tmp_path / "glob").splits["train"].documents == 50


def test_a_single_text_file_gives_its_end(tmp_path):
    text = "".join(f"line {i} of a longer text\n" for i in range(500))
    (tmp_path / "book.txt").write_text(text)
    metadata = prepare(str(tmp_path / "book.txt"), tmp_path / "out", validation_fraction=0.1)
    head, tail = (metadata.splits[split] for split in ("train", "validation"))
    assert head.raw_bytes + tail.raw_bytes == len(text)
    assert 0.1 <= tail.raw_bytes / len(text) < 0.11
    ids = rows(tmp_path / "out", "validation")["tokens"].ravel()
    decoded = tokenizers.load("byte").decode(ids.tolist())
    assert text[head.raw_bytes :].startswith(decoded) and decoded.startswith("line ")


def test_a_corpus_by_name(texts, tmp_path, monkeypatch):
    documents = [corpora.Document(str(i), text) for i, text in enumerate(texts)]
    built = []

    def tiny():
        built.append(1)
        return {"train": documents[:100], "validation": documents[100:]}

    monkeypatch.setitem(corpora.CORPORA._builders, "tiny", tiny)
    metadata = prepare("tiny", tmp_path / "out", validation_fraction=None)
    assert {name: split.documents for name, split in metadata.splits.items()} == {"train": 100, "validation": 20}
    assert prepare("tiny", tmp_path / "out", validation_fraction=None) == metadata
    assert len(built) == 1, "built once, and not to find that the dataset is there"
    with pytest.raises(UserError, match="its own validation split"):
        prepare("tiny", tmp_path / "other", validation_fraction=0.1)


def test_a_tfds_name(texts, tmp_path, monkeypatch):
    class TinyProse(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"prose": tfds.features.Text(), "id": np.int64}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(texts), "test": self._generate_examples(texts[:30])}

        def _generate_examples(self, texts):
            return ((i, {"prose": text, "id": i}) for i, text in enumerate(texts))

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tfds"))
    metadata = prepare(
        "tfds:tiny_prose:1.0.0", tmp_path / "out", text_field="prose", validation="tfds:tiny_prose:test[:20]"
    )
    assert {name: split.documents for name, split in metadata.splits.items()} == {"train": 120, "validation": 20}
    stored = rows(tmp_path / "out")["tokens"]
    examples = tfds.builder("tiny_prose", file_format="array_record").as_data_source("train")
    order = [examples[i]["prose"].decode() for i in range(len(examples))]
    np.testing.assert_array_equal(stored, expected_rows(order, tokenizers.load("byte"))[0])
    for source, message in {
        "tfds:tiny_prose": "no feature 'text'",
        "tfds:tiny_prose:test[": "cannot load split",
        "tfds:absent_prose": "cannot load split 'train' of tfds:absent_prose",
    }.items():
        with pytest.raises(UserError, match=message.replace("[", r"\[")) as error:
            prepare(source, tmp_path / "refused")
        assert "\n" not in str(error.value)


def test_the_same_request_reuses_and_another_refuses(jsonl, texts, tmp_path, capfd):
    made = prepare(jsonl, tmp_path / "out")
    written = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    request = {"tokenizer": "byte", "sequence_length": LENGTH, "validation_fraction": 0}
    assert prepare_lib.prepare(jsonl, tmp_path / "out", **request) == made
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == written
    assert "already holds this dataset" in capfd.readouterr().err
    with pytest.raises(UserError, match="another dataset .sequence_length=15, not 20"):
        prepare(jsonl, tmp_path / "out", sequence_length=20)
    with pytest.raises(UserError, match="another dataset .held_out=0.0, not 0.5"):
        prepare(jsonl, tmp_path / "out", validation_fraction=0.5)
    write_jsonl(Path(jsonl), texts[:-1])
    with pytest.raises(UserError, match="another dataset .sources="):
        prepare(jsonl, tmp_path / "out")
    with pytest.raises(UserError, match="cannot be reused"):
        prepare(jsonl, tmp_path)


def test_an_empty_directory_may_be_the_output(jsonl, tmp_path):
    (tmp_path / "out").mkdir()
    assert prepare(jsonl, tmp_path / "out").splits["train"].records == open_dataset(tmp_path / "out").size("train")


@pytest.mark.parametrize(
    ("module", "function"), [(encode, "encode"), (stream, "write_shard"), (stream, "write_tfds_metadata")]
)
def test_an_interrupted_job_leaves_nothing(module, function, jsonl, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, function, interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(jsonl, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]


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
    prepare(jsonl, tmp_path / "out")  # the next one cleans up
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["out"]


def test_what_a_living_job_writes_is_left_alone(jsonl, tmp_path):
    with pytest.raises(OSError, match="not empty"):  # the other one was faster
        with files.whole_directory(tmp_path / "out") as living:
            prepare(jsonl, tmp_path / "out")
            assert living.is_dir()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["out"]


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"workers": 0}, "workers=0"),
        ({"on_error": "ignore"}, "on_error='ignore' must be 'stop' or 'skip'"),
        ({"tokenizer": "bytes"}, "unknown tokenizer 'bytes'"),
        ({"tokenizer": "sentencepiece"}, "needs vocab_size"),
        ({"vocab_size": 300}, "vocab_size=300 is for tokenizer=sentencepiece only"),
        ({"tokenizer": "sentencepiece", "vocab_size": 10**6}, "use at most"),
        ({"validation_fraction": 1.5}, r"validation_fraction=1.5 must lie in \[0, 1\)"),
        ({"validation": "x.jsonl", "validation_fraction": 0.1}, "exclude each other"),
        ({"validation": "absent.jsonl"}, "no such text.*absent.jsonl"),
        ({"sequence_length": 10**6}, "split 'train' has .* too few for one record of 1000001"),
        ({"validation_fraction": 1e-9}, "split 'validation' has 0 tokens"),
        ({"text_field": "txt"}, "no field 'txt'; did you mean 'text'"),
    ],
)
def test_refuses_settings(settings, message, jsonl, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        prepare(jsonl, tmp_path / "out", **settings)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_refuses_sources_and_outputs(jsonl, tmp_path):
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    for source, message in {
        "python_doc": "did you mean 'python_docs'",
        str(tmp_path / "*.txt"): "no such text",
        str(tmp_path / "folder"): "no such text",
        str(tmp_path / "table.csv"): "unknown kind; allowed endings: .txt",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare(source, tmp_path / "out")
    for output, message in {Path(jsonl) / "out": "File exists", "gs://bucket/out": "local or mounted"}.items():
        with pytest.raises(UserError, match=message):
            prepare(jsonl, output)


def test_a_tokenizer_without_eos_is_refused(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(WideTokenizer, "eos_id", None)
    with pytest.raises(UserError, match="no EOS"):
        prepare(jsonl, tmp_path / "out", tokenizer=WideTokenizer())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_is_told(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(stream.ShardJob, "file", Path("/dev/full"))
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
