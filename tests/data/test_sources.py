"""Sources: every kind gives the same documents, and what is malformed is named or skipped."""

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from support.datasets import expected_rows, prepare, rows, write_jsonl

from diffusionlm.data import corpora, sources, tokenizers
from diffusionlm.data.sources import resolve
from diffusionlm.errors import UserError


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
        (
            b'{"texts": "misnamed"}',
            "no field 'text' among 'texts' (if another one holds the text, choose it with --text_field texts); correct",
        ),
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


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_whoever_encodes_a_part_of_a_text_reads_it(ending, tmp_path):
    text = "".join(f"line {i}\n" for i in range(20_000)).encode()
    (tmp_path / f"book{ending}").write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    splits, _ = sources.resolve_splits(str(tmp_path / f"book{ending}"), None, 0.1, "text")
    sent = pickle.dumps([splits[name].pieces() for name in ("train", "validation")])
    assert len(sent) < 2000, "the text does not travel with the job"
    items = [item for pieces in pickle.loads(sent) for piece in pieces for item in piece]
    assert b"".join(item.payload for item in items) == text and len(items) == 2
    assert [item.progress for item in items] == [len(item.payload) for item in items]
    assert items[1].payload.startswith(b"line ")


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
    train = resolve("tfds:tiny_prose", "prose")["train"]
    pieces = pickle.loads(pickle.dumps(train.pieces()))
    assert [item.payload.decode() for piece in pieces for item in piece] == order
    assert sum(piece.progress for piece in pieces) == train.total
    chosen = prepare("tfds:tiny_prose", tmp_path / "chosen", text_field="prose", where=["id>=20"])
    kept = {text for i, text in enumerate(texts) if i >= 20}
    assert (chosen.left_out, chosen.splits["train"].documents) == ({"where=id>=20": 20}, 100)
    expected = expected_rows([text for text in order if text in kept], tokenizers.load("byte"))[0]
    np.testing.assert_array_equal(rows(tmp_path / "chosen")["tokens"], expected)
    with pytest.raises(UserError, match="tfds:tiny_prose has no feature 'lang'; it has "):
        prepare("tfds:tiny_prose", tmp_path / "refused", text_field="prose", where=["lang=en"])
    for source, message in {
        "tfds:tiny_prose": "no feature 'text'",
        "tfds:tiny_prose:test[": "cannot load split",
        "tfds:absent_prose": "cannot load split 'train' of tfds:absent_prose",
    }.items():
        with pytest.raises(UserError, match=message.replace("[", r"\[")) as error:
            prepare(source, tmp_path / "refused")
        assert "\n" not in str(error.value)


def test_refuses_sources_and_outputs(jsonl, tmp_path):
    (tmp_path / "table.xlsx").write_text("a,b")
    (tmp_path / "table.dat").write_text("a,b")
    (tmp_path / "folder").mkdir()
    for source, message in {
        "python_doc": "did you mean 'python_docs'",
        str(tmp_path / "*.txt"): r"no such file, directory, pattern or corpus: .*; check the path",
        str(tmp_path / "folder"): "folder' is a directory without files that end in one of .txt, ",
        str(tmp_path / "table.xlsx"): "unknown kind; convert it to .jsonl",
        str(tmp_path / "table.dat"): "unknown kind; rename it to end in one of .txt",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare(source, tmp_path / "out")
    for output, message in {
        Path(jsonl) / "out": "must be a directory, and .* is a file",
        "gs://bucket/out": "local or mounted",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare(jsonl, output)
