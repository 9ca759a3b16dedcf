"""Roads that begin as an autoregressive model: how the best share moves with compute, and what it gains."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusionlm.scaling.laws.bootstrap import Bootstrap, Estimate
from diffusionlm.scaling.laws.gap import Side
from diffusionlm.scaling.laws.noise import Noise
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.optima import QUANTITIES
from diffusionlm.scaling.laws.power_laws import Law, law_estimate, laws
from diffusionlm.scaling.laws.shares import ROAD, BestShare, ShareFit, fit_shares
from diffusionlm.scaling.sweep.results import CellResult


@dataclass(frozen=True)
class Roads:
    """The fits of all roads of a sweep."""

    budgets: tuple[ShareFit, ...]
    noise: Noise | None  # of all roads together
    laws: dict[str, Law]  # through the best shares, by QUANTITIES, and "share": the odds share / (1 - share)
    # objective -> (budget, L* at the best share minus its L* at the same budget, nats)
    differences: dict[str, tuple[tuple[float, Estimate], ...]]

    @property
    def usable(self) -> list[BestShare]:
        """The best shares that laws and gaps use."""
        return [fit.best for fit in self.budgets if fit.best and fit.best.usable]

    @property
    def side(self) -> Side:
        """The road with the best share of each budget, to be compared with an objective."""
        return Side(ROAD, self.usable, {key: self.laws[key] for key in QUANTITIES if key in self.laws}, self.noise)


def fit_roads(
    results: Sequence[CellResult],
    noises: Mapping[str, Noise | None],
    bootstrap: Bootstrap,
    objectives: Mapping[str, ObjectiveFit],
) -> Roads | None:
    """Fit the best share of each budget; None where no cell has an autoregressive share.

    Args:
      results: all finished cells.
      noises: the noise by objective, one for all roads.
      bootstrap: the draws that everything shares.
      objectives: the fits by objective.
    """
    runs = [result for result in results if result.arm_share]
    if not runs:
        return None
    noise = noises[runs[0].objective]
    fits = fit_shares(runs, noise, bootstrap)
    usable = [fit.best for fit in fits if fit.best and fit.best.usable]
    differences = {
        name: _differences(usable, fit)
        for name, fit in objectives.items()
        if not any(run.arm_share for row in fit.budgets for run in row.runs)
    }
    return Roads(fits, noise, laws(usable, noise, bootstrap, (*QUANTITIES, "share")), differences)


def _differences(best: Sequence[BestShare], fit: ObjectiveFit) -> tuple[tuple[float, Estimate], ...]:
    optima = {row.budget: row.optimum for row in fit.budgets if row.optimum and row.optimum.usable}
    rows = []
    for road in best:
        if not (optimum := optima.get(road.budget)):
            continue
        drawn = None
        if road.draws and optimum.draws:
            drawn = np.exp(road.draws["loss"]) - np.exp(optimum.draws["loss"])
        value = float(np.exp(road.logs["loss"]) - np.exp(optimum.logs["loss"]))
        rows.append((road.budget, law_estimate(value, drawn)))
    return tuple(rows)
