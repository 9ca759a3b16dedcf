"""The optimum of one objective at one budget: N*, D* and L* of its parabola, with intervals and what to distrust."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from diffusionlm.scaling.laws import misfit, uncertainty
from diffusionlm.scaling.laws.fit import Parabola, vertex
from diffusionlm.scaling.laws.uncertainty import Estimate, Noise, PairedError, estimate
from diffusionlm.scaling.sweep.results import CellResult

QUANTITIES = ("params", "tokens", "loss")  # N*, D*, L*
REACH = 1.0  # spacings of the grid by which the interval of N* may pass its outermost sizes


@dataclass(frozen=True)
class BudgetFit:
    """One objective at one budget; what a parabola is needed for is None without a minimum."""

    objective: str
    budget: float  # FLOPs
    runs: tuple[CellResult, ...]
    parabola: Parabola | None = None  # None with fewer than three sizes
    params: Estimate | None = None  # N*
    tokens: Estimate | None = None  # D*
    loss: Estimate | None = None  # L*, nats per token
    inside: bool = False  # N* lies between the smallest and the largest size
    at_edge: bool = False  # it lies beyond the second-smallest or second-largest size
    lack_of_fit: misfit.LackOfFit | None = None
    shift_log_n: float | None = None  # bias that the asymmetry would mean: log N*, and nats
    shift_loss: float | None = None
    paired: PairedError | None = None
    logs: Mapping[str, float] = field(default_factory=dict, repr=False)  # natural logarithms, by QUANTITIES
    draws: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)  # of the same; empty without noise

    @property
    def log_n(self) -> np.ndarray:
        """(runs,) natural logarithm of the sizes."""
        return np.log([run.params for run in self.runs])

    @property
    def losses(self) -> np.ndarray:
        """(runs,) nats per token."""
        return np.array([run.loss for run in self.runs])

    @property
    def sizes(self) -> int:
        return len({run.params for run in self.runs})

    @property
    def spacing(self) -> float:
        """Of neighbouring sizes in log N, the median."""
        return float(np.median(np.diff(np.unique(self.log_n))))

    @property
    def determined(self) -> bool:
        """Whether the interval of N* ends within `REACH` of the grid on both sides; so it does with unknown noise.

        A bounded interval is not enough: it may end at 12 parameters, where nothing was measured and the parabola is
        no more than a formula. Nor need it end inside the grid: an optimum next to the last size but one would have
        to be known to half a spacing. One spacing beyond is where one more run would settle it; an interval that goes
        further holds sizes that no run is near to. The delta method, by which the laws weigh optima, is only good
        where the interval is that short: the draws of a wider one are skewed far more than their weight knows.
        """
        if self.params is None or self.params.low is None:
            return self.params is not None
        sizes, reach = np.exp([self.log_n.min(), self.log_n.max()]), np.exp(REACH * self.spacing)
        return bool(sizes[0] / reach <= self.params.low and self.params.high <= sizes[1] * reach)

    @property
    def usable(self) -> bool:
        """Whether the laws use it: a minimum inside the grid, and determined."""
        return self.inside and self.determined

    def variances(self) -> dict[str, float]:
        """Of `logs`, over the variance of one run (delta method)."""
        of_n, of_loss = self.parabola.variances()
        return {"params": of_n, "tokens": of_n, "loss": of_loss / np.exp(2 * self.logs["loss"])}


def optimum(
    objective: str,
    budget: float,
    runs: Sequence[CellResult],
    parabola: Parabola | None,
    drawn: np.ndarray | None,
    noise: Noise | None,
) -> BudgetFit:
    """Reads the optimum off a parabola.

    Args:
      objective: of the runs.
      budget: of the runs, FLOPs.
      runs: all of this objective and budget.
      parabola: through them, or None.
      drawn: (draws, 3) coefficients that it could have had, or None where the noise is unknown.
      noise: between seeds.
    """
    row = {"objective": objective, "budget": budget, "runs": tuple(runs), "parabola": parabola}
    row["paired"] = uncertainty.paired_error(runs)
    if parabola is None or not parabola.convex:
        return BudgetFit(**row)
    log_n = np.log([run.params for run in runs])
    sizes = np.unique(log_n)
    # Tokens of a cell that spends exactly the budget, as a smooth function of its size: no convention is assumed.
    log_d = np.log([run.tokens * budget / run.flops for run in runs])
    tokens = np.polynomial.polynomial.polyfit(log_n - parabola.centre, log_d, 2)

    def logs(coefficients: np.ndarray) -> dict[str, np.ndarray]:
        u, loss = vertex(coefficients)
        return {
            "params": parabola.centre + u,
            "tokens": np.polynomial.polynomial.polyval(u, tokens),
            "loss": np.log(np.where(loss > 0, loss, np.nan)),  # an almost flat draw has its minimum anywhere
        }

    best = {key: float(value) for key, value in logs(parabola.coefficients).items()}
    draws = {} if drawn is None else logs(drawn)
    return BudgetFit(
        **row,
        **{key: estimate(best[key], draws.get(key), np.exp) for key in QUANTITIES},
        inside=bool(sizes[0] <= best["params"] <= sizes[-1]),
        at_edge=not sizes[1] <= best["params"] <= sizes[-2],
        lack_of_fit=misfit.parabola_lack_of_fit(parabola, log_n, noise),
        logs=best,
        draws=draws,
    )
