"""Results of sweeps with known laws."""

from dataclasses import replace

import numpy as np

from diffusionlm.scaling.laws.isoflop_fits import parabola, vertex
from diffusionlm.scaling.laws.optima import fit_budget
from diffusionlm.scaling.laws.simulation import Truth, make_grid, simulate

TRUTHS = {
    "mdm": Truth((3e5, 0.60), (4.6, -0.060), curvature=0.08, noise=0.01),
    "arm": Truth((6e5, 0.62), (3.95, -0.060), curvature=0.07, noise=0.006),
}
# Of another slope, and less noisy.
REPORT_TRUTHS = {
    "mdm": Truth((3e5, 0.60), (4.6, -0.060), curvature=0.08, noise=0.005),
    "arm": Truth((6e5, 0.62), (3.95, -0.062), curvature=0.07, noise=0.005),
}


def simulated(seed=0, noise=None, truths=TRUTHS, **grid):
    """Return the results of one sweep; `grid` are arguments of `make_grid`."""
    if noise is not None:
        truths = {name: replace(truth, noise=noise) for name, truth in truths.items()}
    return simulate(make_grid(truths, **grid), truths, np.random.default_rng(seed))


def complete(seed=0, truths=REPORT_TRUTHS, **grid):
    """Return the results of one sweep with training curves and, for the MDM, losses by noise draw."""
    rng = np.random.default_rng(seed)
    masks = 0.02 * rng.standard_normal(8)
    results = []
    for result in simulate(make_grid(truths, **grid), truths, rng):
        c = np.geomspace(result.budget / 100, result.budget, 40)
        curve = tuple((float(x), float(result.loss * (x / result.budget) ** -0.06)) for x in c)
        if result.objective == "mdm":
            draws = tuple((result.loss + masks + 0.001 * rng.standard_normal(8)).tolist())
            result = replace(result, loss_per_draw=draws, loss_stderr=0.007)
        results.append(replace(result, curve=curve))
    return results


def select(results, objective="mdm", budget=5e13):
    """Return the runs of one objective at one budget."""
    return [r for r in results if r.objective == objective and r.budget == budget]


def moved(results, by, where):
    """Return the same results, with the losses of some runs moved."""
    return [replace(r, loss=r.loss + by) if where(r) else r for r in results]


def tilted(results, slope):
    """Return the same results, with MDM losses that rise or fall so much with the size that optima leave the grid."""
    return [replace(r, loss=r.loss + slope * np.log(r.params / 3e5)) if r.objective == "mdm" else r for r in results]


def undetermined(results):
    """Return the same results, with MDM optima inside the grid that the noise leaves open."""
    rng = np.random.default_rng(1)
    means = {
        budget: np.mean([r.loss for r in select(results, budget=budget)]) for budget in {r.budget for r in results}
    }
    return [
        replace(r, loss=means[r.budget] + 0.1 * (r.loss - means[r.budget]) + 0.02 * rng.standard_normal())
        if r.objective == "mdm"
        else r
        for r in results
    ]


def opening_downwards(results):
    """Return the same results, with MDM losses at the largest budget whose parabola has no minimum."""
    chosen = select(results)
    return [replace(r, loss=9 - r.loss) if r in chosen else r for r in results]


def loose():
    """Return a sweep with an optimum that is bounded, but not within a spacing of the grid."""
    return simulated(seed=34, truths={"mdm": replace(REPORT_TRUTHS["mdm"], noise=0.03)})


def runs_on(loss, budget=1e15, log_n=(12.0, 12.6, 13.1, 13.7, 14.0), overspent=1.0):
    """Return runs of one budget whose losses are a function of log N, and which cost 6 N D = `overspent` budgets."""
    template = simulated()[0]
    return [
        replace(
            template, budget=budget, params=n, tokens=overspent * budget / (6 * n), flops=overspent * budget, loss=y
        )
        for n, y in ((np.exp(x), loss(x)) for x in log_n)
    ]


def fit_runs(runs, drawn=None):
    """Return the fit of the runs of one budget by a parabola, of which `drawn` are (draws, 3) coefficients."""
    plain = parabola(np.log([run.params for run in runs]), [run.loss for run in runs])
    minima = None
    if drawn is not None:
        u, loss = vertex(drawn)
        minima = plain.centre + u, loss
    return fit_budget(runs, plain, plain, minima, None)
