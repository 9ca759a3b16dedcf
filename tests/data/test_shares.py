"""Shares are exact in every window, counted here row by row, and every row of a source comes once, in its order."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusionlm.config_mixture import UNITS, parse
from diffusionlm.data.shares import Shares, period

UNITS_OF_SOURCES = st.lists(st.integers(0, 40), min_size=2, max_size=6).filter(any)


@settings(deadline=None)
@given(UNITS_OF_SOURCES)
def test_of_any_first_rows_each_source_has_its_share_rounded_up_or_down(units):
    table, total = period(tuple(units)), sum(units)
    counts = [0] * len(units)
    rows = np.tile(table.source_D, 3)
    for n, source in enumerate(rows.tolist(), start=1):
        counts[source] += 1
        for count, unit in zip(counts, units, strict=True):
            exact = Fraction(n * unit, total)
            assert abs(count - exact) < 1  # so none where the share is none, and the exact number where it is whole
        if n < 2 * len(table.source_D):
            assert table.counts(n).tolist() == counts
    assert rows.size == 3 * total // np.gcd.reduce(units)


def text_of(units):
    """Weights of six decimal places in these proportions."""
    given = [unit * UNITS // sum(units) for unit in units]
    given[int(np.argmax(given))] += UNITS - sum(given)
    return ",".join(f"s{i}={unit / UNITS:.6f}" for i, unit in enumerate(given)), given


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 2, 5, 20, 50, 125]), min_size=2, max_size=6).filter(any),
    st.integers(1, 300),
    st.lists(st.integers(0, 10**8), min_size=2, max_size=8),
)
def test_windows_of_batches_have_exact_shares_wherever_they_lie(units, batch_size, ends):
    """Prefixes are within one row, so a window is within two."""
    text, given = text_of([unit + 1 for unit in units])
    shares = Shares(parse(text), batch_size)
    ends = sorted(ends)
    counts = [shares.counts(end) for end in ends]
    for end, count in zip(ends, counts, strict=True):
        assert count.sum() == end * batch_size
        for found, unit in zip(count.tolist(), given, strict=True):
            assert abs(found - Fraction(end * batch_size * unit, UNITS)) < 1
    for start, stop, before, after in zip(ends, ends[1:], counts, counts[1:], strict=False):
        for found, unit in zip((after - before).tolist(), given, strict=True):
            assert found >= 0 and abs(found - Fraction((stop - start) * batch_size * unit, UNITS)) < 2


@pytest.mark.parametrize("text", ["a=0.7,b=0.3", "a=0.5,b=0.3,c=0.2;7:b=1;9:a=0.1,c=0.9", "a=1;5:a=0.25,b=0.75"])
def test_every_source_goes_on_where_it_was(text):
    """Over changes of the shares, too: its positions are 0, 1, 2, ..., within a batch in the order of rows."""
    spec = parse(text)
    shares = Shares(spec, 12)
    found = [[] for _ in spec.paths]
    for k in range(20):
        assert shares.counts(k).tolist() == [len(positions) for positions in found]
        source_B, position_B = shares.batch(k, seed=3)
        for source, position in zip(source_B.tolist(), position_B.tolist(), strict=True):
            found[source].append(position)
        rows = np.bincount(source_B, minlength=len(spec.paths)) - 12 * np.array(spec.phase_of(k).weights)
        assert (abs(rows) < 2).all()
    assert all(positions == list(range(len(positions))) for positions in found)


def test_a_batch_is_a_pure_function_of_seed_and_number():
    text = "a=0.7,b=0.3;50:a=0.2,b=0.8"
    for k in (0, 3, 49, 50, 10**7):
        one, again = (Shares(parse(text), 16).batch(k, seed=5) for _ in range(2))
        np.testing.assert_array_equal(one.source_B, again.source_B)
        np.testing.assert_array_equal(one.position_B, again.position_B)
    orders = {tuple(Shares(parse(text), 16).batch(k, seed).source_B) for k in range(40) for seed in (0, 1)}
    assert len(orders) > 70  # of 80


def test_no_place_in_a_batch_belongs_to_a_source():
    shares = Shares(parse("a=0.5,b=0.5"), 8)
    means = np.mean([shares.batch(k, seed=0).source_B for k in range(2000)], axis=0)
    assert (abs(means - 0.5) < 5 * 0.5 / 2000**0.5).all()


def test_the_most_batches_within_limits():
    shares = Shares(parse("a=0.75,b=0.25;10:b=1"), 4)
    for limits in ([30, 10], [29, 100], [30, 9], [1000, 12], [2, 100]):
        fitting = shares.most_batches(np.array(limits))
        assert (shares.counts(fitting) <= limits).all() and (shares.counts(fitting + 1) > limits).any()
