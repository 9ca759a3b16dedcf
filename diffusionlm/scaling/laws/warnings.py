"""The warnings of a report: a line for everything that is missing or not to be trusted."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import stats

from diffusionlm.scaling.laws.bend import bend
from diffusionlm.scaling.laws.budget_words import of_budgets
from diffusionlm.scaling.laws.diagnostics import (
    SUSPICIOUS,
    SYMBOLS,
    budget_count,
    listed,
    p_words,
    suspicious,
)
from diffusionlm.scaling.laws.gap import Gap, quoted
from diffusionlm.scaling.laws.noise import MIN_REPEATED, MIN_SEEDS, repeats, variance_ratio
from diffusionlm.scaling.laws.objective import FAR, ObjectiveFit
from diffusionlm.scaling.laws.power_laws import Prediction
from diffusionlm.scaling.laws.scatter import scatter_warnings
from diffusionlm.scaling.laws.suspect_words import suspected
from diffusionlm.scaling.sweep.results import CellResult

Warnings = Iterator[tuple[int, str]]  # weight (0 is the gravest) and text

DISAGREE = 0.01  # p value below which the seeds of one cell scatter more than those of the others
LOUD = 0.25  # the share of the effect over sizes that the noise of a seed may have
OFF_BUDGET = 0.02  # the share of the budget by which a cell may miss it


def warnings(results: Sequence[CellResult], objectives: Mapping[str, ObjectiveFit], gaps: Sequence[Gap]) -> list[str]:
    """Return all warnings, the gravest first: what is missing, then what is not to be trusted, then what is less exact.

    Args:
      results: all finished cells, including those that the fits leave out.
      objectives: the fits by objective.
      gaps: the gaps between objectives.
    """
    return _sorted(_all(results, objectives, gaps))


def of_objective(fit: ObjectiveFit) -> list[str]:
    """Return the warnings about one objective, the gravest first."""
    return _sorted(_objective(fit))


def _sorted(lines: Warnings) -> list[str]:
    """Return the lines by weight; those of equal weight keep their order."""
    return [line for _, line in sorted(lines, key=lambda item: item[0])]


def _objective(fit: ObjectiveFit) -> Warnings:
    yield from _missing(fit)
    yield from suspected(fit)
    yield from scatter_warnings(fit)
    yield from of_budgets(fit)
    yield from _misfits(fit)
    yield from ((3, line) for line in predictions(fit))
    yield from ((4, line) for line in _seeds(fit))


def _all(results: Sequence[CellResult], objectives: Mapping[str, ObjectiveFit], gaps: Sequence[Gap]) -> Warnings:
    yield from ((0, f"{r.id} is left out: its evaluation is not finite") for r in results if not np.isfinite(r.loss))
    yield from ((0, f"{r.id} is left out: its loss is not positive") for r in results if r.loss <= 0)
    for fit in objectives.values():
        yield from _objective(fit)
    if len(objectives) < 2:
        only = next(iter(objectives))
        yield 5, f"only the objective {only} has runs, so there is no gap between objectives"
    elif not gaps:
        yield 2, "no gap between objectives: it needs a falling loss law of arm and an optimum of one other objective"
    for gap in quoted(gaps, objectives):
        yield from _gap(gap)
    yield from ((5, line) for line in _data(results))
    louder = variance_ratio([result for result in results if np.isfinite(result.loss)])
    if louder and louder.p < SUSPICIOUS:
        yield (
            5,
            f"seeds of {louder.objective} scatter {np.sqrt(louder.ratio):.1f} times more than those of the other "
            f"objective (F test, {p_words(louder.p)}); each has its own noise in the intervals",
        )


def _missing(fit: ObjectiveFit) -> Warnings:
    name = fit.objective
    usable = sum(row.usable for row in fit.budgets)
    if not fit.budgets:
        yield 2, f"{name}: no budget has three sizes, so there are no optima and laws, only the fitted surfaces"
        return
    if far := sum(len(row.distant) for row in fit.budgets):
        yield (
            4,
            f"{name}: {'1 run is' if far == 1 else f'{far} runs are'} in no curve and no law, more than {FAR:g} times "
            "larger or smaller than the best size of the budget",
        )
    if not fit.laws:
        yield 0, f"{name}: no power laws and no prediction: {budget_count(usable)} with a usable optimum, a law needs 2"
    elif usable == 2:
        yield 2, f"{name}: the laws go through two budgets only, so nothing shows whether they are straight lines"
    elif usable < len(fit.budgets):
        yield 2, f"{name}: the laws go through {usable} of {len(fit.budgets)} budgets"
    if fit.noise is None:
        yield (
            2,
            f"{name}: no intervals, because the noise is unknown: it takes {MIN_SEEDS} seeds in at least "
            f"{MIN_REPEATED} cells, or a noise that is given (--noise, or noise= in Python)",
        )
    elif fit.noise.source == "residuals":
        yield (
            2,
            f"{name}: intervals rest on the scatter about the fitted curves, {fit.noise.sd:.3g} nats, which contains "
            "misfit as well as noise; the fit of a curve cannot be tested against it",
        )
    elif fit.noise.source == "given":
        what = "tests rest" if fit.widened else "intervals and tests rest"
        yield 4, f"{name}: {what} on the given noise of {fit.noise.sd:.3g} nats; nothing here measures it"
    elif fit.noise.pooled and not fit.arm_share:
        yield 4, f"{name}: too few repeated seeds of its own; its intervals use the noise of all objectives together"


def _misfits(fit: ObjectiveFit) -> Warnings:
    alike = {key: law for key, law in fit.laws.items() if key != "tokens"}  # D* is C / (k N*): no news beside N*
    for key, law in alike.items():
        if law.decisive and not fit.arm_share:
            without = listed([f"{e.value:.4g} without that of {c:.3g} FLOPs" for c, e in law.decisive])
            yield (
                2,
                f"{fit.objective}: the exponent of {SYMBOLS[key]} leaves its interval without one of the budgets: it "
                f"is {law.exponent.value:.4g} [{law.exponent.low:.4g}, {law.exponent.high:.4g}], but {without}",
            )
    yield from _shape(fit)
    for key, law in alike.items():
        misfit = law.lack_of_fit
        if misfit and suspicious(misfit):
            yield (
                3,
                f"{fit.objective}: the optima leave the power law of {SYMBOLS[key]} by {100 * misfit.sd:.2g}% "
                f"beyond the noise ({p_words(misfit.p)}); extrapolating it is less certain than its interval",
            )


def _shape(fit: ObjectiveFit) -> Warnings:
    """Name what plain parabolas would get wrong, and curves that do not fit within the noise."""
    optima = [row.optimum for row in fit.budgets if row.optimum and row.optimum.usable]
    moved = [
        optimum.shift_log_n
        for optimum in optima
        if optimum.shift_log_n is not None
        and np.isfinite(optimum.shift_log_n)
        and optimum.params.excludes(optimum.params.value / np.exp(optimum.shift_log_n))
    ]
    if moved:
        factor = np.exp(np.abs(moved).max())
        yield (
            3,
            f"{fit.objective}: the curves are not parabolas: these would move N* by a factor of up to {factor:.2f}, "
            f"out of its interval, at {budget_count(len(moved))}; published optima that you compare with may be moved "
            "alike",
        )
    if fit.widened and fit.noise and fit.used_noise:
        yield (
            2,
            f"{fit.objective}: the losses scatter about the curves by {fit.used_noise.sd:.3g} nats, which the noise of "
            f"{fit.noise.sd:.3g} does not explain; all intervals use the scatter",
        )


def predictions(fit: ObjectiveFit) -> Iterator[str]:
    """Yield a warning for each reason to doubt the prediction of an objective."""
    ahead = fit.prediction
    if not ahead:
        return
    yield from _bend(fit, ahead)
    if fit.parametric and fit.parametric.determined:
        loss = fit.parametric.optimum(ahead.budget)[2]
        if ahead.loss.excludes(loss):
            yield (
                f"{fit.objective}: Approach 3 predicts L* = {loss:.4g} at {ahead.budget:.3g} FLOPs, outside of the "
                f"interval of the laws, {ahead.loss.value:.4g} [{ahead.loss.low:.4g}, {ahead.loss.high:.4g}]"
            )


def _bend(fit: ObjectiveFit, ahead: Prediction) -> Iterator[str]:
    """Name a largest budget that the others do not predict, and what a bent law would predict."""
    signs, error, other = bend(fit), ahead.hindcast, ""
    if ahead.bent_loss and signs.shown:
        other = f"; at {ahead.budget:.3g} FLOPs the bent law gives {ahead.bent_loss.value:.4g}, the straight one "
        other += f"{ahead.loss.value:.4g}"
    if error and signs.missed:
        side = "low" if error.value < 0 else "high"
        if error.interval:
            how = f"(hindcast [{error.low:.2g}, {error.high:.2g}])"
        else:
            how = "(hindcast), more than the scatter of the runs explains"
        yield (
            f"{fit.objective}: the other budgets predict the L* of the largest {abs(error.value):.2g} nats too {side} "
            f"{how}, so the next prediction may be off alike{other}"
        )
    elif signs.bent and other and fit.used_noise is None:
        yield f"{fit.objective}: the best losses bend away from their power law by more than they scatter{other}"


def _gap(gap: Gap) -> Warnings:
    pair = f"the gap between {gap.objective} and {gap.reference}"
    if gap.law is None:
        count = "one optimum" if len(gap.at_own) == 1 else f"{len(gap.at_own)} optima"
        yield 2, f"{pair} is only known at {count} of {gap.objective}, for want of a falling loss law of it"
    elif not gap.parallel:
        yield (
            3,
            f"{pair} is not one number: their loss laws have different exponents ({p_words(gap.equal_p)}), so it is "
            "given at each budget only",
        )
    by_law = list(zip((gap.objective, gap.reference), gap.extrapolations, strict=True))
    if all(factor > 1 for _, factors in by_law for factor in factors):
        clauses = [
            f"that of {name} by a factor of {min(factors):.3g}"
            + (f" to {max(factors):.3g}" if len(factors) > 1 else "")
            for name, factors in by_law
            if factors
        ]
        yield (
            3,
            f"{pair} is larger than the range of budgets, so that a loss law is extrapolated wherever it is evaluated: "
            + ", or ".join(clauses),
        )


def _seeds(fit: ObjectiveFit) -> Iterator[str]:
    runs = [run for row in fit.budgets for run in row.runs]
    repeated = {key: np.array([r.loss for r in cell]) for key, cell in repeats(runs).items()}
    for (_, budget, params), losses in repeated.items():
        others = [other for key, other in repeated.items() if key[1:] != (budget, params)]
        dof = sum(len(other) - 1 for other in others)
        variance = sum(((other - other.mean()) ** 2).sum() for other in others) / dof if dof else 0.0
        if variance > 0 and stats.f.sf(losses.var(ddof=1) / variance, len(losses) - 1, dof) < DISAGREE:
            yield (
                f"{fit.objective} at {budget:.3g} FLOPs, N = {params:.3g}: its seeds disagree (sd "
                f"{losses.std(ddof=1):.3g} nats, {np.sqrt(variance):.3g} in the other repeated cells)"
            )
    compute = [row.budget for row in fit.budgets]
    larger = [] if fit.arm_share else compute[(len(compute) + 1) // 2 :]  # the noise is that of all roads
    which = "largest budget" if len(larger) == 1 else f"{len(larger)} largest budgets"
    measured = fit.noise and fit.noise.source == "seeds"
    if measured and larger and not any(budget in larger for _, budget, _ in repeated):
        yield (
            f"{fit.objective}: no cell of the {which} is repeated, so misfits and intervals there rest on "
            "noise that was measured at smaller ones"
        )
    effects = [row.paired.effect for row in fit.budgets if row.paired]
    if fit.noise and fit.noise.source == "seeds" and effects and fit.noise.sd > LOUD * np.median(effects):
        yield (
            f"{fit.objective}: seeds scatter by {fit.noise.sd:.3g} nats, which is more than a quarter of what the "
            f"sizes of a budget differ by ({np.median(effects):.3g})"
        )


def _data(results: Sequence[CellResult]) -> Iterator[str]:
    epochs = np.array([result.tokens / result.unique_tokens for result in results])
    if (epochs > 1).any():
        yield (
            f"data repeat in {(epochs > 1).sum()} of {len(results)} cells, up to {epochs.max():.1f} epochs; laws for "
            "unique data do not apply to those"
        )
    off = [abs(result.flops / result.budget - 1) for result in results if np.isfinite(result.budget)]
    if max(off, default=0.0) > OFF_BUDGET:
        yield f"cells miss their budget by up to {100 * max(off):.1f}%, which the fits ignore"
