"""Checks of what callers of the fits give them: each mistake is one line."""

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from diffusionlm.errors import UserError
from diffusionlm.scaling.sweep.results import CellResult

LONGEST = 60  # characters of a value in a message


def check_runs(results: Any, name: str = "results") -> None:
    """Refuse what is no collection of runs, and a run with numbers that no fit can use.

    Raises:
      UserError: it is a scalar, text, a single run, or has anything else among its runs; or a run has no parameters, no
        tokens, a budget that is neither NaN nor a positive number, or an autoregressive share and no budget.
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
        for field, value in (("params", run.params), ("tokens", run.tokens), ("budget", run.budget)):
            no_budget = field == "budget" and math.isnan(value)
            if not no_budget and not 0 < value < math.inf:
                rest = " of FLOPs, or NaN for a run that belongs to none" if field == "budget" else ""
                raise UserError(f"{name}[{i}].{field}={value} must be a positive number{rest}")
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
