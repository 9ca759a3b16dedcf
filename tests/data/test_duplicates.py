"""Equal documents: the first is kept, for any pieces and buckets, and a held-out one before those of training."""

import functools
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.datasets import prepare, write_jsonl

from diffusionlm.data import duplicates, text_files
from diffusionlm.data.pipeline import open_dataset
from diffusionlm.data.selection import is_held_out
from diffusionlm.errors import UserError

# Few words, so that many documents come again, some with other white space or another composition of é.
DOCUMENTS = st.lists(
    st.lists(st.sampled_from(["a", "b", "\u00e9", "e\u0301", "C"]), min_size=1, max_size=3).flatmap(
        lambda words: st.sampled_from([" ".join(words), "\n ".join(words), " " + "\t".join(words) + "  "])
    ),
    min_size=1,
    max_size=40,
)


def key(text):
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()


def first_of_each(texts):
    """Return the texts without those that come again."""
    return [text for i, text in enumerate(texts) if key(text) not in map(key, texts[:i])]


def documents(path, split="train"):
    """Return the texts of a dataset of bytes whose records are cut nowhere."""
    dataset = open_dataset(path)
    tokens = dataset.rows(split, range(dataset.size(split)))["tokens"].ravel().tolist()
    joined = bytes(token if token < 256 else 0 for token in tokens).decode()
    return joined.rstrip("\0").split("\0") if joined else []


@given(DOCUMENTS, st.integers(1, 200), st.integers(1, 5))
@settings(deadline=None, max_examples=25)
def test_the_first_of_equal_documents_is_kept(tmp_path_factory, texts, piece_bytes, bucket_documents):
    folder = tmp_path_factory.mktemp("duplicates")
    source = write_jsonl(folder / "texts.jsonl", texts)
    small = functools.partialmethod(text_files.Files.pieces, piece_bytes=piece_bytes, group_bytes=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files.Files, "pieces", small)
        patch.setattr(duplicates, "BUCKET_DOCUMENTS", bucket_documents)
        metadata = prepare(str(source), folder / "out", sequence_length=1, drop_duplicates=True)
    expected = first_of_each(texts)
    assert metadata.splits["train"].documents == len(expected)
    assert metadata.left_out == ({"drop_duplicates": len(texts) - len(expected)} if len(expected) < len(texts) else {})
    # Records of two tokens: at most the last token of the whole is missing.
    assert documents(folder / "out")[: len(expected) - 1] == expected[:-1]


def test_a_held_out_document_is_kept_and_its_copies_in_training_are_not(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", ["one", "two", " two", "three", "five"])
    held_out = write_jsonl(tmp_path / "valid.jsonl", ["two", "four", "four"])
    settings = {"validation": str(held_out), "validation_fraction": None, "sequence_length": 1}
    metadata = prepare(str(train), tmp_path / "out", drop_duplicates=True, **settings)
    assert documents(tmp_path / "out") == ["one", "three", "five"]
    assert documents(tmp_path / "out", "validation") == ["two", "four"]
    assert metadata.left_out == {"drop_duplicates": 3}


def test_a_document_that_is_held_out_by_its_hash_is_kept_too(tmp_path):
    texts = [f"document {i}" for i in range(200)]
    held_out = [text for text in texts if is_held_out(text, 0.2)]
    copies = [next(c for n in range(99) if not is_held_out(c := text + " " * n, 0.2)) for text in held_out]
    source = write_jsonl(tmp_path / "texts.jsonl", [*copies, *texts])
    metadata = prepare(str(source), tmp_path / "out", drop_duplicates=True, validation_fraction=0.2, sequence_length=1)
    assert metadata.splits["validation"].documents == len(held_out) > 20
    assert metadata.left_out == {"drop_duplicates": len(copies)}


def test_documents_that_are_left_out_or_empty_are_no_duplicates(tmp_path):
    source = write_jsonl(tmp_path / "texts.jsonl", ["", "", "ab", "long enough", "long enough", "ab"])
    metadata = prepare(str(source), tmp_path / "out", sequence_length=1, drop_duplicates=True, min_chars=5)
    assert metadata.left_out == {"min_chars=5": 2, "drop_duplicates": 1} and metadata.empty == 2


def test_dialogues_are_refused(tmp_path):
    source = write_jsonl(tmp_path / "texts.jsonl", ["a"])
    with pytest.raises(UserError, match="drop_duplicates is for format=text"):
        prepare(str(source), tmp_path / "out", format="sft", drop_duplicates=True)
