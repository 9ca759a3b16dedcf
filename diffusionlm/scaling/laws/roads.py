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
from diffusionlm.scaling.laws.road_surfaces import Surfaces
from diffusionlm.scaling.laws.shares import ROAD, BestShare, ShareFit, fit_shares


@dataclass(frozen=True)
class Roads:
    """The fits of all roads of a sweep."""

    budgets: tuple[ShareFit, ...]
    noise: Noise | None  # of all roads together, between seeds or as given
    used_noise: Noise | None  # what the intervals use: the scatter about the surfaces, where that is more
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
        return Side(ROAD, self.usable, {key: self.laws[key] for key in QUANTITIES if key in self.laws}, self.used_noise)


def fit_roads(surfaces: Surfaces | None, bootstrap: Bootstrap, objectives: Mapping[str, ObjectiveFit]) -> Roads | None:
    """Find the best share of each budget, and laws through them; None where no cell has an autoregressive share.

    Args:
      surfaces: the surface of each budget.
      bootstrap: the draws that everything shares, with the noise of the surfaces as that of `ROAD`.
      objectives: the fits by objective.
    """
    if surfaces is None:
        return None
    noise = surfaces.used_noise
    fits = fit_shares(surfaces, bootstrap)
    usable = [fit.best for fit in fits if fit.best and fit.best.usable]
    differences = {
        name: _differences(usable, fit)
        for name, fit in objectives.items()
        if not any(run.arm_share for row in fit.budgets for run in row.runs)
    }
    through = laws(usable, noise, bootstrap, (*QUANTITIES, "share"))
    return Roads(fits, surfaces.noise, noise, through, differences)


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
