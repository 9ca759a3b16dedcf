"""Power laws of the compute through the optima of one objective, and what they predict for the next budget.

The loss follows a pure power law, as in SMDM (2410.18514, section 3). An irreducible term would bend log L over log C;
the misfit of the law and the bent law of the prediction show whether it does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from diffusionlm.scaling.laws.bootstrap import Bootstrap, Estimate, estimate
from diffusionlm.scaling.laws.isoflop_fits import PowerLaw, gls_weights, power_law
from diffusionlm.scaling.laws.misfit import LackOfFit, law_lack_of_fit
from diffusionlm.scaling.laws.noise import Noise
from diffusionlm.scaling.laws.optima import QUANTITIES, Minimum


@dataclass(frozen=True)
class Law:
    """A power law of C through the optima of one objective."""

    fit: PowerLaw
    exponent: Estimate
    lack_of_fit: LackOfFit | None  # in log units; None through two points
    shift_exponent: float | None  # the bias that asymmetric curves mean; None where that is unknown
    budgets: tuple[float, ...]  # the budgets that it goes through, FLOPs
    without: tuple[tuple[float, Estimate], ...]  # (budget, exponent without it); empty through two points
    draws: np.ndarray | None = field(repr=False)  # (draws, 2) of (level, exponent)

    def log_at(self, c: float) -> tuple[float, np.ndarray | None]:
        """Return the natural logarithm of the law at C, and its draws."""
        offset = float(np.log(c) - self.fit.centre)
        drawn = None if self.draws is None else self.draws[:, 0] + offset * self.draws[:, 1]
        return self.fit.level + self.fit.exponent * offset, drawn

    def at(self, c: float) -> Estimate:
        """Return the law at C."""
        return law_estimate(*self.log_at(c), np.exp)

    def extrapolation(self, c: float) -> float:
        """Return the factor by which C lies outside the budgets of the law; 1 inside."""
        return float(max(self.budgets[0] / c, c / self.budgets[-1], 1.0))

    @property
    def decisive(self) -> tuple[tuple[float, Estimate], ...]:
        """The entries of `without` whose exponent lies outside the interval of the exponent of all budgets."""
        return tuple((c, e) for c, e in self.without if self.exponent.excludes(e.value))


@dataclass(frozen=True)
class Prediction:
    """The prediction of the laws of one objective for the next budget."""

    budget: float
    params: Estimate
    tokens: Estimate
    loss: Estimate  # of the law
    loss_of_run: Estimate  # of one run at the optimum: the error of the law and the noise of a seed
    bent_loss: Estimate | None  # with a second-order term of log L* in log C; needs four budgets
    hindcast: Estimate | None  # L* of the largest budget as predicted from the others, minus the measured one (nats)


def law_estimate(
    value: float, draws: np.ndarray | None = None, transform: Callable[[float], ArrayLike] = float
) -> Estimate:
    """Return an estimate that follows from laws, which only go through optima that are known to exist."""
    return estimate(value, draws, transform, has_minimum=True)


def laws(optima: Sequence[Minimum], noise: Noise | None, quantities: Sequence[str] = QUANTITIES) -> dict[str, Law]:
    """Fit laws through usable optima of one objective.

    Args:
      optima: the optima.
      noise: the noise between seeds.
      quantities: names of what their `logs` are of.

    Returns:
      The laws by quantity; none with fewer than two optima.
    """
    if len(optima) < 2:
        return {}
    fits = {}
    for key in quantities:
        fit, draws = _line(optima, key)
        fits[key] = Law(
            fit,
            law_estimate(fit.exponent, None if draws is None else draws[:, 1]),
            law_lack_of_fit(fit, [optimum.variances()[key] for optimum in optima], noise),
            _shift(optima, key, fit),
            tuple(optimum.budget for optimum in optima),
            _without_each(optima, key) if len(optima) > 2 else (),
            draws,
        )
    return fits


def _line(optima: Sequence[Minimum], key: str) -> tuple[PowerLaw, np.ndarray | None]:
    """Return the law of one quantity, and draws (draws, 2) of its level and exponent."""
    variances = [optimum.variances()[key] for optimum in optima]
    fit = power_law(np.log([o.budget for o in optima]), [o.logs[key] for o in optima], variances)
    if not all(optimum.draws for optimum in optima):
        return fit, None
    return fit, np.stack([optimum.draws[key] for optimum in optima], 1) @ fit.weights.T


def _without_each(optima: Sequence[Minimum], key: str) -> tuple[tuple[float, Estimate], ...]:
    exponents = []
    for omitted in optima:
        fit, draws = _line([optimum for optimum in optima if optimum is not omitted], key)
        exponents.append((omitted.budget, law_estimate(fit.exponent, None if draws is None else draws[:, 1])))
    return tuple(exponents)


def _shift(optima: Sequence[Minimum], key: str, fit: PowerLaw) -> float | None:
    """Return how far the biases of the optima would move the exponent."""
    shifts = []
    for optimum in optima:
        if optimum.shift_log_n is None or optimum.shift_loss is None:
            return None
        by_key = {
            "params": optimum.shift_log_n,
            "tokens": -optimum.shift_log_n,
            "loss": optimum.shift_loss / np.exp(optimum.logs["loss"]),
        }
        shifts.append(by_key[key])
    return None if np.isnan(shifts).any() else float(fit.weights[1] @ shifts)


def predict(
    optima: Sequence[Minimum], fits: Mapping[str, Law], bootstrap: Bootstrap, budget: float, noise: Noise | None
) -> Prediction:
    """Extrapolate the laws of an objective to a budget.

    Args:
      optima: the optima that the laws go through.
      fits: the laws, by QUANTITIES.
      bootstrap: the source of the noise of one more run.
      budget: FLOPs.
      noise: the noise between seeds.
    """
    value, drawn = fits["loss"].log_at(budget)
    run = None if drawn is None else np.exp(drawn) + bootstrap.new_run(optima[0].objective)
    return Prediction(
        budget,
        fits["params"].at(budget),
        fits["tokens"].at(budget),
        fits["loss"].at(budget),
        law_estimate(float(np.exp(value)), run),
        _bent(optima, budget) if len(optima) >= 4 else None,
        _hindcast(optima, noise) if len(optima) >= 3 else None,
    )


def _bent(optima: Sequence[Minimum], budget: float) -> Estimate:
    """Predict the loss at a budget from a parabola of log L* in log C."""
    log_c = np.log([optimum.budget for optimum in optima])
    design = np.vander(log_c - log_c.mean(), 3, increasing=True)
    weights = gls_weights(design, np.diag([optimum.variances()["loss"] for optimum in optima]))
    weights = (np.log(budget) - log_c.mean()) ** np.arange(3) @ weights
    drawn = None
    if all(optimum.draws for optimum in optima):
        drawn = np.stack([optimum.draws["loss"] for optimum in optima], 1) @ weights
    return law_estimate(float(weights @ [optimum.logs["loss"] for optimum in optima]), drawn, np.exp)


def _hindcast(optima: Sequence[Minimum], noise: Noise | None) -> Estimate:
    """Predict the last budget's L* from the laws of all others, and subtract the measured one (nats)."""
    *earlier, last = optima
    value, drawn = laws(earlier, noise)["loss"].log_at(last.budget)
    return law_estimate(
        float(np.exp(value) - np.exp(last.logs["loss"])),
        None if drawn is None else np.exp(drawn) - np.exp(last.draws["loss"]),
    )
