"""What a report says of suspected cells."""

from collections.abc import Iterator

import numpy as np

from diffusionlm.scaling.laws.diagnostics import SYMBOLS, p_words
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.suspects import Suspect, cell_key


def suspected(fit: ObjectiveFit) -> Iterator[tuple[int, str]]:
    """Yield weight and text of a warning of each suspected cell; the first of a law says what the law is without."""
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
            f"{suspect.off:+.3g} nats off the surface through the others ({p_words(suspect.p)}), so repeat it, or "
            f"leave it out{rest}",
        )


def hidden(fit: ObjectiveFit) -> frozenset[float]:
    """Return the budgets whose optimum can be used without the suspected cells alone: their scatter is in its error."""
    if fit.without_suspects is None:
        return frozenset()
    usable = {row.budget for row in fit.budgets if row.usable}
    return frozenset(row.budget for row in fit.without_suspects.budgets if row.usable) - usable


def _changes(fit: ObjectiveFit) -> str:
    """Say what the exponents are without the suspected cells: that of N*, and those that leave what is quoted."""
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
    """Return which row of a file or table a suspected cell is; "" for a cell of an own sweep."""
    same = [run for run in fit.runs if cell_key(run) == cell_key(suspect)]
    return f" ({same[0].id})" if same and np.isnan(same[0].loss_stderr) else ""
