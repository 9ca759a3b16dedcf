"""Pairs as batches: padding, groups of one shape, and fetching while the device works."""

import numpy as np
from support.tiny_likelihood import MDM

from diffusionlm.likelihood.pairs import PairBatch, fetch_one_late, group_by_shape


def test_a_batch_pads_sequences_and_fills_up_with_its_last_pair():
    batch = PairBatch.of([([1, 2], [3]), ([], [4, 5])], T=4, E=3)
    assert batch.tokens_ExT.tolist() == [[1, 2, 3, 0], [4, 5, 0, 0], [4, 5, 0, 0]]
    assert batch.segment_ids_ExT.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert batch.start_E.tolist() == [2, 0, 0] and batch.n_E.tolist() == [1, 2, 2]
    assert batch.labels(2)[1].tolist() == [4, 5] and batch.places(4)[0].tolist() == [2, 3, 3, 3]


def test_copies_of_a_row_lie_beside_each_other():
    batch = PairBatch.of([([1, 2], [3]), ([], [4, 5])], T=4, E=2).repeat(2)
    assert batch.tokens_ExT.tolist() == [[1, 2, 3, 0]] * 2 + [[4, 5, 0, 0]] * 2
    assert batch.n_E.tolist() == [1, 1, 2, 2]


def test_similar_lengths_share_a_shape():
    pairs = [([1] * 5, [2] * 3), ([1] * 60, [2] * 4), ([1] * 61, [2] * 4), ([1] * 123, [2] * 5)]
    assert group_by_shape(MDM, pairs, range(4)) == {(64, 4): [0, 1], (128, 4): [2], (128, 8): [3]}


def test_a_batch_is_fetched_after_the_next_one_is_dispatched():
    events = []

    class Array:
        def __init__(self, i):
            self.i = i
            events.append(f"dispatch {i}")

        def __array__(self, dtype=None, copy=None):
            events.append(f"fetch {self.i}")
            return np.array(self.i)

    assert [(label, int(array)) for label, array in fetch_one_late((i, Array(i)) for i in range(3))] == [
        (0, 0),
        (1, 1),
        (2, 2),
    ]
    assert events == ["dispatch 0", "dispatch 1", "fetch 0", "dispatch 2", "fetch 1", "fetch 2"]
