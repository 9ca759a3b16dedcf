"""The fits of one training objective."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from diffusionlm.scaling.laws import next_cells, parametric, power_laws
from diffusionlm.scaling.laws.bootstrap import Bootstrap, Estimate
from diffusionlm.scaling.laws.curves import Curve, Points, Shape, curve, fit_shape
from diffusionlm.scaling.laws.diagnostics import SYMBOLS, budget_count
from diffusionlm.scaling.laws.envelope import Envelope, envelope
from diffusionlm.scaling.laws.isoflop_fits import parabola
from diffusionlm.scaling.laws.misfit import widened
from diffusionlm.scaling.laws.noise import RESIDUALS, Noise, by_cell, common_error, residual_noise
from diffusionlm.scaling.laws.optima import BudgetFit, fit_budget
from diffusionlm.scaling.laws.surface_fit import SurfaceFit, fit_surface
from diffusionlm.scaling.laws.suspects import Suspect, outliers, without
from diffusionlm.scaling.sweep.results import CellResult

FAR = 10.0  # the factor of N beyond which a run is in no curve
# By how much suspected cells must move an exponent for a law to hang on them where it has no interval: published ones
# of N* and D* differ by more, and of L* it is a tenth of the usual 0.05.
MOVED = {"params": 0.02, "tokens": 0.02, "loss": 0.005}
REFITS = 20  # of Approach 3, for its standard errors, which are then known to a sixth


@dataclass(frozen=True)
class ObjectiveFit:
    """The fits of one objective, or of one road; a part that its cells do not allow is None or empty."""

    objective: str
    arm_share: float  # the share of the steps that are autoregressive at first; 0 for an objective from scratch
    noise: Noise | None  # of a run, as measured or given
    used_noise: Noise | None  # what intervals use: the scatter about the curves if these do not fit within the noise
    common_error: float  # standard error that the noise of the masks adds to all losses alike, nats
    budgets: tuple[BudgetFit, ...]
    shape: Shape | None  # of the curves; None without a budget that has three sizes
    laws: dict[str, power_laws.Law]  # by optima.QUANTITIES
    prediction: power_laws.Prediction | None
    candidates: tuple[next_cells.Candidate, ...]  # for the next cell; with laws, the most informative first
    envelope: Envelope | None  # Approach 1
    parametric: parametric.Parametric | None  # Approach 3
    surface: SurfaceFit | None  # the surface by variable projection; without the interval of its exponent if not `full`
    runs: tuple[CellResult, ...]  # all runs; those without a budget are in the surfaces alone
    suspects: tuple[Suspect, ...] = ()  # cells that seem to have gone wrong
    without_suspects: "ObjectiveFit | None" = None  # the same fits without them; None where there are none
    unnamed: int = 0  # about how many cells are far off the surface, where they are too many to be suspected

    def __str__(self) -> str:
        """Return the runs and the laws in one line."""
        counts = f"{self.objective}: {len(self.runs)} runs at {budget_count(len(self.budgets))}"
        laws = [f"{SYMBOLS[key]} ~ C^{_plain(law.exponent)}" for key, law in self.laws.items()]
        return f"{counts}, {', '.join(laws) or 'no laws'}{', which hang on suspected cells' if self.hanging else ''}"

    @property
    def hanging(self) -> bool:
        """True if the laws hang on suspected cells, so that none is to be quoted."""
        return bool(self.moved)

    @property
    def moved(self) -> tuple[str, ...]:
        """The quantities whose law is another one without the suspected cells, by more than is quoted.

        The exponent with or without them is outside of the interval of the other. Where no noise is known and there is
        no interval, they differ by more than `MOVED`, and one of the cells is in a curve. Or there is no law without
        them.
        """
        other = self.without_suspects
        if not self.laws or other is None:
            return ()
        in_curve = any(map(self.in_laws, self.suspects))
        return tuple(
            k for k, law in self.laws.items() if k not in other.laws or _leaves(k, law, other.laws[k], in_curve)
        )

    @property
    def hidden(self) -> frozenset[float]:
        """The budgets whose optimum can be used without the suspected cells alone: their scatter is in its error."""
        if self.without_suspects is None:
            return frozenset()
        usable = {row.budget for row in self.budgets if row.usable}
        return frozenset(row.budget for row in self.without_suspects.budgets if row.usable) - usable

    @property
    def widened(self) -> bool:
        """True if intervals use the scatter about the curves, which the noise does not explain."""
        return bool(self.noise and self.used_noise and self.used_noise.source == "curves")

    @property
    def blamed(self) -> tuple[Suspect, ...]:
        """The suspected cells of laws, or all where none of them is of a law but in the scatter of one."""
        return tuple(filter(self.in_laws, self.suspects)) or self.suspects

    def in_laws(self, suspect: Suspect) -> bool:
        """Return True if a suspected cell is in a curve of the laws, or of those without suspected cells."""
        other = self.without_suspects
        used = {row.budget for fit in (self, other) if fit for row in fit.budgets if row.usable}
        near = {(run.budget, run.params, run.tokens) for row in self.budgets for run in row.runs}
        return suspect.budget in used and (suspect.budget, suspect.params, suspect.tokens) in near


def _plain(estimate: Estimate) -> str:
    ends = [f"{end:.3g}" for end in estimate.interval or ()]
    return f"{estimate.value:.3g}{f' [{ends[0]}, {ends[1]}]' if ends else ''}"


def _leaves(key: str, law: power_laws.Law, other: power_laws.Law, in_curve: bool) -> bool:
    """Return True if an exponent is outside of the interval of another law's, or far from it where it has none."""
    if law.exponent.interval is None:
        return in_curve and abs(other.exponent.value - law.exponent.value) > MOVED[key]
    return law.exponent.excludes(other.exponent.value) or other.exponent.excludes(law.exponent.value)


@dataclass(frozen=True)
class Curves:
    """The runs of one objective by budget, with the curves through them."""

    runs: tuple[CellResult, ...]
    budgets: tuple[tuple[CellResult, ...], ...]  # the runs of each budget near its best size, by size and seed
    distant: tuple[tuple[CellResult, ...], ...]  # the others of each, which are in no curve
    shape: Shape | None  # None without a budget that has three sizes
    points: tuple[Points, ...]  # of the budgets with three sizes
    fits: tuple[Curve, ...]  # of the same
    noise: Noise | None
    used_noise: Noise | None


def fit_curves(results: Sequence[CellResult], noise: Noise | Literal["residuals"] | None) -> Curves:
    """Fit the curves of one objective, and decide which noise its intervals use.

    Args:
      results: the runs of one objective; the budget of one that belongs to none is NaN.
      noise: the noise of a run; "residuals": the scatter about the curves.
    """
    budgets = sorted({result.budget for result in results if not math.isnan(result.budget)})
    pairs = [near_best([result for result in results if result.budget == budget]) for budget in budgets]
    groups, distant = [near for near, _ in pairs], tuple(far for _, far in pairs)
    points = [
        Points(np.log([run.params for run in group]), np.array([run.loss for run in group]))
        for group in groups
        if len({run.params for run in group}) >= 3
    ]
    log_n = [at.log_n for at in points]
    shape, fits = _fit_points(points, noise)
    if noise == "residuals":
        noise = residual_noise(shape) if shape else _scatter_about_surface(results)
    used = noise
    if not results[0].arm_share:  # the roads of a sweep share one noise
        used = widened(noise, fits, log_n, shape)
        if used != noise:
            shape, fits = _fit_points(points, noise, misfit=True)
            used = widened(noise, fits, log_n, shape)
    return Curves(tuple(results), tuple(groups), distant, shape, tuple(points), tuple(fits), noise, used)


def _fit_points(
    points: Sequence[Points], noise: Noise | Literal["residuals"] | None, *, misfit: bool = False
) -> tuple[Shape | None, list[Curve]]:
    """Fit the shape of the curves of one objective, and the curves; nothing without a budget that has three sizes."""
    if not points:
        return None, []
    shape = fit_shape(points, noise.sd if isinstance(noise, Noise) else None, misfit=misfit)
    return shape, [curve(at, shape.alpha, shape.beta) for at in points]


def _scatter_about_surface(results: Sequence[CellResult]) -> Noise | None:
    """Return the noise of runs that belong to no budget: their scatter about the surface, which contains its misfit."""
    surface = fit_surface(results, profile=False)
    return Noise(surface.scatter, surface.dof, 1, False, RESIDUALS) if surface and surface.scatter else None


def near_best(runs: Sequence[CellResult]) -> tuple[tuple[CellResult, ...], tuple[CellResult, ...]]:
    """Return the runs of one budget within a factor `FAR` of the best measured size, and the others.

    A curve is meant for the surroundings of its minimum, and the losses of far too small or large models would bend it.
    All runs are near where fewer than five sizes are. Both parts are sorted by size and seed.
    """
    means = {cell[0].params: float(np.mean([run.loss for run in cell])) for cell in by_cell(runs).values()}
    best = min(means, key=lambda params: means[params])
    near = {params for params in means if abs(math.log(params / best)) <= math.log(FAR) + 1e-9}
    kept = near if len(near) >= 5 else means.keys()
    ordered = sorted(runs, key=lambda run: (run.params, run.seed))
    return tuple(r for r in ordered if r.params in kept), tuple(r for r in ordered if r.params not in kept)


def fit_objective(curves: Curves, bootstrap: Bootstrap, next_budget: float | None, full: bool) -> ObjectiveFit:
    """Fit everything that the finished cells of one objective allow, with and without suspected cells.

    Args:
      curves: the runs of one objective with their curves.
      bootstrap: the draws that all objectives share.
      next_budget: the budget to predict, FLOPs; None with a single budget.
      full: also fit Approaches 1 and 3, and rank candidates for the next cell.
    """
    fit = _fit(curves, bootstrap, next_budget, full)
    if fit.arm_share:  # no surface knows the share, and what to run next is asked for the best one
        return replace(fit, candidates=())
    far = outliers(curves.runs, curves.noise)
    if far.unnamed and not fit.laws:  # the best of losses that are wrong points nowhere
        return replace(fit, unnamed=far.unnamed, candidates=())
    if not far.suspects:
        return replace(fit, unnamed=far.unnamed)
    noise = curves.noise
    # The scatter about the curves is taken again, since the suspects are a part of it.
    again = RESIDUALS if noise and noise.source == RESIDUALS else noise
    others = fit_curves(without(curves.runs, far.suspects), again)
    draws = Bootstrap({fit.objective: others.used_noise}, bootstrap.size, seed=0)  # of a noise without the suspects
    fit = replace(fit, suspects=far.suspects, without_suspects=_fit(others, draws, next_budget, full=False))
    return replace(fit, candidates=_suspects_first(fit, next_budget)) if full else fit


def _suspects_first(fit: ObjectiveFit, next_budget: float | None) -> tuple[next_cells.Candidate, ...]:
    """Return the candidates for the next cell, with the suspected cells in place of what they spoil.

    Where laws hang on them, nothing that trusts the laws is a candidate; where they hide optima, more seeds of other
    cells of these budgets are none.
    """
    if not fit.hanging and not fit.hidden:
        return fit.candidates
    again = next_cells.repeats(fit.blamed, fit.objective, next_budget)
    others = () if fit.hanging else tuple(c for c in fit.candidates if c.budget not in fit.hidden)
    return (*again, *others)


def _fit(curves: Curves, bootstrap: Bootstrap, next_budget: float | None, full: bool) -> ObjectiveFit:
    """Fit everything that the cells of one objective allow."""
    results, noise = curves.runs, curves.used_noise
    objective, common = results[0].objective, common_error(results)
    # The training loss of a road is not one quantity, and no surface knows its share.
    checked = full and not results[0].arm_share
    fits = _fit_budgets(curves, bootstrap)
    usable = [fit.optimum for fit in fits if fit.optimum and fit.optimum.usable]
    laws = power_laws.laws(usable, noise, bootstrap)
    prediction = None
    if laws and next_budget:
        prediction = power_laws.predict(usable, laws, bootstrap, next_budget, noise)
    candidates: tuple[next_cells.Candidate, ...] = ()
    if full and not laws:
        candidates = next_cells.towards_optima(fits, next_budget)
    elif full and next_budget:
        candidates = next_cells.candidates(usable, laws, next_budget, noise)
    lines = [(run.params, run.curve) for run in results if len(run.curve) > 1]
    return ObjectiveFit(
        objective=objective,
        arm_share=results[0].arm_share,
        noise=curves.noise,
        used_noise=noise,
        common_error=common.stderr,
        budgets=tuple(fits),
        shape=curves.shape,
        laws=laws,
        prediction=prediction,
        candidates=candidates,
        envelope=envelope(lines, fits[0].budget, fits[-1].budget) if checked and fits else None,
        parametric=_parametric(results, curves.noise) if checked else None,
        surface=None if results[0].arm_share else fit_surface(results, curves.noise, profile=full),
        runs=results,
    )


def _fit_budgets(curves: Curves, bootstrap: Bootstrap) -> list[BudgetFit]:
    """Read the optimum of each budget of one objective off its curve."""
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    if curves.used_noise and curves.shape:
        common = common_error(curves.runs)
        log_n, loss = bootstrap.curves(curves.runs[0].objective, curves.shape, curves.points, common)
        drawn = list(zip(log_n.T, loss.T, strict=True))
    fits, i = [], 0
    for group, distant in zip(curves.budgets, curves.distant, strict=True):
        if len({run.params for run in group}) < 3:
            fit = fit_budget(group, None, None, None, None)
        else:
            plain = parabola(curves.points[i].log_n, curves.points[i].loss)
            fit = fit_budget(group, plain, curves.fits[i], drawn[i] if drawn else None, curves.noise)
            i += 1
        fits.append(replace(fit, distant=distant))
    return fits


def _parametric(results: Sequence[CellResult], noise: Noise | None) -> parametric.Parametric | None:
    with np.errstate(all="ignore"):  # it may diverge on losses that have no such surface
        return parametric.fit(results, noise.sd if noise else None, REFITS)
