"""Checks of what callers of the fits give them: each mistake is one line."""

import math
import sys
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from diffusionlm.errors import UserError
from diffusionlm.scaling.sweep.results import CellResult

LONGEST = 60  # characters of a value in a message


def _positive(value: float) -> bool:
    return 0 < value <= sys.float_info.max


# What the numbers of a run must be: field, words, test.
_NUMBERS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("params", "a positive number", _positive),
    ("tokens", "a positive number", _positive),
    ("loss", "a number of nats, or NaN for a run without one", lambda value: True),
    ("budget", "a positive number of FLOPs, or NaN for a run of none", lambda x: x != x or _positive(x)),
    ("arm_share", "at least 0 and below 1", lambda value: 0 <= value < 1),
)


def check_runs(results: Any, name: str = "results") -> None:
    """Refuse what is no collection of runs, and a run with numbers that no fit can use.

    Raises:
      UserError: it is a scalar, text, a single run, or has anything else among its runs; or a run has no parameters, no
        tokens, a loss that is no number, a budget that is neither NaN nor a positive number, an autoregressive share
        that is none, or one and no budget.
    """
    many = isinstance(results, Collection) and not isinstance(results, str | bytes | CellResult)
    wrong = [run for run in results if not isinstance(run, CellResult)] if many else [results]
    if wrong:
        raise UserError(
            f"{name}={_short(wrong[0])} must be a list of runs (CellResult), as sweep.results.load or "
            "scaling.read_points returns them; for columns of numbers use scaling.fit_isoflops or scaling.fit_surface"
        )
    _check_numbers(results, name)


def _check_numbers(results: Collection[CellResult], name: str) -> None:
    for i, run in enumerate(results):
        for field, what, allowed in _NUMBERS:
            value = getattr(run, field)
            if not isinstance(value, int | float | np.number) or isinstance(value, bool) or not allowed(value):
                raise UserError(f"{name}[{i}].{field}={_short(value)} must be {what}")
        if run.arm_share and math.isnan(run.budget):
            raise UserError(
                f"{name}[{i}].budget=nan, but a run with an autoregressive share ({run.arm_share:g}) is compared with "
                "those of its budget; give it the FLOPs of its budget, or leave it out"
            )


def check_points(**columns: Any) -> list[np.ndarray]:
    """Return columns of numbers as arrays, all of one length.

    Raises:
      UserError: one is a scalar, is empty, or has text or more dimensions, a number is not finite, or they are of
        several lengths.
    """
    arrays = []
    for name, values in columns.items():
        try:
            array = np.asarray(values, float)
        except (TypeError, ValueError):
            array = np.empty(())
        if array.ndim != 1:
            raise UserError(f"{name}={_short(values)} must be a list of numbers, one for each point")
        if not len(array):
            raise UserError(f"{name} is empty; give one number for each point")
        if (wrong := np.flatnonzero(~np.isfinite(array))).size:
            raise UserError(f"{name}[{wrong[0]}]={array[wrong[0]]} must be finite; leave the point out of all columns")
        arrays.append(array)
    lengths = {name: len(array) for name, array in zip(columns, arrays, strict=True)}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} has {count}" for name, count in lengths.items())
        raise UserError(f"the columns must have one number for each point: {counts}")
    return arrays


def check_draws(draws: Any) -> None:
    """Refuse a number of draws that is no positive whole number.

    Raises:
      UserError: it is none.
    """
    if isinstance(draws, bool) or not isinstance(draws, int | np.integer) or draws < 1:
        raise UserError(f"draws={_short(draws)} must be a positive whole number, such as 10_000")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
