"""From the results of a sweep to optima, laws, gaps and a prediction, each with its interval, for a notebook to use."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws.arguments import check_draws, check_runs
from diffusionlm.scaling.laws.bootstrap import Bootstrap
from diffusionlm.scaling.laws.gap import Gap, Side, gap
from diffusionlm.scaling.laws.noise import Noise, NoiseOption, check_noise, given_noise, seed_noise
from diffusionlm.scaling.laws.objective import ObjectiveFit, fit_curves, fit_objective
from diffusionlm.scaling.laws.road_surfaces import fit_surfaces
from diffusionlm.scaling.laws.road_words import road_verdict, road_warnings
from diffusionlm.scaling.laws.roads import Roads, fit_roads
from diffusionlm.scaling.laws.shares import ROAD
from diffusionlm.scaling.laws.verdict import verdict
from diffusionlm.scaling.laws.warnings import warnings
from diffusionlm.scaling.sweep.points import LeftOut
from diffusionlm.scaling.sweep.results import CellResult

REFERENCE = "arm"  # the objective that others are compared with


@dataclass(frozen=True)
class Analysis:
    """The result of `analyse`."""

    objectives: dict[str, ObjectiveFit]  # those from scratch and the roads, by share; the reference last
    roads: Roads | None  # None without roads
    gaps: tuple[Gap, ...]
    next_budget: float | None  # FLOPs; None with a single budget
    warnings: tuple[str, ...]  # the gravest first
    verdict: str  # a sentence or two
    left_out: tuple[LeftOut, ...] = ()  # runs that no fit uses, to be shown beside the others

    def __str__(self) -> str:
        """Return the verdict and the warnings, one to a line."""
        return "\n".join([self.verdict, *self.warnings])


# The fits make thousands of BLAS calls on tiny matrices, for which threads wait longer than they compute.
@threadpool_limits.wrap(limits=1, user_api="blas")
def analyse(
    results: Sequence[CellResult],
    *,
    noise: NoiseOption = None,
    draws: int = 10_000,
    seed: int = 0,
    full: bool = True,
    note: Callable[[str], None] = lambda step: None,
) -> Analysis:
    """Fit everything that the finished cells allow, and warn about each part that they do not.

    Args:
      results: the finished cells of one sweep; those whose loss is not finite are left out, with a warning. A run that
        belongs to no budget has NaN for it, and is in the surface alone.
      noise: the standard deviation of the loss of a run, nats; "residuals": that of the losses about the fitted curves,
        which contains misfit; None: that between seeds, without which there are no intervals.
      draws: draws of the parametric bootstrap.
      seed: seed of its random numbers; the same results give the same analysis.
      full: also fit Approaches 1 and 3 of Hoffmann et al. (2203.15556), find the interval of the surface's exponent and
        rank candidates for the next cell.
      note: called with the name of each step as it begins, to show progress.

    Raises:
      UserError: there is no finished cell with a finite loss, or an argument is wrong.
    """
    check_runs(results)
    check_draws(draws)
    noise = check_noise(noise)
    finite = [result for result in results if np.isfinite(result.loss) and result.loss > 0]
    if results and not finite:
        raise UserError(f"no finished cell to report: the evaluation of none of the {len(results)} is finite")
    if not finite:
        raise UserError("no finished cell to report; run the sweep first (its status says what is missing)")
    named = list(_by_objective(finite, noise))
    fitted = {name: fit_curves(runs, of_runs) for name, runs, of_runs in named}
    surfaces = fit_surfaces(finite, next((of_runs for _, runs, of_runs in named if runs[0].arm_share), None))
    noises = {name: curves.used_noise for name, curves in fitted.items()}
    bootstrap = Bootstrap(noises | ({ROAD: surfaces.used_noise} if surfaces else {}), draws, seed)
    budgets = sorted({result.budget for result in finite if not math.isnan(result.budget)})
    next_budget = None
    if len(budgets) > 1:
        next_budget = budgets[-1] * (budgets[-1] / budgets[0]) ** (1 / (len(budgets) - 1))
    objectives = {}
    for name, curves in fitted.items():
        note(f"fitting {name}")
        objectives[name] = fit_objective(curves, bootstrap, next_budget, full)
    roads = fit_roads(surfaces, bootstrap, objectives)
    gaps = _gaps(objectives, roads)
    lines = [*road_warnings(roads), *warnings(results, objectives, gaps)]
    return Analysis(objectives, roads, gaps, next_budget, tuple(lines), _verdict(objectives, roads))


def _by_objective(
    results: Sequence[CellResult], noise: NoiseOption
) -> Iterator[tuple[str, list[CellResult], Noise | Literal["residuals"] | None]]:
    """Yield name, runs and noise of each objective: those from scratch, the roads by share, the reference last."""
    seeds = seed_noise(results) if noise is None else {}
    shares = {result.objective: result.arm_share for result in results}
    for name in sorted(shares, key=lambda name: (name == REFERENCE, shares[name], name)):
        given = given_noise(noise) if isinstance(noise, float | int) else noise
        yield name, [result for result in results if result.objective == name], given or seeds.get(name)


def _verdict(objectives: Mapping[str, ObjectiveFit], roads: Roads | None) -> str:
    from_scratch = {name: fit for name, fit in objectives.items() if not fit.arm_share}
    sentences = [road_verdict(roads)] if roads else []
    if from_scratch:
        sentences.append(verdict(from_scratch))
    return " ".join(sentences)


def _gaps(objectives: Mapping[str, ObjectiveFit], roads: Roads | None) -> tuple[Gap, ...]:
    """Compare each other objective that has an optimum with the reference, if that has a loss law that falls.

    Of the roads it is the one with the best share of each budget; each share is compared by itself if none is known.
    """
    reference = objectives.get(REFERENCE)
    if reference is None or not reference.laws or reference.laws["loss"].fit.exponent >= 0:
        return ()
    sides = {name: _side(fit) for name, fit in objectives.items()}
    best = roads.side if roads and roads.usable else None
    compared = [side for name, side in sides.items() if name != REFERENCE and not (best and objectives[name].arm_share)]
    return tuple(gap(side, sides[REFERENCE]) for side in (*compared, *([best] if best else [])) if side.optima)


def _side(fit: ObjectiveFit) -> Side:
    usable = [row.optimum for row in fit.budgets if row.optimum and row.optimum.usable]
    return Side(fit.objective, usable, fit.laws, fit.used_noise)
