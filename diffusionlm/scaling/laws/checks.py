"""What a reader must know before the numbers of a report: a line for each thing that is missing or to be distrusted."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from diffusionlm.scaling.laws import uncertainty
from diffusionlm.scaling.sweep.results import CellResult

SUSPICIOUS = 0.05  # p value below which a misfit is named
REJECTED = 0.01  # p value below which a parabola is not the curve of its budget, or one of its runs went wrong
DISAGREE = 0.01  # p value below which the seeds of one cell scatter more than those of the others
LOUD = 0.25  # share of the effect over sizes that the noise of a seed may have
OFF_BUDGET = 0.02  # share of the budget that a cell may miss it by


def warnings(results: Sequence[CellResult], objectives: Mapping, gaps: Sequence) -> list[str]:
    """All warnings, the gravest first: what is not there, then what is not to be trusted, then what is only less exact.

    Args:
      results: all finished cells, those that were left out too.
      objectives: `analysis.ObjectiveFit` by name.
      gaps: as in `analysis.Analysis`.
    """
    found = list(_all(results, objectives, gaps))
    return [line for _, line in sorted(found, key=lambda item: item[0])]  # of equal weight, in their order


def verdict(objectives: Mapping[str, Any]) -> str:
    """One sentence: of which objectives there are laws, and what to run for those of which there are none."""
    found = [f"of {name} from {_used(fit)} budgets" for name, fit in objectives.items() if fit.laws]
    said = [f"This sweep determines the laws {' and '.join(found)}" if found else "This sweep determines no law"]
    against = [f"of {name} {_and(doubts(fit))}" for name, fit in objectives.items() if doubts(fit)]
    if against:
        said = [f"{said[0]}, but {'; '.join(against)}"]
    for name, fit in objectives.items():
        if not fit.laws:
            said.append(f"{'none of' if found else 'for'} {name}: {_why_none(fit)}")
    return "; ".join(said) + "."


def doubts(fit) -> list[str]:
    """What speaks against the laws of an objective, for the verdict; the warnings say more of each."""
    used = [row for row in fit.budgets if row.usable]
    found = [
        (sum(map(rejected, used)), "the parabola is rejected"),
        (sum(row.at_edge for row in used), "the optimum is in the last interval of the grid"),
        (sum(outermost(row) != "" for row in used), "the best measured size is at an end of the grid"),
    ]
    said = [f"at {_budgets(count)} {what}" for count, what in found if count and fit.laws]
    if len(used) == 2 and fit.laws:
        said.append("nothing shows whether the laws, through two budgets, are straight lines")
    leaves = [SYMBOLS[key] for key, law in fit.laws.items() if _suspicious(law.lack_of_fit)]
    if leaves:
        said.append(f"the optima leave the law of {_and(leaves)}")
    return said


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _suspicious(misfit) -> bool:
    return misfit is not None and misfit.p is not None and misfit.p < SUSPICIOUS


def rejected(row) -> bool:
    """Whether the residuals of a budget are too large to be noise about its parabola."""
    return row.lack_of_fit is not None and row.lack_of_fit.p is not None and row.lack_of_fit.p < REJECTED


def outermost(row) -> str:
    """Whether the smallest mean loss of a budget is at its "smallest" or "largest" size; "" if it is between them."""
    losses = {key[2]: np.mean([run.loss for run in runs]) for key, runs in uncertainty.by_cell(row.runs).items()}
    return {min(losses): "smallest", max(losses): "largest"}.get(min(losses, key=losses.get), "")


def state(row) -> str:
    """What the optimum of a budget lacks: nothing (""), "sizes", "smaller" or "larger" ones, or "seeds"."""
    if row.parabola is None:
        return "sizes"
    if row.usable:
        return ""
    return {"smallest": "smaller", "largest": "larger", "": "seeds"}[outermost(row)]


REASONS = {
    "sizes": "fewer than three sizes have finished, so finish those",
    "smaller": "the smallest size is the best, so run smaller ones",
    "larger": "the largest size is the best, so run larger ones",
    "seeds": "the noise hides which size is the best, so run more seeds",
}


def _used(fit) -> int:
    return sum(row.usable for row in fit.budgets)


def _why_none(fit) -> str:
    states = [state(row) for row in fit.budgets]
    why = [f"at {_budgets(states.count(lack))} {reason}" for lack, reason in REASONS.items() if states.count(lack)]
    if used := states.count(""):
        why.append(f"{_budgets(used)} only has an optimum, and a law needs two")
    return ", ".join(why)


def _budgets(count: int) -> str:
    return "1 budget" if count == 1 else f"{count} budgets"


def _all(results: Sequence[CellResult], objectives: Mapping, gaps: Sequence) -> Iterator[tuple[int, str]]:
    """Weight (0 is the gravest) and text of each warning."""
    lost = [result.id for result in results if not (np.isfinite(result.loss) and result.loss > 0)]
    if lost:
        yield 0, f"left out for want of a finite loss: {', '.join(lost)}"
    for fit in objectives.values():
        yield from _missing(fit)
        yield from _optima(fit)
        yield from _misfits(fit)
        yield from ((3, line) for line in _predictions(fit))
        yield from ((4, line) for line in _seeds(fit))
        yield from ((4, line) for line in _evaluation(fit))
    if len(objectives) < 2:
        only = next(iter(objectives))
        yield 2, f"only the objective {only} has finished cells, so there is no gap between objectives"
    elif not gaps:
        yield 2, "no gap between objectives: it needs a falling loss law of arm and an optimum of one other objective"
    for gap in gaps:
        yield from _gap(gap)
    yield from ((5, line) for line in _data(results))
    ratio = uncertainty.variance_ratio([result for result in results if np.isfinite(result.loss)])
    if ratio and ratio[2] < SUSPICIOUS:
        yield (
            5,
            f"seeds of {ratio[0]} scatter {np.sqrt(ratio[1]):.1f} times more than those of the other objective (F "
            f"test, p = {ratio[2]:.2g}); each has its own noise in the intervals",
        )


def _gap(gap) -> Iterator[tuple[int, str]]:
    pair = f"the gap between {gap.objective} and {gap.reference}"
    if gap.laws[0] is None:
        counted = "one optimum" if len(gap.at_own) == 1 else f"{len(gap.at_own)} optima"
        yield 2, f"{pair} is only known at {counted} of {gap.objective}, for want of a falling loss law of it"
    elif not gap.parallel:
        yield (
            3,
            f"{pair} is not one number: their loss laws have different exponents (p = {gap.equal_p:.2g}), so it is "
            "given at each budget only",
        )
    beyond = list(zip((gap.objective, gap.reference), gap.beyond, strict=True))
    if all(factor > 1 for _, factors in beyond for factor in factors):
        whose = [
            f"that of {name} by a factor of {min(factors):.3g}"
            + (f" to {max(factors):.3g}" if len(factors) > 1 else "")
            for name, factors in beyond
            if factors
        ]
        yield (
            3,
            f"{pair} is larger than the range of budgets, so that a loss law is extrapolated wherever it is evaluated: "
            + ", or ".join(whose),
        )


def _missing(fit) -> Iterator[tuple[int, str]]:
    name = fit.objective
    used = _used(fit)
    if not fit.laws:
        yield 0, f"{name}: no power laws and no prediction: {_budgets(used)} with a usable optimum, a law needs 2"
    elif used == 2:
        yield 2, f"{name}: the laws go through two budgets only, so nothing shows whether they are straight lines"
    elif used < len(fit.budgets):
        yield 2, f"{name}: the laws go through {used} of {len(fit.budgets)} budgets"
    if fit.noise is None:
        yield (
            2,
            f"{name}: no intervals, because the noise is unknown: it takes {uncertainty.MIN_SEEDS} seeds in at least "
            f"{uncertainty.MIN_REPEATED} cells",
        )
    elif fit.noise.pooled:
        yield 4, f"{name}: too few repeated seeds of its own; its intervals use the noise of all objectives together"
    for row in fit.budgets:
        where = f"{name} at {row.budget:.3g} FLOPs"
        if row.parabola is None:
            yield 1, f"{where}: sizes finished: {row.sizes}, and a parabola needs 3; it has no optimum"
        elif not row.parabola.convex:
            yield 1, f"{where}: the parabola opens downwards, so these sizes show no optimum; {REASONS[state(row)]}"


def _optima(fit) -> Iterator[tuple[int, str]]:
    for row in fit.budgets:
        if row.params is None:
            continue
        where = f"{fit.objective} at {row.budget:.3g} FLOPs"
        sizes = np.exp([row.log_n.min(), row.log_n.max()])
        at = f"N* = {row.params.value:.3g}"
        if not row.inside:
            yield 1, f"{where}: {at} is outside the grid; it is in no law; {REASONS[state(row)]}"
        elif row.params.low is not None and not row.params.bounded:
            yield (
                1,
                f"{where}: the curvature is not significant, so N* is not determined; it is in no law; "
                f"{REASONS[state(row)]}",
            )
        elif not row.determined:
            yield (
                1,
                f"{where}: {at} [{row.params.low:.3g}, {row.params.high:.3g}] is not determined: its interval goes "
                f"more than a spacing beyond the grid ({sizes[0]:.3g} to {sizes[1]:.3g}); it is in no law; "
                f"{REASONS[state(row)]}",
            )
        elif row.at_edge:
            yield 3, f"{where}: {at} is in the last interval of the grid; add sizes beyond"
        elif row.params.low is not None and not sizes[0] <= row.params.low <= row.params.high <= sizes[1]:
            yield 3, f"{where}: the interval of N* reaches beyond the grid"
        if row.usable and (end := outermost(row)):
            yield 3, f"{where}: the {end} size is the best that was measured, so one side of the optimum is only noise"


def _misfits(fit) -> Iterator[tuple[int, str]]:
    for row in fit.budgets:
        where = f"{fit.objective} at {row.budget:.3g} FLOPs"
        if rejected(row) and row.usable:
            worst = int(np.argmax(np.abs(row.parabola.residuals)))
            off = row.parabola.residuals[worst]
            yield (
                2,
                f"{where}: the parabola is rejected (p = {row.lack_of_fit.p:.2g}), and yet the laws use its optimum; "
                f"the run of {row.runs[worst].params:,} parameters is off by {off:+.3g} nats, "
                f"{abs(off) / fit.noise.sd:.1f} times what seeds scatter by",
            )
        elif _suspicious(row.lack_of_fit):
            yield (
                3,
                f"{where}: losses leave the parabola by {row.lack_of_fit.sd:.3g} nats beyond the noise "
                f"(p = {row.lack_of_fit.p:.2g}), which no interval contains",
            )
    for key, law in fit.laws.items():
        if law.hangs_on:
            without = " and ".join(f"{e.value:.4g} without that of {c:.3g} FLOPs" for c, e in law.hangs_on)
            yield (
                2,
                f"{fit.objective}: the exponent of {SYMBOLS[key]} leaves its interval without one of the budgets: it "
                f"is {law.exponent.value:.4g} [{law.exponent.low:.4g}, {law.exponent.high:.4g}], but {without}",
            )
    if fit.asymmetry and fit.asymmetry.p is not None and fit.asymmetry.p < SUSPICIOUS:
        factors = np.exp(np.abs([s for s in fit.asymmetry.shift_log_n if np.isfinite(s)]))
        moved = f"moves N* by up to a factor of {factors.max():.2f}" if len(factors) else "leaves no optimum"
        yield (
            3,
            f"{fit.objective}: the curves are not symmetric in log N (p = {fit.asymmetry.p:.2g}); a cubic term "
            f"{moved}: see the bias columns",
        )
    for key, law in fit.laws.items():
        if _suspicious(law.lack_of_fit):
            yield (
                3,
                f"{fit.objective}: the optima leave the power law of {SYMBOLS[key]} by {100 * law.lack_of_fit.sd:.2g}% "
                f"beyond the noise (p = {law.lack_of_fit.p:.2g}); extrapolating it is less certain than its interval",
            )


def _predictions(fit) -> Iterator[str]:
    ahead = fit.prediction
    if not ahead:
        return
    error = ahead.hindcast
    if error and error.low is not None and not error.low <= 0 <= error.high:
        yield (
            f"{fit.objective}: the other budgets predict the L* of the largest {abs(error.value):.2g} nats too "
            f"{'low' if error.value < 0 else 'high'} (hindcast [{error.low:.2g}, {error.high:.2g}]), so the next "
            "prediction may be off alike"
        )
    if fit.parametric and fit.parametric.determined and ahead.loss.low is not None:
        loss = fit.parametric.optimum(ahead.budget)[2]
        if not ahead.loss.low <= loss <= ahead.loss.high:
            yield (
                f"{fit.objective}: Approach 3 predicts L* = {loss:.4g} at {ahead.budget:.3g} FLOPs, outside of the "
                f"interval of Approach 2, {ahead.loss.value:.4g} [{ahead.loss.low:.4g}, {ahead.loss.high:.4g}]"
            )


SYMBOLS = {"params": "N*", "tokens": "D*", "loss": "L*"}


def _seeds(fit) -> Iterator[str]:
    runs = [run for row in fit.budgets for run in row.runs]
    repeated = {key: np.array([r.loss for r in cell]) for key, cell in uncertainty.by_cell(runs).items()}
    repeated = {key: losses for key, losses in repeated.items() if len(losses) > 1}
    for (_, budget, params), losses in repeated.items():
        others = [other for key, other in repeated.items() if key[1:] != (budget, params)]
        dof = sum(len(other) - 1 for other in others)
        variance = sum(((other - other.mean()) ** 2).sum() for other in others) / dof if dof else 0.0
        if variance > 0 and stats.f.sf(losses.var(ddof=1) / variance, len(losses) - 1, dof) < DISAGREE:
            yield (
                f"{fit.objective} at {budget:.3g} FLOPs, N = {params:.3g}: its seeds disagree (sd "
                f"{losses.std(ddof=1):.3g} nats, {np.sqrt(variance):.3g} in the other repeated cells)"
            )
    budgets = [row.budget for row in fit.budgets]
    larger = budgets[(len(budgets) + 1) // 2 :]
    which = "largest budget" if len(larger) == 1 else f"{len(larger)} largest budgets"
    if fit.noise and larger and not any(budget in larger for _, budget, _ in repeated):
        yield (
            f"{fit.objective}: no cell of the {which} is repeated, so misfits and intervals there rest on "
            "noise that was measured at smaller ones"
        )
    effects = [row.paired.effect for row in fit.budgets if row.paired]
    if fit.noise and effects and fit.noise.sd > LOUD * np.median(effects):
        yield (
            f"{fit.objective}: seeds scatter by {fit.noise.sd:.3g} nats, which is more than a quarter of what the "
            f"sizes of a budget differ by ({np.median(effects):.3g})"
        )


def _evaluation(fit) -> Iterator[str]:
    for row in fit.budgets:
        where = f"{fit.objective} at {row.budget:.3g} FLOPs"
        if row.sizes > 1 and row.paired is None:
            yield f"{where}: cells lack common noise draws, so the evaluation error of their differences is unknown"
        elif row.paired and not row.paired.small:
            yield (
                f"{where}: the evaluation error of differences between sizes ({row.paired.stderr:.3g} nats) is not "
                f"below a tenth of what they differ by ({row.paired.effect:.3g}); evaluate with more draws"
            )


def _data(results: Sequence[CellResult]) -> Iterator[str]:
    epochs = np.array([result.tokens / result.unique_tokens for result in results])
    if (epochs > 1).any():
        yield (
            f"data repeat in {(epochs > 1).sum()} of {len(results)} cells, up to {epochs.max():.1f} epochs; laws for "
            "unique data do not apply to those"
        )
    off = [abs(result.flops / result.budget - 1) for result in results]
    if max(off) > OFF_BUDGET:
        yield f"cells miss their budget by up to {100 * max(off):.1f}%, which the fits ignore"
