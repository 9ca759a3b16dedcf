"""The verdict of a report: which laws a sweep determines, what speaks against them, and what to run for the others."""

from collections.abc import Mapping, Sequence

from diffusionlm.scaling.laws.diagnostics import REASONS, lack, outermost, rejected, suspicious
from diffusionlm.scaling.laws.objective import ObjectiveFit

_OPTIMA = {"params": "the best sizes", "tokens": "the best numbers of tokens", "loss": "the best losses"}


def verdict(objectives: Mapping[str, ObjectiveFit]) -> str:
    """Return one sentence about the laws of all objectives: which there are, why to doubt them, what is missing."""
    determined = [f"{name.upper()} (from {budgets(_usable(fit))})" for name, fit in objectives.items() if fit.laws]
    parts = [f"This sweep gives scaling laws for {_and(determined)}"] if determined else []
    unsure = [name.upper() for name, fit in objectives.items() if fit.laws and fit.noise is None]
    parts += [f"how certain those of {_and(unsure)} are is unknown, because the noise is"] if unsure else []
    scatter = [name.upper() for name, fit in objectives.items() if fit.laws and _scatter(fit)]
    parts += [f"intervals of {_and(scatter)} rest on the scatter about the curves, not on seeds"] if scatter else []
    parts += [f"doubt those of {name.upper()}: {_and(doubts(fit))}" for name, fit in objectives.items() if doubts(fit)]
    missing = [f"{name.upper()}: {_why_none(fit)}" for name, fit in objectives.items() if not fit.laws]
    if missing and determined:
        parts += [f"it gives none for {each}" for each in missing]
    elif missing:
        parts = [f"This sweep gives no scaling law for {'; nor for '.join(missing)}"]
    return "; ".join(parts) + "."


def doubts(fit: ObjectiveFit) -> list[str]:
    """Return what speaks against the laws of an objective; the warnings say more about each."""
    if not fit.laws:
        return []
    usable = [row for row in fit.budgets if row.usable]
    counts = {
        "the parabola is rejected": sum(map(rejected, usable)),
        "the optimum is in the last interval of the grid": sum(bool(r.optimum and r.optimum.at_edge) for r in usable),
        "the best measured size is at an end of the grid": sum(outermost(row) != "" for row in usable),
    }
    clauses = [f"at {budgets(count)} {clause}" for clause, count in counts.items() if count]
    if len(usable) == 2:
        clauses.append("nothing shows whether the laws, through two budgets, are straight lines")
    misfits = [_OPTIMA[key] for key, law in fit.laws.items() if suspicious(law.lack_of_fit)]
    if misfits:
        clauses.append(f"{_and(misfits)} at each budget do not lie on one power law")
    return clauses


def budgets(count: int) -> str:
    """Return a number of budgets in words."""
    return "1 budget" if count == 1 else f"{count} budgets"


def _why_none(fit: ObjectiveFit) -> str:
    if not fit.budgets:
        return "no run belongs to a budget, so there are no optima; of its parametric law the cross-checks have more"
    lacks = [lack(row) for row in fit.budgets]
    clauses = [f"at {budgets(lacks.count(key))} {reason}" for key, reason in REASONS.items() if key in lacks]
    if usable := lacks.count(None):
        clauses.append(f"{budgets(usable)} only has an optimum, and a law needs two")
    return ", ".join(clauses)


def _scatter(fit: ObjectiveFit) -> bool:
    return fit.noise is not None and fit.noise.source == "residuals"


def _usable(fit: ObjectiveFit) -> int:
    return sum(row.usable for row in fit.budgets)


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
