"""The optimum of one objective at one budget: N*, D* and L* of its curve, with intervals and reasons for doubt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from diffusionlm.scaling.laws.bootstrap import Estimate, estimate
from diffusionlm.scaling.laws.curves import Curve
from diffusionlm.scaling.laws.isoflop_fits import Parabola
from diffusionlm.scaling.laws.misfit import LackOfFit, curve_lack_of_fit
from diffusionlm.scaling.laws.noise import Noise, PairedError, paired_error
from diffusionlm.scaling.sweep.results import CellResult

QUANTITIES = ("params", "tokens", "loss")  # N*, D*, L*
REACH = 1.0  # spacings of the grid by which the interval of N* may pass its outermost sizes


class Minimum(Protocol):
    """An optimum as laws and gaps see it: they read these fields alone."""

    @property
    def objective(self) -> str:
        """The objective, or the road."""
        ...

    @property
    def budget(self) -> float:
        """FLOPs."""
        ...

    @property
    def logs(self) -> Mapping[str, float]:
        """Natural logarithms, by the names of quantities."""
        ...

    @property
    def draws(self) -> Mapping[str, np.ndarray]:
        """(draws,) of the same; empty where the noise is unknown."""
        ...

    @property
    def shift_log_n(self) -> float | None:
        """Log N* minus that of a plain parabola."""
        ...

    @property
    def shift_loss(self) -> float | None:
        """L* minus that of a plain parabola, nats."""
        ...

    def variances(self) -> Mapping[str, float]:
        """Return the variances of `logs`, in units of the variance of one run."""
        ...


@dataclass(frozen=True)
class Optimum:
    """The minimum of the curve of one objective at one budget."""

    objective: str
    budget: float  # FLOPs
    curve: Curve | Parabola
    log_n: np.ndarray  # (runs,) natural logarithms of the sizes
    losses: np.ndarray  # (runs,) nats per token
    params: Estimate  # N*
    tokens: Estimate  # D*
    loss: Estimate  # L*, nats per token
    lack_of_fit: LackOfFit | None
    logs: Mapping[str, float] = field(repr=False)  # natural logarithms, by QUANTITIES
    draws: Mapping[str, np.ndarray] = field(repr=False)  # (draws,) of the same; empty where the noise is unknown
    # Log N* and L* minus those of a plain parabola; NaN where that has no minimum, None for a parabola.
    shift_log_n: float | None = None
    shift_loss: float | None = None

    @property
    def sizes(self) -> np.ndarray:
        """Natural logarithms of the different sizes, sorted."""
        return np.unique(self.log_n)

    @property
    def spacing(self) -> float:
        """The median distance of neighbouring sizes in log N."""
        return float(np.median(np.diff(self.sizes)))

    @property
    def inside(self) -> bool:
        """True if N* lies between the smallest and the largest size."""
        return bool(self.sizes[0] <= self.logs["params"] <= self.sizes[-1])

    @property
    def at_edge(self) -> bool:
        """True if N* lies beyond the second-smallest or the second-largest size."""
        return not self.sizes[1] <= self.logs["params"] <= self.sizes[-2]

    @property
    def determined(self) -> bool:
        """True if the interval of N* ends within `REACH` of the grid on both sides, or if the noise is unknown.

        A bounded interval is not enough: it may end at 12 parameters, where nothing was measured and the curve is no
        more than a formula. Nor need it end inside the grid: an optimum next to the last size but one would have to be
        known to half a spacing. One spacing beyond is where one more run would settle it; an interval that goes further
        holds sizes that no run is near to. The delta method, by which the laws weigh optima, is only good where the
        interval is that short: the draws of a wider one are far more skewed than their weight accounts for.
        """
        if self.params.interval is None:
            return True
        low, high = self.params.interval
        smallest, largest, reach = *np.exp(self.sizes[[0, -1]]), np.exp(REACH * self.spacing)
        return bool(smallest / reach <= low and high <= largest * reach)

    @property
    def usable(self) -> bool:
        """True if the laws use it: a minimum inside the grid that is determined."""
        return self.inside and self.determined

    def variances(self) -> dict[str, float]:
        """Return the variances of `logs`, in units of the variance of one run (delta method)."""
        params, loss = self.curve.variances()
        return {"params": params, "tokens": params, "loss": loss / np.exp(2 * self.logs["loss"])}


@dataclass(frozen=True)
class BudgetFit:
    """One objective at one budget."""

    objective: str
    budget: float  # FLOPs
    runs: tuple[CellResult, ...]
    parabola: Parabola | None  # plain Approach 2, to compare with; None with fewer than three sizes
    curve: Curve | Parabola | None  # whose minimum is the optimum; None with fewer than three sizes
    optimum: Optimum | None  # None without a minimum
    paired: PairedError | None
    distant: tuple[CellResult, ...] = ()  # runs too far from the best size to be in the curve; not among `runs`

    @property
    def log_n(self) -> np.ndarray:
        """(runs,) natural logarithms of the sizes."""
        return np.log([run.params for run in self.runs])

    @property
    def sizes(self) -> int:
        """The number of different sizes."""
        return len({run.params for run in self.runs})

    @property
    def usable(self) -> bool:
        """True if the laws use the optimum."""
        return self.optimum is not None and self.optimum.usable


def fit_budget(
    runs: Sequence[CellResult],
    parabola: Parabola | None,
    curve: Curve | Parabola | None,
    drawn: tuple[np.ndarray, np.ndarray] | None,
    noise: Noise | None,
) -> BudgetFit:
    """Read the optimum off a curve.

    Args:
      runs: all runs of one objective and budget.
      parabola: the parabola through them, or None.
      curve: the curve of which the minimum is the optimum, or None.
      drawn: (draws,) log N* and L* that it could have had, or None where the noise is unknown.
      noise: the noise of a run.
    """
    flat = len({run.loss for run in runs}) == 1  # the minimum of a curve through these is one of rounding errors
    optimum = _optimum(runs, parabola, curve, drawn, noise) if curve and curve.convex and not flat else None
    return BudgetFit(runs[0].objective, runs[0].budget, tuple(runs), parabola, curve, optimum, paired_error(runs))


def tokens_of_size(runs: Sequence[CellResult], centre: float) -> np.ndarray:
    """Return log D of a cell that spends exactly the budget of some runs, as a polynomial of log N - `centre`, (3,).

    It is a smooth function of the size, and no convention is assumed.
    """
    log_n = np.log([run.params for run in runs])
    log_d = np.log([run.tokens * run.budget / run.flops for run in runs])
    return np.polynomial.polynomial.polyfit(log_n - centre, log_d, 2)


def _optimum(
    runs: Sequence[CellResult],
    parabola: Parabola | None,
    curve: Curve | Parabola,
    drawn: tuple[np.ndarray, np.ndarray] | None,
    noise: Noise | None,
) -> Optimum:
    budget, log_n = runs[0].budget, np.log([run.params for run in runs])
    tokens = tokens_of_size(runs, curve.centre)

    def logs(log_n: ArrayLike, loss: ArrayLike) -> dict[str, np.ndarray]:
        return {
            "params": np.asarray(log_n),
            "tokens": np.polynomial.polynomial.polyval(np.asarray(log_n) - curve.centre, tokens),
            "loss": np.log(np.where(np.asarray(loss) > 0, loss, np.nan)),  # an almost flat draw has it anywhere
        }

    best = {key: float(value) for key, value in logs(curve.log_n, curve.loss).items()}
    draws = {} if drawn is None else logs(*drawn)
    params, optimal_tokens, loss = (estimate(best[key], draws.get(key), np.exp) for key in QUANTITIES)
    return Optimum(
        objective=runs[0].objective,
        budget=budget,
        curve=curve,
        log_n=log_n,
        losses=np.array([run.loss for run in runs]),
        params=params,
        tokens=optimal_tokens,
        loss=loss,
        lack_of_fit=curve_lack_of_fit(curve, log_n, noise),
        logs=best,
        draws=draws,
        shift_log_n=curve.log_n - parabola.log_n if parabola else None,
        shift_loss=curve.loss - parabola.loss if parabola else None,
    )
