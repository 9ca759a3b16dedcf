"""The verdict of a report: which laws a sweep determines, what speaks against them, and what to run for the others."""

from collections import Counter
from collections.abc import Mapping, Sequence

from diffusionlm.scaling.laws.bend import bend
from diffusionlm.scaling.laws.diagnostics import (
    REASONS,
    SYMBOLS,
    budget_count,
    lack,
    listed,
    outermost,
    rejected,
    suspicious,
)
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.optima import BudgetFit
from diffusionlm.scaling.laws.scatter import contrasts, too_large
from diffusionlm.scaling.laws.suspect_words import hiding, named_cells, too_many
from diffusionlm.scaling.sweep.results import of_others

_OPTIMA = {"params": "the best sizes", "tokens": "the best numbers of tokens", "loss": "the best losses"}


def verdict(objectives: Mapping[str, ObjectiveFit]) -> str:
    """Return one sentence about the laws of all objectives: which there are, why to doubt them, what is missing."""
    quoted = {name: fit for name, fit in objectives.items() if fit.laws and not fit.hanging}
    determined = [f"{name.upper()} (from {budget_count(_usable(fit))})" for name, fit in quoted.items() if fit.noise]
    guessed = [f"{name.upper()} (from {budget_count(_usable(fit))})" for name, fit in quoted.items() if not fit.noise]
    points = of_others([run for fit in objectives.values() for run in fit.runs])
    source, again = ("These points give", "they give") if points else ("This sweep gives", "it gives")
    parts = [f"{source} scaling laws for {listed(determined)}"] if determined else []
    if guessed:
        parts.append(
            f"lines go through the optima of {listed(guessed)}, but without a noise nothing says how well they are "
            "known"
        )
    scatter = [name.upper() for name, fit in quoted.items() if _scatter(fit)]
    parts += [f"intervals of {listed(scatter)} rest on the scatter about the curves, not on seeds"] if scatter else []
    parts += [f"doubt those of {name.upper()}{_because(doubts(fit))}" for name, fit in quoted.items() if doubts(fit)]
    parts += [_hanging(name, fit) for name, fit in objectives.items() if fit.hanging]
    missing = [f"{name.upper()}{_because(_why_none(fit))}" for name, fit in objectives.items() if not fit.laws]
    if missing and parts:
        parts += [f"{again} none for {each}" for each in missing]
    elif missing:
        parts = [f"{source} no scaling law for {'; nor for '.join(missing)}"]
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def doubts(fit: ObjectiveFit) -> list[str]:
    """Return what speaks against the laws of an objective; the warnings say more about each."""
    if not fit.laws:
        return []
    if fit.hanging:
        return ["they hang on suspected cells"]
    usable = [row for row in fit.budgets if row.usable]
    counts = {
        "the curve is rejected": sum(map(rejected, usable)),
        "the optimum is in the last interval of the grid": sum(bool(r.optimum and r.optimum.at_edge) for r in usable),
        "the best measured size is at an end of the grid": sum(outermost(row) != "" for row in usable),
    }
    used = sum(map(fit.in_laws, fit.suspects))
    cells = f"{used} cells are" if used > 1 else "a cell is"
    stay = "stay in their intervals" if fit.used_noise else "hardly move"
    clauses = [f"{cells} suspected, without which the exponents {stay}"] if used else []
    if fit.unnamed:
        clauses.append(too_many(fit))
    if contrast := too_large(fit):
        clauses.append(str(contrast))
    clauses += [f"at {budget_count(count)} {clause}" for clause, count in counts.items() if count]
    if len(usable) == 2:
        clauses.append("nothing shows whether the laws, through two budgets, are straight lines")
    flat = [SYMBOLS[key] for key, law in fit.laws.items() if law.exponent.interval and not law.exponent.excludes(0.0)]
    if flat:
        clauses.append(f"the interval of the exponent of {listed(flat)} contains 0")
    misfits = [_OPTIMA[key] for key, law in fit.laws.items() if suspicious(law.lack_of_fit)]
    if "the best losses" not in misfits and bend(fit).shown:
        clauses.append("the best losses bend away from their power law")
    if misfits:
        laws = "one power law" if len(misfits) == 1 else "power laws"
        clauses.append(f"{listed(misfits)} at each budget do not lie on {laws}")
    return clauses


def _hanging(name: str, fit: ObjectiveFit) -> str:
    """Say that no law is quoted, because it hangs on suspected cells."""
    cells = named_cells(fit)
    noun, pronoun = ("cell", "it") if len(cells) == 1 else ("cells", "them")
    return (
        f"no law of {name.upper()} is quoted, as it hangs on the suspected {noun} {listed(cells)}: repeat {pronoun}, "
        f"or leave {pronoun} out"
    )


def _why_none(fit: ObjectiveFit) -> list[str]:
    """Return what an objective lacks for laws, and what to run or to leave out."""
    if not fit.budgets:
        clauses = ["no budget has three sizes, so that only the surface is fitted"]
        if count := len(fit.suspects):
            clauses.append("1 of its cells is suspected" if count == 1 else f"{count} of its cells are suspected")
        clauses += [too_many(fit)] if fit.unnamed else []
        return [*clauses, *map(str, contrasts(fit))]
    if fit.unnamed:  # which size is the best of losses that are wrong says nothing
        return [too_many(fit), *map(str, contrasts(fit))]
    counts = Counter(reason(fit, row) for row in fit.budgets if not row.usable and row.budget not in fit.hidden)
    known = list(REASONS.values())
    order = sorted(counts, key=lambda words: known.index(words) if words in known else len(known))
    clauses = [hiding(fit)] if fit.hidden else []
    clauses += [str(contrast)] if (contrast := too_large(fit)) else []
    clauses += [f"at {budget_count(counts[words])} {words}" for words in order]
    if usable := _usable(fit):
        clauses.append(f"only {budget_count(usable)} has an optimum, and a law needs two")
    return clauses


def reason(fit: ObjectiveFit, row: BudgetFit) -> str:
    """Return why a budget has no optimum that the laws can use, and what to run for one; "" if it has one."""
    need = lack(row)
    if need is None:
        return ""
    if row.budget in fit.hidden:
        own = any(suspect.budget == row.budget for suspect in fit.suspects)
        who = "suspected cells hide" if own else "the scatter due to suspected cells at other budgets hides"
        return f"{who} the optimum, so repeat them, or leave them out"
    if fit.unnamed and not fit.laws:
        return "too many cells are far off the surface to say which size is the best"
    if need == "seeds" and too_large(fit):
        return "the given noise hides the optimum, so give less"
    return REASONS[need]


def _because(clauses: Sequence[str]) -> str:
    """Return clauses as what follows a name: several have commas of their own, so they are in brackets."""
    return f": {clauses[0]}" if len(clauses) == 1 else f" ({'; '.join(clauses)})"


def _scatter(fit: ObjectiveFit) -> bool:
    return fit.noise is not None and fit.noise.source == "residuals"


def _usable(fit: ObjectiveFit) -> int:
    return sum(row.usable for row in fit.budgets)
