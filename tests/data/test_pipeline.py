"""The pipeline: batch k is a pure function of (seed, k), on any number of hosts."""

import itertools
import threading

import grain
import numpy as np
import pytest
from support.datasets import SHORT_LENGTH, SHORT_TEXTS

from diffusionlm.data import pipeline
from diffusionlm.errors import UserError

BATCH = 8


def take(dataset, count, **settings):
    settings = {"batch_size": BATCH, "seed": 0} | settings
    return list(itertools.islice(pipeline.train_batches(dataset, **settings), count))


def test_rows_come_as_asked(dataset, stored):
    text = "".join(text + "\0" for text in SHORT_TEXTS).encode()  # EOS, 256, stands where \0 is
    flat = [256 if byte == 0 else byte for byte in text][: stored.size]
    np.testing.assert_array_equal(stored.ravel(), flat)
    rows = dataset.rows("train", [5, 0, 5])
    np.testing.assert_array_equal(rows["tokens"], stored[[5, 0, 5]])
    assert {name: (values.shape, values.dtype) for name, values in rows.items()} == {
        "tokens": ((3, SHORT_LENGTH + 1), np.int32),
        "segment_ids": ((3, SHORT_LENGTH + 1), np.int32),
    }


def test_batches_are_those_of_the_plain_pipeline(dataset, stored):
    """An independent reading: every row of the shuffled, repeated source, one after another."""
    plain = grain.MapDataset.source(list(stored)).seed(3).shuffle().repeat()
    for k, batch in enumerate(take(dataset, 20, seed=3)):
        np.testing.assert_array_equal(batch["tokens"], [plain[k * BATCH + i] for i in range(BATCH)])


def test_a_batch_depends_on_seed_and_number_only(dataset):
    whole = take(dataset, 12)
    for start in (1, 5, 11):
        for batch, again in zip(whole[start:], take(dataset, 12 - start, start=start), strict=True):
            np.testing.assert_array_equal(batch["tokens"], again["tokens"])
            np.testing.assert_array_equal(batch["segment_ids"], again["segment_ids"])
    far = take(dataset, 1, start=10**9)[0]
    np.testing.assert_array_equal(far["tokens"], take(dataset, 1, start=10**9)[0]["tokens"])


def test_an_epoch_is_a_permutation_and_the_next_is_another(dataset, stored):
    size = dataset.size("train")
    drawn = np.concatenate([batch["tokens"] for batch in take(dataset, -(-3 * size // BATCH))])[: 3 * size]
    order = [tuple(row) for row in stored]
    epochs = [[tuple(row) for row in epoch] for epoch in drawn.reshape(3, size, -1)]
    assert all(sorted(epoch) == sorted(order) for epoch in epochs)
    assert len({tuple(epoch) for epoch in (*epochs, order)}) == 4
    other = np.concatenate([batch["tokens"] for batch in take(dataset, size // BATCH, seed=1)])
    assert not np.array_equal(other, drawn[: len(other)])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_host_slices_make_the_global_batch(dataset, hosts):
    share = BATCH // hosts
    slices = [take(dataset, 5, rows=np.arange(i * share, (i + 1) * share)) for i in range(hosts)]
    for k, batch in enumerate(take(dataset, 5)):
        for name in ("tokens", "segment_ids"):
            np.testing.assert_array_equal(batch[name], np.concatenate([host[k][name] for host in slices]))


def test_rows_need_not_be_neighbours(dataset):
    numbers = [6, 1, 2]
    (whole,), (some,) = take(dataset, 1), take(dataset, 1, rows=numbers)
    np.testing.assert_array_equal(some["tokens"], whole["tokens"][numbers])


def test_a_batch_may_exceed_the_data(dataset):
    size = dataset.size("train")
    assert take(dataset, 1, batch_size=2 * size + 1)[0]["tokens"].shape == (2 * size + 1, SHORT_LENGTH + 1)


def test_batches_are_read_ahead(dataset, monkeypatch):
    """Reading goes on in other threads while the first batch is worked on; the event is set by the third reading."""
    calls, third, read = itertools.count(1), threading.Event(), pipeline.Dataset.rows

    def rows(self, split, indices):
        if next(calls) == 3:
            third.set()
        return read(self, split, indices)

    monkeypatch.setattr(pipeline.Dataset, "rows", rows)
    batches = pipeline.train_batches(dataset, batch_size=BATCH, seed=0)
    next(batches)
    assert third.wait(timeout=600)


def test_evaluation_reads_once_in_order_and_pads(dataset):
    size = dataset.size("validation")
    rows = dataset.rows("validation", range(size))
    batches = list(pipeline.eval_batches(dataset, batch_size=BATCH))
    assert len(batches) == -(-size // BATCH) and size % BATCH, "the fixture is to need padding"
    for name in ("tokens", "segment_ids"):
        joined = np.concatenate([batch[name] for batch in batches])
        np.testing.assert_array_equal(joined[:size], rows[name])
        assert joined.shape == (len(batches) * BATCH, SHORT_LENGTH + 1) and not joined[size:].any()
    assert rows["segment_ids"].min() == 1


def test_evaluation_limits_and_slices(dataset):
    batches = list(pipeline.eval_batches(dataset, batch_size=BATCH))
    first = list(pipeline.eval_batches(dataset, batch_size=BATCH, records=BATCH + 3))
    assert len(first) == 2 and first[1]["segment_ids"][:3].all() and not first[1]["segment_ids"][3:].any()
    assert len(list(pipeline.eval_batches(dataset, batch_size=BATCH, records=10**6))) == len(batches)
    halves = [list(pipeline.eval_batches(dataset, batch_size=BATCH, rows=np.arange(a, a + 4))) for a in (0, 4)]
    for k, batch in enumerate(batches):
        np.testing.assert_array_equal(batch["tokens"], np.concatenate([half[k]["tokens"] for half in halves]))


def test_evaluation_takes_its_rows_from_the_whole_split(dataset, monkeypatch):
    """Whatever the order of the sources in it, each has its share."""
    size, count = dataset.size("validation"), BATCH + 3
    asked, read = {}, dataset.rows

    def rows(split, indices):
        if split == "validation":  # training batches of other tests may still be read ahead
            asked[int(indices[0])] = indices
        return read(split, indices)

    monkeypatch.setattr(dataset, "rows", rows)
    list(pipeline.eval_batches(dataset, batch_size=BATCH, records=count))
    taken = np.concatenate([asked[first] for first in sorted(asked)])[:count]
    assert taken[0] == 0 and set(np.diff(taken)) <= {size // count, size // count + 1}
    assert size // count <= size - taken[-1] <= size // count + 1


def test_refuses_splits_and_seeds(dataset):
    with pytest.raises(UserError, match="no split 'test', only train, validation"):
        pipeline.eval_batches(dataset, batch_size=2, split="test")
    for seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"seed={seed}"):
            pipeline.train_batches(dataset, batch_size=2, seed=seed)
