"""Numbers as text for people to read."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusionlm.scaling.laws.bootstrap import Estimate


class Table(NamedTuple):
    """A table of a page; without rows it is not shown."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def number(estimate: Estimate | None, digits: int = 3) -> str:
    """Return a value with its interval, or "" for None.

    Both have as many digits as the width of the interval justifies, but at least `digits`.
    """
    if estimate is None:
        return ""
    if estimate.interval and estimate.bounded and estimate.value:
        low, high = estimate.interval
        width = max(high - low, 1e-12 * abs(estimate.value))
        digits = int(np.clip(np.floor(np.log10(abs(estimate.value) / width)) + 3, digits, 6))
    value = with_unit(estimate.value, digits)
    return f"{value} {interval(estimate, digits)}" if estimate.interval else value


def interval(estimate: Estimate, digits: int = 4) -> str:
    """Return the interval in brackets, or "" where the noise is unknown."""
    if estimate.interval is None:
        return ""
    low, high = (with_unit(end, digits) if np.isfinite(end) else "unbounded" for end in estimate.interval)
    return f"[{low},\N{NO-BREAK SPACE}{high}]"


def with_unit(value: float, digits: int) -> str:
    """Return a value with a fixed number of digits, trailing zeros included, and one of the units k, M, G and T."""
    scale, letter = next(((p, x) for p, x in ((12, "T"), (9, "G"), (6, "M"), (3, "k")) if abs(value) >= 10**p), (0, ""))
    return f"{value / 10**scale:#.{digits}g}".rstrip(".") + letter


def short(value: float) -> str:
    """Return a value with up to three digits and one of the units k, M and G, for the ticks of a plot."""
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g}{letter}"
    return f"{value:.3g}"
