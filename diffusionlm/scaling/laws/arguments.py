"""Checks of what callers of the fits give them: each mistake is one line."""

from collections.abc import Collection
from typing import Any

import numpy as np

from diffusionlm.errors import UserError
from diffusionlm.scaling.sweep.results import CellResult

LONGEST = 60  # characters of a value in a message


def check_runs(results: Any, name: str = "results") -> None:
    """Refuse what is no collection of runs.

    Raises:
      UserError: it is a scalar, text, a single run, or has anything else among its runs.
    """
    many = isinstance(results, Collection) and not isinstance(results, str | bytes | CellResult)
    wrong = [run for run in results if not isinstance(run, CellResult)] if many else [results]
    if wrong:
        raise UserError(
            f"{name}={_short(wrong[0])} must be a list of runs (CellResult), as sweep.results.load or "
            "scaling.read_points returns them; for columns of numbers use scaling.fit_isoflops or scaling.fit_surface"
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
