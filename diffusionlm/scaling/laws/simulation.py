"""Simulated sweeps with known laws, which show whether the intervals of a report hold on a given grid.

The grid is that of a real sweep or of a planned one. Losses are curves in log N whose minima follow power laws, plus
normal noise. They may be misfits of two kinds: curves that are no parabolas, and minima that scatter about their laws.

No command calls this module. It is for people who check the intervals of their own sweep, as docs/scaling_fits.md
shows, and for the tests of the statistics.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusionlm.scaling.laws.analysis import Analysis, analyse
from diffusionlm.scaling.laws.bootstrap import Estimate
from diffusionlm.scaling.laws.gap import Gap
from diffusionlm.scaling.laws.noise import NoiseOption
from diffusionlm.scaling.laws.optima import QUANTITIES
from diffusionlm.scaling.sweep.results import CellResult

BEYOND = 10.0  # times the largest budget, where laws are compared with the truth


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    objective: str
    budget: float
    params: int
    seed: int


@dataclass(frozen=True)
class Truth:
    """The true laws of an objective, as (value at 1e13 FLOPs, exponent), its curvature and its noise."""

    params: tuple[float, float]
    loss: tuple[float, float]
    curvature: float  # nats per squared unit of log N, half of the second derivative at the minimum
    noise: float  # standard deviation between seeds, nats
    shape: tuple[float, float] | None = None  # alpha and beta of the curves (`curves`); None: parabolas
    scatter: tuple[float, float] = (0.0, 0.0)  # standard deviations of the random effects of log N* and log L*

    def log_at(self, quantity: str, c: float) -> float:
        """Return the natural logarithm of one of `optima.QUANTITIES` at C."""
        if quantity == "tokens":
            return float(np.log(c / 6) - self.log_at("params", c))
        value, exponent = getattr(self, quantity)
        return float(np.log(value) + exponent * np.log(c / 1e13))

    def rise(self, offset: float) -> float:
        """Return the loss minus that at the minimum, `offset` in log N from it, nats."""
        if self.shape is None:
            return self.curvature * offset**2
        alpha, beta = self.shape
        total = np.expm1(-alpha * offset) / alpha + np.expm1(beta * offset) / beta
        return float(self.curvature * 2 / (alpha + beta) * total)


def grid_of(results: Sequence[CellResult]) -> list[Cell]:
    """Return the grid of a real sweep."""
    return [Cell(result.objective, result.budget, result.params, result.seed) for result in results]


def truths_of(analysis: Analysis) -> dict[str, Truth]:
    """Return the laws, mean curvature and noise of a real sweep, for the objectives that have all of them."""
    truths = {}
    for name, fit in analysis.objectives.items():
        curvatures = [row.optimum.curve.curvature for row in fit.budgets if row.optimum and row.usable]
        if fit.laws and fit.noise:
            params, loss = ((fit.laws[key].at(1e13).value, fit.laws[key].fit.exponent) for key in ("params", "loss"))
            truths[name] = Truth(params, loss, float(np.mean(curvatures)), fit.noise.sd)
    return truths


def make_grid(
    truths: Mapping[str, Truth],
    budgets: Sequence[float] = (1.6e12, 5e12, 1.6e13, 5e13),
    sizes: int = 5,
    spacing: float = 1.8,
    off_centre: float = 0.2,
    repeated: int = 1,
    drift: float = 1.0,
) -> list[Cell]:
    """Return a grid around the optima, with three seeds in some cells of the two smallest budgets and one elsewhere.

    Args:
      truths: the truth by objective.
      budgets: FLOPs.
      sizes: the number of sizes at each budget.
      spacing: the ratio of neighbouring sizes.
      off_centre: the distance of the middle of the sizes from the optimum, in spacings, up and down by turns.
      repeated: the number of cells with three seeds in each of the two smallest budgets.
      drift: the factor by which the middle lies below the optimum at the largest budget, and gradually less before.
    """
    cells = []
    for objective, truth in truths.items():
        for i, budget in enumerate(budgets):
            middle = truth.log_at("params", budget) + off_centre * np.log(spacing) * (-1) ** i
            middle -= np.log(drift) * i / max(len(budgets) - 1, 1)
            offsets = np.arange(sizes) - (sizes - 1) / 2
            first = (sizes - repeated) // 2
            for j, log_n in enumerate(middle + offsets * np.log(spacing)):
                seeds = 3 if i < 2 and first <= j < first + repeated else 1
                cells += [Cell(objective, budget, round(np.exp(log_n)), seed) for seed in range(seeds)]
    return cells


def simulate(grid: Sequence[Cell], truths: Mapping[str, Truth], rng: np.random.Generator) -> list[CellResult]:
    """Return the results of one simulated sweep on a grid."""
    results = []
    effects = rng.spawn(1)[0]  # the noise of the runs does not depend on them
    moved = {key: effects.standard_normal(2) for key in dict.fromkeys((cell.objective, cell.budget) for cell in grid)}
    for cell in grid:
        truth = truths[cell.objective]
        of_params, of_loss = moved[cell.objective, cell.budget] * truth.scatter
        offset = np.log(cell.params) - truth.log_at("params", cell.budget) - of_params
        loss = np.exp(truth.log_at("loss", cell.budget) + of_loss) + truth.rise(offset)
        loss += truth.noise * rng.standard_normal()
        tokens = round(cell.budget / (6 * cell.params))
        results.append(
            CellResult(
                id=f"{cell.objective}-{cell.budget:.3g}-{cell.params}-{cell.seed}",
                objective=cell.objective,
                preset=f"n{cell.params}",
                seed=cell.seed,
                budget=cell.budget,
                flops=6.0 * cell.params * tokens,
                params=cell.params,
                params_non_embedding=cell.params,
                tokens=tokens,
                unique_tokens=max(tokens, 10**12),
                steps=1000,
                loss=float(loss),
                loss_stderr=0.0,
                loss_per_draw=(),
                bits_per_byte=float(loss) / np.log(2) / 4,
                curve=(),
            )
        )
    return results


def coverage(
    grid: Sequence[Cell],
    truths: Mapping[str, Truth],
    replicates: int,
    *,
    draws: int = 2000,
    seed: int = 0,
    noise: NoiseOption = None,
) -> dict[str, tuple[float, int]]:
    """Measure how often the 95% intervals contain the truth.

    Args:
      grid: the grid of the sweeps.
      truths: the truth by objective.
      replicates: the number of simulated sweeps.
      draws: draws of the bootstrap of each; quantiles from fewer are rougher, but not biased.
      seed: the seed of everything.
      noise: as `analysis.analyse` takes it.

    Returns:
      (share of intervals that contain the truth, number of intervals) by quantity.
    """
    rng = np.random.default_rng(seed)
    hits = defaultdict(list)
    for replicate in range(replicates):
        analysis = analyse(simulate(grid, truths, rng), noise=noise, draws=draws, seed=replicate, full=False)
        for quantity, estimate, truth in _pairs(analysis, truths):
            hits[quantity].append(estimate.interval is not None and not estimate.excludes(truth))
    return {quantity: (float(np.mean(contained)), len(contained)) for quantity, contained in hits.items()}


def _pairs(analysis: Analysis, truths: Mapping[str, Truth]) -> list[tuple[str, Estimate, float]]:
    """Return (quantity, estimate, truth) for everything that has an interval."""
    pairs = []
    for name, fit in analysis.objectives.items():
        truth = truths[name]
        for optimum in (row.optimum for row in fit.budgets if row.optimum):
            for key in QUANTITIES:
                pairs.append((f"{name} {key}", getattr(optimum, key), np.exp(truth.log_at(key, optimum.budget))))
        for key, law in fit.laws.items():
            exponent = truth.log_at(key, np.e) - truth.log_at(key, 1.0)
            pairs.append((f"{name} {key} exponent", law.exponent, exponent))
            for factor, place in ((1.0, "at the largest budget"), (BEYOND, "ten times beyond")):
                c = factor * fit.budgets[-1].budget
                pairs.append((f"{name} {key} {place}", law.at(c), np.exp(truth.log_at(key, c))))
        if ahead := fit.prediction:
            for key in QUANTITIES:
                pairs.append((f"{name} predicted {key}", getattr(ahead, key), np.exp(truth.log_at(key, ahead.budget))))
    for gap in analysis.gaps:
        pairs += _gap_pairs(gap, truths[gap.objective], truths[gap.reference])
    return pairs


def _gap_pairs(gap: Gap, truth: Truth, reference: Truth) -> list[tuple[str, Estimate, float]]:
    pairs = []
    for c, estimate, _ in gap.at_budgets:
        value, exponent = truth.loss
        factor = 1e13 * np.exp((reference.log_at("loss", c) - np.log(value)) / exponent) / c
        pairs.append(("gap", estimate, factor))
    if truth.loss[1] == reference.loss[1] and gap.common is not None:
        pairs.append(("common gap", gap.common, (truth.loss[0] / reference.loss[0]) ** (-1 / reference.loss[1])))
    for c, estimate in gap.at_own:
        value, exponent = reference.loss
        needed = 1e13 * np.exp((truth.log_at("loss", c) - np.log(value)) / exponent)
        pairs.append(("gap at own budgets", estimate, c / needed))
    for c, estimate in gap.size_ratio:
        pairs.append(("size ratio", estimate, np.exp(truth.log_at("params", c) - reference.log_at("params", c))))
    return pairs
