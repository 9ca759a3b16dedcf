"""Work in jobs: what is done is not done again, and the dataset does not depend on how the work was divided."""

import functools
import gzip
import json
import shutil
import types

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from support.datasets import prepare, write_jsonl

from diffusionlm.data import encode, jobs, stream, text_files
from diffusionlm.data import prepare as prepare_lib
from diffusionlm.data.selection import Selection
from diffusionlm.data.words import Counts
from diffusionlm.errors import StorageError, UserError


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
    made = prepare(jsonl, tmp_path / "out")
    assert (made.sha256, made.splits) == (whole.sha256, whole.splits)
    assert encoded == list(range(7, pieces))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "out", "whole"]


def test_in_a_bucket_only_a_second_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_lib, "in_bucket", lambda path: True)
    (tmp_path / "out" / "parts").mkdir(parents=True)  # which a bucket has once there is an object in it
    request = types.SimpleNamespace(output=epath.Path(tmp_path / "out"), key=lambda runner: "key")
    for expected in (False, True):
        with prepare_lib._directory(request, object()) as (_, has_begun):
            assert has_begun == expected


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
    grown = stream.TokenStream(np.dtype("<u2"))
    for i, words in enumerate(parts):
        (folder / str(i)).write_bytes(np.array(words, "<u2").tobytes())
        grown.append(str(folder / str(i)), len(words), Counts(1, len(words), 0, 0))
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


def test_of_packed_files_a_tokenizer_sees_no_more_than_it_may(tmp_path, monkeypatch):
    texts = [f"{i} " * 200 for i in range(200)]
    for part in range(4):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[part::4])
        (tmp_path / f"{part}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pieces = text_files.Files([epath.Path(path) for path in sorted(tmp_path.iterdir())]).pieces(group_bytes=1)
    monkeypatch.setattr(encode, "TRAINING_BYTES", 40_000)
    rules = encode.EncodeRules(0.0, Selection(), 15)
    trained = list(encode.training_texts(pieces, rules, sft=False, on_error="stop"))
    assert 20_000 < sum(map(len, trained)) <= 40_000
    assert {texts.index(text) % 4 for text in trained} == {0, 1, 2, 3}, "each file gives its part"


def test_unfinished_work_that_was_damaged_is_refused(jsonl, tmp_path, many_pieces, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            prepare(jsonl, tmp_path / "out")
    (partial,) = tmp_path.glob(".out.partial-*")
    words = partial / "parts" / "0000003.train.words"
    words.write_bytes(words.read_bytes()[:-2])
    (partial / "parts" / "0000004.json").write_text("")  # as a crash of the machine leaves it
    with pytest.raises(UserError, match="unfinished work was damaged; remove the directory"):
        prepare(jsonl, tmp_path / "out")
    shutil.rmtree(partial)
    prepare(jsonl, tmp_path / "out")


def test_an_empty_receipt_is_none(tmp_path):
    job = Counted(tmp_path / "receipt.json")
    (tmp_path / "receipt.json").write_text("")
    assert jobs.perform(job) == {"number": 3} and job.times == 1


def test_a_failure_of_the_storage_is_raised_so_that_a_cluster_tries_again(tmp_path):
    class Failing(Counted):
        def work(self):
            raise StorageError("cannot read")

    with pytest.raises(StorageError):
        jobs.perform(Failing(tmp_path / "a.json"))
    assert not any(tmp_path.iterdir())


def test_another_command_removes_what_is_unfinished_of_its_own_output_alone(jsonl, tmp_path):
    for name in (".out.partial-0123456789abcdef", ".out.partial-x.partial-0123456789abcdef"):
        (tmp_path / name).mkdir()
    prepare(jsonl, tmp_path / "out")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == [".out.partial-x.partial-0123456789abcdef", "corpus.jsonl", "out"]
