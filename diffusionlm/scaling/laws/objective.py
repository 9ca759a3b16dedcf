"""The fits of one training objective."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import threadpool_limits

from diffusionlm.scaling.laws import next_cells, parametric, power_laws
from diffusionlm.scaling.laws.bootstrap import Bootstrap
from diffusionlm.scaling.laws.envelope import Envelope, envelope
from diffusionlm.scaling.laws.isoflop_fits import parabola
from diffusionlm.scaling.laws.misfit import Asymmetry, asymmetry
from diffusionlm.scaling.laws.noise import Noise, common_error
from diffusionlm.scaling.laws.optima import BudgetFit, fit_budget
from diffusionlm.scaling.sweep.results import CellResult

REFITS = 20  # of Approach 3, for its standard errors, which are then known to a sixth


@dataclass(frozen=True)
class ObjectiveFit:
    """The fits of one objective, or of one road; a part that its cells do not allow is None or empty."""

    objective: str
    noise: Noise | None
    common_error: float  # standard error that the noise of the masks adds to all losses alike, nats
    runs: tuple[CellResult, ...]  # all of them; those without a budget are in the parametric law alone
    budgets: tuple[BudgetFit, ...]
    asymmetry: Asymmetry | None
    laws: dict[str, power_laws.Law]  # by optima.QUANTITIES
    prediction: power_laws.Prediction | None
    candidates: tuple[next_cells.Candidate, ...]  # for the next cell; with laws, the most informative first
    envelope: Envelope | None  # Approach 1
    parametric: parametric.Parametric | None  # Approach 3

    @property
    def arm_share(self) -> float:
        """The share of the steps that are autoregressive at first; 0 for an objective from scratch."""
        return self.runs[0].arm_share


def fit_objective(
    results: Sequence[CellResult], noise: Noise | None, bootstrap: Bootstrap, next_budget: float | None, full: bool
) -> ObjectiveFit:
    """Fit everything that the finished cells of one objective allow.

    Args:
      results: the runs of one objective; Approach 3 alone uses those whose budget is NaN, which belong to none.
      noise: the noise between seeds, if it is known.
      bootstrap: the draws that all objectives share.
      next_budget: the budget to predict, FLOPs; None with a single budget.
      full: also fit Approaches 1 and 3, and rank candidates for the next cell.
    """
    objective, common = results[0].objective, common_error(results)
    # The training loss of a road is not one quantity, and Approach 3 knows no share.
    checked = full and not results[0].arm_share
    on_budget = [run for run in results if np.isfinite(run.budget)]
    fits, bias = _with_shifts(_fit_budgets(on_budget, noise, bootstrap), noise)
    usable = [fit.optimum for fit in fits if fit.optimum and fit.optimum.usable]
    laws = power_laws.laws(usable, noise)
    prediction = None
    if laws and next_budget:
        prediction = power_laws.predict(usable, laws, bootstrap, next_budget, noise)
    candidates: tuple[next_cells.Candidate, ...] = ()
    if full and not laws:
        candidates = next_cells.towards_optima(fits, next_budget)
    elif full and next_budget:
        candidates = next_cells.candidates(usable, laws, next_budget)
    curves = [(run.params, run.curve) for run in on_budget if len(run.curve) > 1]
    return ObjectiveFit(
        objective,
        noise,
        common.stderr,
        tuple(results),
        tuple(fits),
        bias,
        laws,
        prediction,
        candidates,
        envelope(curves, fits[0].budget, fits[-1].budget) if checked and fits else None,
        _surface(results, noise) if checked else None,
    )


def _fit_budgets(results: Sequence[CellResult], noise: Noise | None, bootstrap: Bootstrap) -> list[BudgetFit]:
    """Fit a parabola at each budget of one objective that has three sizes."""
    budgets = sorted({result.budget for result in results})
    runs = {b: sorted((r for r in results if r.budget == b), key=lambda r: (r.params, r.seed)) for b in budgets}
    parabolas = {
        budget: parabola(np.log([run.params for run in group]), [run.loss for run in group])
        for budget, group in runs.items()
        if len({run.params for run in group}) >= 3
    }
    drawn = {}
    if noise and parabolas:
        coefficients = bootstrap.coefficients(results[0].objective, list(parabolas.values()), common_error(results))
        drawn = {budget: coefficients[:, i] for i, budget in enumerate(parabolas)}
    return [fit_budget(group, parabolas.get(b), drawn.get(b), noise) for b, group in runs.items()]


def _surface(results: Sequence[CellResult], noise: Noise | None) -> parametric.Parametric | None:
    # The fit makes thousands of BLAS calls on tiny matrices, for which threads on a busy machine wait longer than they
    # compute. It may diverge on losses that have no such surface.
    with threadpool_limits(limits=1, user_api="blas"), np.errstate(all="ignore"):
        return parametric.fit(results, noise.sd if noise else None, REFITS)


def _with_shifts(fits: Sequence[BudgetFit], noise: Noise | None) -> tuple[list[BudgetFit], Asymmetry | None]:
    """Return the fits with the biases that a cubic term common to them would mean, and that term."""
    optima = [fit.optimum for fit in fits if fit.optimum]
    bias = asymmetry([o.parabola for o in optima], [o.log_n for o in optima], [o.losses for o in optima], noise)
    if bias is None:
        return list(fits), None
    shifts = {o.budget: pair for o, *pair in zip(optima, bias.shift_log_n, bias.shift_loss, strict=True)}
    return [
        replace(fit, optimum=replace(fit.optimum, shift_log_n=shifts[fit.budget][0], shift_loss=shifts[fit.budget][1]))
        if fit.optimum
        else fit
        for fit in fits
    ], bias
