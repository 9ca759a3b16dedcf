"""Results of a sweep to optima, laws, gap and prediction, each with its interval: numbers that a notebook can use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import checks, design, envelope, misfit, parametric, power_laws, uncertainty
from diffusionlm.scaling.laws.fit import parabola
from diffusionlm.scaling.laws.optima import BudgetFit, optimum
from diffusionlm.scaling.laws.uncertainty import Bootstrap, Noise
from diffusionlm.scaling.sweep.results import CellResult

REFITS = 20  # of Approach 3, for its standard errors, which are then good to a sixth
REFERENCE = "arm"  # what other objectives are compared with


@dataclass(frozen=True)
class ObjectiveFit:
    """All that is known about one objective; a part that its cells do not allow is None or empty."""

    objective: str
    noise: Noise | None
    common_error: float  # standard error that the noise of the masks adds to all losses alike, nats
    budgets: tuple[BudgetFit, ...]
    asymmetry: misfit.Asymmetry | None
    laws: dict[str, power_laws.Law]  # by optima.QUANTITIES
    prediction: power_laws.Prediction | None
    candidates: tuple[design.Candidate, ...]  # for the next cell, the one that teaches most first, if there are laws
    envelope: envelope.Envelope | None  # Approach 1
    parametric: parametric.Parametric | None  # Approach 3


@dataclass(frozen=True)
class Analysis:
    """What `analyse` returns."""

    objectives: dict[str, ObjectiveFit]  # the reference last
    gaps: tuple[power_laws.Gap, ...]
    next_budget: float | None  # FLOPs; None with a single budget
    warnings: tuple[str, ...]  # the gravest first
    verdict: str  # one sentence


def analyse(
    results: Sequence[CellResult],
    *,
    draws: int = 10_000,
    seed: int = 0,
    full: bool = True,
    note: Callable[[str], None] = lambda what: None,
) -> Analysis:
    """Fits everything that the finished cells allow; what they do not allow is missing, with a warning for each.

    Args:
      results: of one sweep; cells whose loss is not finite are left out, with a warning.
      draws: of the parametric bootstrap.
      seed: of its random numbers, so that the same results give the same report.
      full: also fit Approaches 1 and 3 of Hoffmann et al. (2203.15556) and rank candidates for the next cell.
      note: is called with what begins, for progress.

    Raises:
      UserError: there is no finished cell with a finite loss.
    """
    finite = [result for result in results if np.isfinite(result.loss) and result.loss > 0]
    if not finite:
        raise UserError("no finished cell to report; run the sweep first (its status says what is missing)")
    noises = uncertainty.seed_noise(finite)
    bootstrap = Bootstrap(noises, draws, seed)
    budgets = sorted({result.budget for result in finite})
    next_budget = None
    if len(budgets) > 1:
        next_budget = budgets[-1] * (budgets[-1] / budgets[0]) ** (1 / (len(budgets) - 1))
    objectives = {}
    for name, noise in sorted(noises.items(), key=lambda item: (item[0] == REFERENCE, item[0])):
        note(f"fitting {name}")
        own = [result for result in finite if result.objective == name]
        objectives[name] = _objective(name, own, noise, bootstrap, next_budget, full)
    gaps = _gaps(objectives)
    warnings = tuple(checks.warnings(results, objectives, gaps))
    return Analysis(objectives, gaps, next_budget, warnings, checks.verdict(objectives))


def _objective(
    name: str,
    results: Sequence[CellResult],
    noise: Noise | None,
    bootstrap: Bootstrap,
    next_budget: float | None,
    full: bool,
) -> ObjectiveFit:
    budgets = sorted({result.budget for result in results})
    groups = {b: sorted((r for r in results if r.budget == b), key=lambda r: (r.params, r.seed)) for b in budgets}
    fits = {
        budget: parabola(np.log([run.params for run in runs]), [run.loss for run in runs])
        for budget, runs in groups.items()
        if len({run.params for run in runs}) >= 3
    }
    common = uncertainty.common_error(results)
    drawn = {}
    if noise and fits:
        coefficients = bootstrap.coefficients(name, list(fits.values()), common)
        drawn = {budget: coefficients[:, i] for i, budget in enumerate(fits)}
    rows = [optimum(name, b, runs, fits.get(b), drawn.get(b), noise) for b, runs in groups.items()]
    rows, asymmetry = _with_shifts(rows, noise)
    used = [row for row in rows if row.usable]
    laws = power_laws.laws(used, noise)
    predicted = laws and next_budget
    candidates: tuple[design.Candidate, ...] = ()
    if full:
        candidates = design.candidates(used, laws, next_budget) if predicted else ()
        if not laws:
            candidates = design.towards_optima(rows, next_budget)
    curves = [(run.params, run.curve) for run in results if len(run.curve) > 1]
    return ObjectiveFit(
        name,
        noise,
        common[0],
        tuple(rows),
        asymmetry,
        laws,
        power_laws.predict(used, laws, bootstrap, next_budget, noise) if predicted else None,
        candidates,
        envelope.envelope(curves, budgets[0], budgets[-1]) if full else None,
        _surface(results, noise) if full else None,
    )


def _surface(results: Sequence[CellResult], noise: Noise | None) -> parametric.Parametric | None:
    # L-BFGS makes some 100,000 calls of BLAS on tiny matrices; threads that share them wait for each other on a busy
    # machine, 20 s to 60 s for a second of work. And of data without such a surface it may diverge.
    with threadpool_limits(limits=1, user_api="blas"), np.errstate(all="ignore"):
        return parametric.fit(results, noise.sd if noise else None, REFITS)


def _with_shifts(rows: Sequence[BudgetFit], noise: Noise | None) -> tuple[list[BudgetFit], misfit.Asymmetry | None]:
    """The rows with the bias of each that a common cubic term would mean, and that term."""
    convex = [row for row in rows if row.params]
    found = misfit.asymmetry([r.parabola for r in convex], [r.log_n for r in convex], [r.losses for r in convex], noise)
    if found is None:
        return list(rows), None
    shifts = {r.budget: pair for r, *pair in zip(convex, found.shift_log_n, found.shift_loss, strict=True)}
    return [
        replace(row, shift_log_n=shifts[row.budget][0], shift_loss=shifts[row.budget][1]) if row.params else row
        for row in rows
    ], found


def _gaps(objectives: dict[str, ObjectiveFit]) -> tuple[power_laws.Gap, ...]:
    """Each other objective that has an optimum against the reference, if that has a loss law that falls."""
    reference = objectives.get(REFERENCE)
    if reference is None or not reference.laws or reference.laws["loss"].fit.exponent >= 0:
        return ()
    others = {name: o for name, o in objectives.items() if name != REFERENCE and any(row.usable for row in o.budgets)}
    return tuple(
        power_laws.gap(
            name,
            REFERENCE,
            tuple([row for row in o.budgets if row.usable] for o in (other, reference)),
            (other.laws, reference.laws),
            (other.noise, reference.noise),
        )
        for name, other in others.items()
    )
