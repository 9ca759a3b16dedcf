"""What a report says of single budgets: a line for each thing to say, which names all budgets that it holds for."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from diffusionlm.scaling.laws.diagnostics import listed, outermost, p_words, rejected, suspicious
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.optima import BudgetFit, Optimum
from diffusionlm.scaling.laws.verdict import reason
from diffusionlm.scaling.sweep.results import of_others


class Note(NamedTuple):
    """A note says one thing about one budget."""

    weight: int  # 0 is the gravest
    budget: float  # FLOPs
    text: str  # the same for all budgets that have it
    numbers: str = ""  # those of this budget


def merged(name: str, notes: Iterable[Note]) -> Iterator[tuple[int, str]]:
    """Yield weight and text of a line for each text of some notes, in their order.

    Args:
      name: of what the notes are about, such as an objective.
      notes: what is to be said of its budgets.
    """
    alike: dict[tuple[int, str], list[Note]] = {}
    for note in notes:
        alike.setdefault((note.weight, note.text), []).append(note)
    for (weight, text), same in alike.items():
        places = [f"{note.budget:.3g}{' FLOPs' if note is same[-1] else ''}{_bracketed(note.numbers)}" for note in same]
        yield weight, f"{name} at {listed(places)}: {text}"


def _bracketed(numbers: str) -> str:
    return f" ({numbers})" if numbers else ""


def of_budgets(fit: ObjectiveFit) -> Iterator[tuple[int, str]]:
    """Yield weight and text of the warnings about the budgets of one objective."""
    yield from merged(fit.objective, _without_optimum(fit))
    yield from merged(fit.objective, _optima(fit))
    yield from merged(fit.objective, filter(None, (_misfit(fit, row) for row in fit.budgets)))
    yield from merged(fit.objective, _evaluation(fit))


def _without_optimum(fit: ObjectiveFit) -> Iterator[Note]:
    for row in fit.budgets:
        if row.parabola is None:
            yield Note(1, row.budget, "a curve needs 3 sizes, so there is no optimum", f"sizes finished: {row.sizes}")
        elif row.optimum is None:
            yield Note(1, row.budget, f"the curve has no minimum, so these sizes show no optimum; {reason(fit, row)}")


def _optima(fit: ObjectiveFit) -> Iterator[Note]:
    for row in fit.budgets:
        if row.optimum:
            for weight, text, numbers in _doubts(fit, row, row.optimum):
                yield Note(weight, row.budget, text, numbers)


def _doubts(fit: ObjectiveFit, row: BudgetFit, optimum: Optimum) -> Iterator[tuple[int, str, str]]:
    """Yield weight, text and numbers of what is to be doubted about an optimum."""
    params, (smallest, largest) = optimum.params, np.exp(optimum.sizes[[0, -1]])
    value = f"N* = {params.value:.3g}"
    if not optimum.inside:
        yield 1, f"N* is outside the grid; it is in no law; {reason(fit, row)}", value
    elif params.interval and not params.bounded:
        text = "the curvature is not significant, so N* is not determined; it is in no law; "
        yield 1, f"{text}{reason(fit, row)}", ""
    elif not optimum.determined:
        yield (
            1,
            "N* is not determined: its interval goes more than a spacing beyond the grid; it is in no law; "
            f"{reason(fit, row)}",
            f"{value} [{params.low:.3g}, {params.high:.3g}], sizes from {smallest:.3g} to {largest:.3g}",
        )
    elif optimum.at_edge and row.sizes > 3:  # three sizes have no interval but the outermost
        yield 3, "N* is in the last interval of the grid; add sizes beyond", value
    elif params.interval and not smallest <= params.interval[0] <= params.interval[1] <= largest:
        yield 3, "the interval of N* reaches beyond the grid", ""
    if optimum.usable and (end := outermost(row)):
        yield 3, f"the {end} size is the best that was measured, so one side of the optimum is only noise", ""


def _misfit(fit: ObjectiveFit, row: BudgetFit) -> Note | None:
    misfit = row.optimum.lack_of_fit if row.optimum else None
    if misfit is None or not suspicious(misfit):
        return None
    numbers = f"{misfit.sd:.3g} nats, {p_words(misfit.p)}"
    if rejected(row) and row.usable and fit.laws:
        text = "the curve is rejected, and yet the laws use its optimum"
        return Note(2, row.budget, f"{text}; the losses leave it by so much beyond the noise", numbers)
    text = "losses leave the curve by so much beyond the noise"
    text += "" if fit.widened else ", which no interval contains"
    return Note(3, row.budget, text, numbers)


def _evaluation(fit: ObjectiveFit) -> Iterator[Note]:
    if of_others(fit.runs):
        return  # nothing but their loss is known
    for row in fit.budgets:
        if row.sizes > 1 and row.paired is None:
            text = "cells lack common noise draws, so the evaluation error of their differences is unknown"
            yield Note(4, row.budget, text)
        elif row.paired and row.paired.effect and not row.paired.small:
            yield Note(
                4,
                row.budget,
                "the evaluation error of differences between sizes is not below a tenth of what they differ by; "
                "evaluate with more draws",
                f"{row.paired.stderr:.3g} nats, where they differ by {row.paired.effect:.3g}",
            )
