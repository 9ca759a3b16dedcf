"""What a reader must know before the numbers of a report: a line for each thing that is missing or to be distrusted."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy import stats

from diffusionlm.scaling import uncertainty
from diffusionlm.scaling.results import CellResult

SUSPICIOUS = 0.05  # p value below which a misfit is named
DISAGREE = 0.01  # p value below which the seeds of one cell scatter more than those of the others
LOUD = 0.25  # share of the effect over sizes that the noise of a seed may have
OFF_BUDGET = 0.02  # share of the budget that a cell may miss it by


def warnings(results: Sequence[CellResult], objectives: Mapping, gaps: Sequence) -> Iterator[str]:
    """All warnings, the gravest first.

    Args:
      results: all finished cells, those that were left out too.
      objectives: `analysis.ObjectiveFit` by name.
      gaps: as in `analysis.Analysis`.
    """
    lost = [result.id for result in results if not (np.isfinite(result.loss) and result.loss > 0)]
    if lost:
        yield f"left out for want of a finite loss: {', '.join(lost)}"
    for fit in objectives.values():
        yield from _missing(fit)
    if len(objectives) < 2:
        yield f"only the objective {next(iter(objectives))} has finished cells, so there is no gap between objectives"
    elif not gaps:
        yield "no gap between objectives: it needs a falling loss law for arm and for one other objective"
    for gap in gaps:
        if not any(inside for *_, inside in gap.at_budgets):
            yield (
                f"the gap between {gap.objective} and {gap.reference} is larger than the range of budgets, so that one "
                "of the two loss laws is extrapolated wherever it is evaluated"
            )
    for fit in objectives.values():
        yield from _optima(fit)
        yield from _misfits(fit)
        yield from _seeds(fit)
        yield from _evaluation(fit)
    yield from _data(results)
    ratio = uncertainty.variance_ratio([result for result in results if np.isfinite(result.loss)])
    if ratio and ratio[1] < SUSPICIOUS:
        yield (
            f"seeds scatter {np.sqrt(ratio[0]):.1f} times more in one objective than in the other (F test, "
            f"p = {ratio[1]:.2g}); each has its own noise in the intervals"
        )


def _missing(fit) -> Iterator[str]:
    name = fit.objective
    if fit.noise is None:
        yield (
            f"{name}: no intervals, because the noise is unknown: it takes {uncertainty.MIN_SEEDS} seeds in at least "
            f"{uncertainty.MIN_REPEATED} cells"
        )
    elif fit.noise.pooled:
        yield f"{name}: too few repeated seeds of its own; its intervals use the noise of all objectives together"
    for row in fit.budgets:
        where = f"{name} at {row.budget:.3g} FLOPs"
        if row.parabola is None:
            yield f"{where}: {row.sizes} sizes have finished, a parabola needs 3; it has no optimum"
        elif not row.parabola.convex:
            yield f"{where}: the parabola opens downwards, so these sizes show no optimum"
    used = [row for row in fit.budgets if row.usable]
    if not fit.laws:
        yield f"{name}: no power laws and no prediction: {len(used)} budgets have a usable optimum, a law needs 2"
    elif len(used) == 2:
        yield f"{name}: the laws go through two budgets only, so nothing shows whether they are straight lines"
    elif len(used) < len(fit.budgets):
        yield f"{name}: the laws go through {len(used)} of {len(fit.budgets)} budgets"


def _optima(fit) -> Iterator[str]:
    for row in fit.budgets:
        if row.params is None:
            continue
        where = f"{fit.objective} at {row.budget:.3g} FLOPs"
        sizes = np.exp([row.log_n.min(), row.log_n.max()])
        if not row.inside:
            side = "smaller" if row.params.value < sizes[0] else "larger"
            yield f"{where}: N* = {row.params.value:.3g} is outside the grid; it is in no law; run {side} sizes"
        elif row.params.low is not None and not row.params.bounded:
            yield f"{where}: the curvature is not significant, so N* is not determined; it is in no law"
        elif row.at_edge:
            yield f"{where}: N* = {row.params.value:.3g} is in the last interval of the grid; add sizes beyond"
        elif row.params.low is not None and not sizes[0] <= row.params.low <= row.params.high <= sizes[1]:
            yield f"{where}: the interval of N* reaches beyond the grid"


def _misfits(fit) -> Iterator[str]:
    for row in fit.budgets:
        if row.lack_of_fit and row.lack_of_fit.p is not None and row.lack_of_fit.p < SUSPICIOUS:
            yield (
                f"{fit.objective} at {row.budget:.3g} FLOPs: losses leave the parabola by {row.lack_of_fit.sd:.3g} "
                f"nats beyond the noise (p = {row.lack_of_fit.p:.2g}), which no interval contains"
            )
    if fit.asymmetry and fit.asymmetry.p is not None and fit.asymmetry.p < SUSPICIOUS:
        factors = np.exp(np.abs([s for s in fit.asymmetry.shift_log_n if np.isfinite(s)]))
        moved = f"moves N* by up to a factor of {factors.max():.2f}" if len(factors) else "leaves no optimum"
        yield (
            f"{fit.objective}: the curves are not symmetric in log N (p = {fit.asymmetry.p:.2g}); a cubic term "
            f"{moved}: see the bias columns"
        )
    for key, law in fit.laws.items():
        if law.lack_of_fit and law.lack_of_fit.p is not None and law.lack_of_fit.p < SUSPICIOUS:
            yield (
                f"{fit.objective}: the optima leave the power law of {SYMBOLS[key]} by {100 * law.lack_of_fit.sd:.2g}% "
                f"beyond the noise (p = {law.lack_of_fit.p:.2g}); extrapolating it is less certain than its interval"
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
