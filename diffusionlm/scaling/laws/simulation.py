"""Whether the intervals of a report hold on a given grid: simulated sweeps with known laws, analysed as real ones are.

The grid is that of a real sweep or a planned one. Losses are parabolas in log N whose minima follow power laws exactly,
plus normal noise, so this checks the statistics and not whether real losses are parabolas.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusionlm.scaling.laws.analysis import Analysis, analyse
from diffusionlm.scaling.laws.uncertainty import Estimate
from diffusionlm.scaling.sweep.results import CellResult


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    objective: str
    budget: float
    params: int
    seed: int


@dataclass(frozen=True)
class Truth:
    """What an objective does: laws as (value at 1e13 FLOPs, exponent)."""

    params: tuple[float, float]
    loss: tuple[float, float]
    curvature: float  # nats per squared unit of log N
    noise: float  # standard deviation between seeds, nats

    def log_at(self, quantity: str, c: float) -> float:
        if quantity == "tokens":
            return float(np.log(c / 6) - self.log_at("params", c))
        value, exponent = getattr(self, quantity)
        return float(np.log(value) + exponent * np.log(c / 1e13))


def grid_of(results: Sequence[CellResult]) -> list[Cell]:
    """The grid of a real sweep."""
    return [Cell(result.objective, result.budget, result.params, result.seed) for result in results]


def truths_of(analysis: Analysis) -> dict[str, Truth]:
    """The laws, mean curvature and noise that a real sweep was found to have, of objectives that have all of them."""
    found = {}
    for name, fit in analysis.objectives.items():
        curvatures = [row.parabola.coefficients[2] for row in fit.budgets if row.usable]
        if fit.laws and fit.noise:
            params, loss = ((fit.laws[key].at(1e13).value, fit.laws[key].fit.exponent) for key in ("params", "loss"))
            found[name] = Truth(params, loss, float(np.mean(curvatures)), fit.noise.sd)
    return found


def make_grid(
    truths: Mapping[str, Truth],
    budgets: Sequence[float] = (1.6e12, 5e12, 1.6e13, 5e13),
    sizes: int = 5,
    spacing: float = 1.8,
    off_centre: float = 0.2,
    repeated: int = 1,
) -> list[Cell]:
    """A grid around the optima, with three seeds in some cells of the two smallest budgets and one elsewhere.

    Args:
      truths: by objective.
      budgets: FLOPs.
      sizes: of each budget.
      spacing: between neighbours, a factor.
      off_centre: how far the middle of the sizes is from the optimum, in spacings, up and down by turns.
      repeated: cells with three seeds in each of the two smallest budgets.
    """
    cells = []
    for objective, truth in truths.items():
        for i, budget in enumerate(budgets):
            middle = truth.log_at("params", budget) + off_centre * np.log(spacing) * (-1) ** i
            offsets = np.arange(sizes) - (sizes - 1) / 2
            first = (sizes - repeated) // 2
            for j, log_n in enumerate(middle + offsets * np.log(spacing)):
                seeds = 3 if i < 2 and first <= j < first + repeated else 1
                cells += [Cell(objective, budget, round(np.exp(log_n)), seed) for seed in range(seeds)]
    return cells


def simulate(grid: Sequence[Cell], truths: Mapping[str, Truth], rng: np.random.Generator) -> list[CellResult]:
    """One sweep on the grid."""
    results = []
    for cell in grid:
        truth = truths[cell.objective]
        offset = np.log(cell.params) - truth.log_at("params", cell.budget)
        loss = np.exp(truth.log_at("loss", cell.budget)) + truth.curvature * offset**2
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
    grid: Sequence[Cell], truths: Mapping[str, Truth], replicates: int, *, draws: int = 2000, seed: int = 0
) -> dict[str, tuple[float, int]]:
    """How often the 95% intervals contain the truth: (share, intervals) by quantity.

    Args:
      grid: of the sweeps.
      truths: by objective.
      replicates: simulated sweeps.
      draws: of the bootstrap of each; quantiles from fewer are rougher, and not biased.
      seed: of everything.
    """
    rng = np.random.default_rng(seed)
    hits = defaultdict(list)
    for replicate in range(replicates):
        analysis = analyse(simulate(grid, truths, rng), draws=draws, seed=replicate, full=False)
        for quantity, estimate, truth in _pairs(analysis, truths):
            hits[quantity].append(estimate.low is not None and estimate.low <= truth <= estimate.high)
    return {quantity: (float(np.mean(found)), len(found)) for quantity, found in hits.items()}


def _pairs(analysis: Analysis, truths: Mapping[str, Truth]) -> list[tuple[str, Estimate, float]]:
    """(quantity, its estimate, the truth) of everything with an interval."""
    pairs = []
    for name, fitted in analysis.objectives.items():
        truth = truths[name]
        for row in fitted.budgets:
            for key in ("params", "tokens", "loss"):
                if row.params is not None:
                    pairs.append((f"{name} {key}", getattr(row, key), np.exp(truth.log_at(key, row.budget))))
        for key, law in fitted.laws.items():
            exponent = truth.log_at(key, np.e) - truth.log_at(key, 1.0)
            pairs.append((f"{name} {key} exponent", law.exponent, exponent))
        if ahead := fitted.prediction:
            for key in ("params", "tokens", "loss"):
                pairs.append((f"{name} predicted {key}", getattr(ahead, key), np.exp(truth.log_at(key, ahead.budget))))
    for gap in analysis.gaps:
        of, reference = truths[gap.objective], truths[gap.reference]
        for c, estimate, _ in gap.at_budgets:
            value, exponent = of.loss
            factor = 1e13 * np.exp((reference.log_at("loss", c) - np.log(value)) / exponent) / c
            pairs.append(("gap", estimate, factor))
        if of.loss[1] == reference.loss[1] and gap.common is not None:
            pairs.append(("common gap", gap.common, (of.loss[0] / reference.loss[0]) ** (-1 / reference.loss[1])))
        for c, estimate in gap.at_own:
            value, exponent = reference.loss
            needed = 1e13 * np.exp((of.log_at("loss", c) - np.log(value)) / exponent)
            pairs.append(("gap at own budgets", estimate, c / needed))
        for c, estimate in gap.size_ratio:
            pairs.append(("size ratio", estimate, np.exp(of.log_at("params", c) - reference.log_at("params", c))))
    return pairs
