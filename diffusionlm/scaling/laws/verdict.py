"""The verdict of a report: which laws a sweep determines, what speaks against them, and what to run for the others."""

from collections.abc import Mapping, Sequence

from diffusionlm.scaling.laws.diagnostics import REASONS, SYMBOLS, lack, outermost, rejected, suspicious
from diffusionlm.scaling.laws.objective import ObjectiveFit


def verdict(objectives: Mapping[str, ObjectiveFit]) -> str:
    """Return one sentence about the laws of all objectives."""
    determined = [f"of {name} from {_usable(fit)} budgets" for name, fit in objectives.items() if fit.laws]
    subject = f"the laws {' and '.join(determined)}" if determined else "no law"
    parts = [f"This sweep determines {subject}"]
    against = [f"of {name} {_and(doubts(fit))}" for name, fit in objectives.items() if doubts(fit)]
    if against:
        parts = [f"{parts[0]}, but {'; '.join(against)}"]
    for name, fit in objectives.items():
        if not fit.laws:
            parts.append(f"{'none of' if determined else 'for'} {name}: {_why_none(fit)}")
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
    misfits = [SYMBOLS[key] for key, law in fit.laws.items() if suspicious(law.lack_of_fit)]
    if misfits:
        clauses.append(f"the optima leave the law of {_and(misfits)}")
    return clauses


def budgets(count: int) -> str:
    """Return a number of budgets in words."""
    return "1 budget" if count == 1 else f"{count} budgets"


def _why_none(fit: ObjectiveFit) -> str:
    lacks = [lack(row) for row in fit.budgets]
    clauses = [f"at {budgets(lacks.count(key))} {reason}" for key, reason in REASONS.items() if key in lacks]
    if usable := lacks.count(None):
        clauses.append(f"{budgets(usable)} only has an optimum, and a law needs two")
    return ", ".join(clauses)


def _usable(fit: ObjectiveFit) -> int:
    return sum(row.usable for row in fit.budgets)


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
