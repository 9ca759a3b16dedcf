"""Work in jobs: what is done is not done again, and the dataset does not depend on how the work was divided."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.datasets import prepare, write_jsonl

from diffusionlm.data import encode, jobs, stream, text_files
from diffusionlm.data.words import Counts
from diffusionlm.errors import UserError


@pytest.fixture
def many_pieces(monkeypatch):
    """Cut files into many pieces, however small they are."""
    small = functools.partialmethod(text_files.Files.pieces, piece_bytes=400, group_bytes=100)
    monkeypatch.setattr(text_files.Files, "pieces", small)


@pytest.fixture
def encoded(monkeypatch):
    """Return the numbers of the pieces that were encoded, in a list that grows."""
    numbers, run = [], encode._Encoding.run

    def counted(encoding):
        numbers.append(encoding._job.index)
        return run(encoding)

    monkeypatch.setattr(encode._Encoding, "run", counted)
    return numbers


def stop_after(monkeypatch, count):
    """Interrupt the command when so many pieces are encoded."""
    run, done = encode._Encoding.run, []

    def interrupted(encoding):
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(encoding)
        return run(encoding)

    monkeypatch.setattr(encode._Encoding, "run", interrupted)


class Counted:
    """A job that says how often it was done."""

    def __init__(self, receipt, message=None):
        self.receipt, self._message, self.times = str(receipt), message, 0

    def work(self):
        self.times += 1
        if self._message:
            raise UserError(self._message)
        return {"number": 3}


def test_a_job_with_a_receipt_is_not_done_again(tmp_path):
    job = Counted(tmp_path / "receipt.json")
    assert [jobs.perform(job) for _ in range(3)] == [{"number": 3}] * 3 and job.times == 1


def test_a_job_that_fails_has_no_receipt_and_its_message_is_raised(tmp_path):
    good, bad = Counted(tmp_path / "a.json"), Counted(tmp_path / "b.json", "line 3 is wrong")
    receipts = jobs.local_runner(map)([good, bad, good])
    assert next(receipts) == {"number": 3}
    with pytest.raises(UserError, match="line 3 is wrong"):
        next(receipts)
    assert not (tmp_path / "b.json").exists() and (tmp_path / "b.json.failed").read_text() == "line 3 is wrong"


def test_an_interrupted_command_goes_on(jsonl, tmp_path, many_pieces, encoded, monkeypatch):
    whole = prepare(jsonl, tmp_path / "whole")
    pieces = len(encoded)
    assert pieces > 10
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            prepare(jsonl, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    encoded.clear()
    assert prepare(jsonl, tmp_path / "out") == whole
    assert encoded == list(range(7, pieces))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "out", "whole"]


@pytest.mark.parametrize("change", [{"sequence_length": 7}, {"min_chars": 3}])
def test_another_command_begins_anew(change, jsonl, tmp_path, many_pieces, encoded, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            prepare(jsonl, tmp_path / "out")
    encoded.clear()
    made = prepare(jsonl, tmp_path / "out", **change)
    assert encoded[0] == 0 and made.sha256 == prepare(jsonl, tmp_path / "other", **change).sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "other", "out"]


def test_a_source_that_changed_meanwhile_begins_anew(jsonl, texts, tmp_path, many_pieces, encoded, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            prepare(jsonl, tmp_path / "out")
    encoded.clear()
    write_jsonl(tmp_path / "corpus.jsonl", texts[::-1])
    prepare(jsonl, tmp_path / "out")
    assert encoded[0] == 0


@given(st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=6), st.data())
@settings(deadline=None)
def test_words_are_read_across_files(tmp_path_factory, parts, data):
    folder = tmp_path_factory.mktemp("words")
    grown = stream.TokenStream()
    for i, words in enumerate(parts):
        (folder / str(i)).write_bytes(np.array(words, "<u2").tobytes())
        grown.append(str(folder / str(i)), len(words), None, Counts(1, len(words), 0, 0))
    grown.write_index(folder / "index.json")
    expected = [word for words in parts for word in words]
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    assert stream.read_words(str(folder / "index.json"), start, stop, np.dtype("<u2")).tolist() == expected[start:stop]
    assert grown.words == len(expected)


def test_a_tokenizer_is_trained_on_all_pieces_or_on_a_sample_that_is_spread(monkeypatch):
    monkeypatch.setattr(encode, "TRAINING_BYTES", 1000)
    assert encode.sampled_pieces([300, 300, 400]) == [0, 1, 2]
    sample = encode.sampled_pieces([10] * 1000)
    assert len(sample) == 100 and sample == sorted(set(sample))
    # Of 100 draws from a thousand, between 15 and 38 lie in a quarter, but for one case in ten thousand.
    assert all(15 <= sum(250 * quarter <= n < 250 * (quarter + 1) for n in sample) <= 38 for quarter in range(4))
    assert encode.sampled_pieces([5000, 10])[:1] in ([0], [1])
