"""Cases of parametrized tests of which the default suite runs some and `pytest -m slow` the others."""

import pytest


def slow_but(cases, quick):
    """Return the cases with a `slow` mark on each that is not among the quick ones; every quick one must be a case."""
    cases = list(cases)
    assert all(case in cases for case in quick)
    return [case if case in quick else slow(case) for case in cases]


def thinned(cases, every):
    """Return the cases with a `slow` mark on all but the first of every so many."""
    return [slow(case) if index % every else case for index, case in enumerate(cases)]


def slow(case):
    """Return the case, a value or a tuple of values, as one of a slow test."""
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
