"""Which source each row of a run comes from: exact shares, without state and without chance.

A share w of the rows is due to a source at a constant rate, so its j-th row (from 0) is due in the window of rows from
floor(j / w) to ceil((j + 1) / w) - 1. Rows are given to the source whose window ends first, among those whose window
has begun. This meets all windows: sharing each row out in fractions would meet them, so a whole assignment meets them
too (the constraints are those of a bipartite matching), and the earliest deadline first finds one if there is one. So
of the first n rows of a phase a source has n w rounded down or up, for every n and any number of sources (the schedule
is that of Baruah, Cohen, Plaxton and Varvel, *Proportionate progress*, Algorithmica 15, 1996). Weights are whole
numbers of millionths, and the assignment repeats with their common denominator, which gives any row from a table.
"""

import functools
import heapq
import math
from typing import NamedTuple

import numpy as np

from diffusionlm.config_mixture import MixtureSpec


class Rows(NamedTuple):
    """The rows of a batch."""

    source_B: np.ndarray  # int32, the number of the source
    position_B: np.ndarray  # int64, how many rows of that source come before it in the run


class Shares:
    """The sources of the rows of every batch; of batch k a pure function of (mixture, batch size, seed, k).

    Args:
      spec: the mixture.
      batch_size: rows of a global batch.
    """

    def __init__(self, spec: MixtureSpec, batch_size: int):
        self._spec, self._size = spec, batch_size
        # Now, and not by each of the threads that read ahead.
        self._periods = tuple(period(phase.units) for phase in spec.phases)

    def counts(self, batches: int) -> np.ndarray:
        """Return the rows of each source in the first so many batches. int64 (S,)."""
        counts_S = np.zeros(len(self._spec.paths), np.int64)
        ends = [phase.start for phase in self._spec.phases[1:]] + [batches]
        for phase, table, end in zip(self._spec.phases, self._periods, ends, strict=True):
            counts_S += table.counts(max(min(end, batches) - phase.start, 0) * self._size)
        return counts_S

    def batch(self, k: int, seed: int) -> Rows:
        """Return the rows of batch `k`; which row has which source is shuffled, so that no device has one's share."""
        phase = self._spec.phase_of(k)
        table = self._periods[self._spec.phases.index(phase)]
        first = (k - phase.start) * self._size
        source_B = table.source_D[(first + np.arange(self._size)) % len(table.source_D)]
        source_B = source_B[_permutation(self._size, seed, k)].astype(np.int32)
        position_B = np.empty(self._size, np.int64)
        for source, before in enumerate(self.counts(k)):
            of_source_B = source_B == source
            position_B[of_source_B] = before + np.arange(of_source_B.sum())
        return Rows(source_B, position_B)

    def most_batches(self, limits_S: np.ndarray) -> int:
        """Return the largest number of batches, below 2**31, of which no source has more rows than its limit."""
        fits, exceeds = 0, 1 << 31
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            if (self.counts(middle) <= limits_S).all():
                fits = middle
            else:
                exceeds = middle
        return fits


class Period(NamedTuple):
    """An assignment of D rows, after which it repeats."""

    units: tuple[int, ...]  # of each source, which sum to D
    source_D: np.ndarray  # int16, of each row
    places: tuple[np.ndarray, ...]  # of each source, the rows that it has, in order

    def counts(self, rows: int) -> np.ndarray:
        """Return how many of the first rows each source has. int64 (S,)."""
        periods, rest = divmod(rows, len(self.source_D))
        before = [int(np.searchsorted(places, rest)) for places in self.places]
        return np.array([periods * unit + more for unit, more in zip(self.units, before, strict=True)], np.int64)


def period(units: tuple[int, ...]) -> Period:
    """Return the repeating assignment for shares in these proportions."""
    divisor = math.gcd(*units)
    return _period(tuple(unit // divisor for unit in units))


@functools.lru_cache(maxsize=16)
def _period(units: tuple[int, ...]) -> Period:
    length, given = sum(units), [0] * len(units)
    # The next row of each source: (begin of its window, source) before that, (end of it, source) afterwards.
    waiting = [(0, source) for source, unit in enumerate(units) if unit]
    ready: list[tuple[int, int]] = []
    source_D = np.empty(length, np.int16)
    for row in range(length):
        while waiting and waiting[0][0] <= row:
            source = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-(-(given[source] + 1) * length // units[source]), source))
        source = heapq.heappop(ready)[1]
        source_D[row] = source
        given[source] += 1
        if given[source] < units[source]:
            heapq.heappush(waiting, (given[source] * length // units[source], source))
    return Period(units, source_D, tuple(np.flatnonzero(source_D == source) for source in range(len(units))))


def _permutation(size: int, seed: int, k: int) -> np.ndarray:
    """Return an order of a batch's rows that looks random; NumPy keeps the bits of its generators, not its shuffles."""
    return np.argsort(np.random.Philox(key=[seed, k]).random_raw(size), kind="stable")
