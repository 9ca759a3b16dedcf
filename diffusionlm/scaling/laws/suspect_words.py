"""What a report says of suspected cells."""

from collections.abc import Iterator, Sequence

import numpy as np

from diffusionlm.scaling.laws.bootstrap import Estimate
from diffusionlm.scaling.laws.diagnostics import SYMBOLS, listed, p_words
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.suspects import Suspect, cell_key
from diffusionlm.scaling.sweep.results import CellResult, of_others

NAMED = 3  # rows of one cell


def suspected(fit: ObjectiveFit) -> Iterator[tuple[int, str]]:
    """Yield weight and text of a warning of each suspected cell, or of too many cells to suspect any.

    The first cell of a law says what the law is without all of them.
    """
    if fit.unnamed:
        yield 0, f"{fit.objective}: {too_many(fit)}"
    first = next((suspect for suspect in fit.suspects if fit.in_laws(suspect)), None)
    for suspect in fit.suspects:
        where = f" at {suspect.budget:.3g} FLOPs" if np.isfinite(suspect.budget) else f", D = {suspect.tokens:.3g}"
        weight, rest = 0, ""
        if suspect is first:
            rest = _changes(fit)
        elif fit.laws and not fit.in_laws(suspect):
            weight, rest = 4, "; it is in no law, only in the surfaces"
        yield (
            weight,
            f"{fit.objective}{where}, N = {suspect.params:,}{_row_of(fit, suspect)}: this cell is suspected: it is "
            f"{_signed(suspect.off)} nats off the surface through the others ({p_words(suspect.p)}), so repeat it, or "
            f"leave it out{', by a word in its column flag' if of_others(fit.runs) else ''}{rest}",
        )


def too_many(fit: ObjectiveFit) -> str:
    """Say that so many cells are far off the surface that none is suspected, and what to do."""
    cells = len({cell_key(run) for run in fit.runs})
    look, differ = ("curves", "the budget or the sizes") if fit.budgets else ("runs", "those")
    return (
        f"so many cells are far off the surface, about {fit.unnamed} of {cells}, that it is the surface that does "
        f"not fit and none of them is named, so look at the {look}, and leave out {differ} that differ"
    )


def hiding(fit: ObjectiveFit) -> str:
    """Say which suspected cells hide optima, their own and those of other budgets."""
    cells = named_cells(fit)
    one = len(cells) == 1
    optima = "an optimum" if len(fit.hidden) == 1 else f"the optima of {len(fit.hidden)} budgets"
    return (
        f"the suspected {'cell' if one else 'cells'} {listed(cells)} {'hides' if one else 'hide'} {optima}, as the "
        f"scatter that all are judged by contains {'its error' if one else 'their errors'}: repeat "
        f"{'it' if one else 'them'}, or leave {'it' if one else 'them'} out"
    )


def named_cells(fit: ObjectiveFit) -> list[str]:
    """Return the suspected cells that are to blame, in words."""
    return [f"N = {cell.params:.3g} at {cell.budget:.3g} FLOPs" for cell in fit.blamed]


def _changes(fit: ObjectiveFit) -> str:
    """Say what the exponents are without the suspected cells: that of N*, and those that leave what is quoted."""
    other = fit.without_suspects
    if other and other.laws and not fit.laws:
        exponent = other.laws["params"].exponent.value
        return f"; there are laws without the suspected cells only, with an exponent of N* of {exponent:.3g}"
    if not fit.laws or fit.without_suspects is None:
        return ""
    clauses = []
    # The law of D* has the same data as that of N*.
    for key in dict.fromkeys(("params", *(key for key in fit.moved if key != "tokens"))):
        other = fit.without_suspects.laws.get(key)
        exponents = [f"{law.exponent.value:.3g}" if law else "not determined" for law in (fit.laws[key], other)]
        clauses.append(f"the exponent of {SYMBOLS[key]} is {exponents[0]} with all suspected cells, and {exponents[1]}")
    return "; " + ", ".join(f"{clause} without them" for clause in clauses)


def _row_of(fit: ObjectiveFit, suspect: Suspect) -> str:
    """Return which rows of a file or table a suspected cell is; "" for a cell of an own sweep."""
    same = [run for run in fit.runs if cell_key(run) == cell_key(suspect)]
    return f" ({_names(same)})" if same and of_others(same) else ""


def _names(runs: Sequence[CellResult]) -> str:
    """Return the names of runs, "points.csv lines 3 and 7", the first `NAMED` of them."""
    words = {run.id.rpartition(" ")[0] for run in runs}
    word = words.pop() if len(words) == 1 else ""
    names = [run.id.removeprefix(f"{word} ") for run in runs]
    if len(names) > NAMED:
        names[NAMED:] = [f"{len(names) - NAMED:,} more"]
    return f"{word}{'s' if len(runs) > 1 else ''} {listed(names)}" if word else listed(names)


def _signed(off: Estimate) -> str:
    """Return by how much a cell is off, with the interval."""
    ends = ", ".join(f"{end:+.3g}" for end in off.interval or ())
    return f"{off.value:+.3g} [{ends}]"
