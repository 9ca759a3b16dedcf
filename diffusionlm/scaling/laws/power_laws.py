"""Power laws of the compute through the optima of one objective, and what they predict for the next budget.

The loss follows a pure power law, as in SMDM (2410.18514, section 3). An irreducible term would bend log L over log C;
the misfit of the law and the bent law of the prediction show whether it does.

The optima scatter about a law by their noise and by a random effect (`random_effects`), which widens all intervals and
evens out the weights. Without noise the law is the plain line through the optima, as others draw it, without intervals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from diffusionlm.scaling.laws.bootstrap import Bootstrap, Estimate, estimate
from diffusionlm.scaling.laws.isoflop_fits import PowerLaw, gls_weights, power_law
from diffusionlm.scaling.laws.misfit import LackOfFit, law_lack_of_fit
from diffusionlm.scaling.laws.noise import Noise
from diffusionlm.scaling.laws.optima import QUANTITIES, Minimum
from diffusionlm.scaling.laws.random_effects import RandomEffect, random_effect


@dataclass(frozen=True)
class Law:
    """A power law of C through the optima of one objective."""

    fit: PowerLaw
    exponent: Estimate
    lack_of_fit: LackOfFit | None  # the random effect of a budget, in log units; None through two points
    shift_exponent: float | None  # the exponent minus that of plain parabolas; None where that is unknown
    budgets: tuple[float, ...]  # the budgets that it goes through, FLOPs
    without: tuple[tuple[float, Estimate], ...]  # (budget, exponent without it); empty through two points
    variances: np.ndarray | None = field(repr=False)  # (points,) of noise and random effect; None without noise
    draws: np.ndarray | None = field(repr=False)  # (draws, 2) of (level, exponent)
    # (draws, points + 1) random effects of its budgets, and of one more; None as `draws`.
    effects: np.ndarray | None = field(repr=False)

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
    # Of one run at the optimum: the error of the law, the random effect of its budget and the noise of a seed.
    loss_of_run: Estimate
    bent_loss: Estimate | None  # with a second-order term of log L* in log C; needs four budgets
    hindcast: Estimate | None  # L* of the largest budget as predicted from the others, minus the measured one (nats)


def law_estimate(
    value: float, draws: np.ndarray | None = None, transform: Callable[[float], ArrayLike] = float
) -> Estimate:
    """Return an estimate that follows from laws, which only go through optima that are known to exist."""
    return estimate(value, draws, transform, has_minimum=True)


def laws(
    optima: Sequence[Minimum],
    noise: Noise | None,
    bootstrap: Bootstrap,
    quantities: Sequence[str] = QUANTITIES,
) -> dict[str, Law]:
    """Fit laws through usable optima of one objective.

    Args:
      optima: the optima.
      noise: the noise of a run.
      bootstrap: the draws that everything shares.
      quantities: names of what their `logs` are of.

    Returns:
      The laws by quantity; none with fewer than two optima.
    """
    if len(optima) < 2:
        return {}
    fits = {}
    for key in quantities:
        line = _line(optima, key, noise, bootstrap)
        fit = power_law(np.log([o.budget for o in optima]), [o.logs[key] for o in optima], line.variances)
        fits[key] = Law(
            fit,
            law_estimate(fit.exponent, None if line.draws is None else line.draws[:, 1]),
            law_lack_of_fit(fit, line.effect, noise),
            _shift(optima, key, fit),
            tuple(optimum.budget for optimum in optima),
            _without_each(optima, key, noise, bootstrap) if len(optima) > 2 else (),
            line.variances,
            line.draws,
            line.effects,
        )
    return fits


class _Line(NamedTuple):
    """A polynomial of log y in log C - centre."""

    centre: float
    variances: np.ndarray | None  # (points,) of noise and random effect together; None where the noise is unknown
    weights: np.ndarray  # (terms, points): the coefficients are these weights times log y
    effect: RandomEffect | None
    draws: np.ndarray | None  # (draws, terms)
    effects: np.ndarray | None  # (draws, points + 1)


def _line(optima: Sequence[Minimum], key: str, noise: Noise | None, bootstrap: Bootstrap, degree: int = 1) -> _Line:
    """Fit one quantity by generalised least squares, weighted by noise and random effect."""
    log_c = np.log([optimum.budget for optimum in optima])
    centre = float(log_c.mean())
    design = np.vander(log_c - centre, degree + 1, increasing=True)
    if noise is None or not all(optimum.draws for optimum in optima):
        return _Line(centre, None, gls_weights(design, np.eye(len(optima))), None, None, None)
    variances = noise.sd**2 * np.array([optimum.variances()[key] for optimum in optima])
    effect = random_effect(design, np.array([o.logs[key] for o in optima]), variances, noise.dof)
    variances += effect.sd**2 if effect else 0.0
    weights = gls_weights(design, np.diag(variances))
    effects = bootstrap.effects(optima[0].objective, effect, len(optima) + 1)
    drawn = np.stack([optimum.draws[key] for optimum in optima], 1)
    return _Line(centre, variances, weights, effect, (drawn + effects[:, :-1]) @ weights.T, effects)


def _without_each(
    optima: Sequence[Minimum], key: str, noise: Noise | None, bootstrap: Bootstrap
) -> tuple[tuple[float, Estimate], ...]:
    exponents = []
    for omitted in optima:
        others = [optimum for optimum in optima if optimum is not omitted]
        line = _line(others, key, noise, bootstrap)
        value = float(line.weights[1] @ [optimum.logs[key] for optimum in others])
        exponents.append((omitted.budget, law_estimate(value, None if line.draws is None else line.draws[:, 1])))
    return tuple(exponents)


def _shift(optima: Sequence[Minimum], key: str, fit: PowerLaw) -> float | None:
    """Return how far the shape of the curves moved the exponent away from that of parabolas."""
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
      noise: the noise of a run.
    """
    value, drawn = fits["loss"].log_at(budget)
    run = None
    if drawn is not None and fits["loss"].effects is not None:
        with np.errstate(over="ignore"):  # three budgets may have a random effect of any size
            run = np.exp(drawn + fits["loss"].effects[:, -1]) + bootstrap.new_run(optima[0].objective)
    return Prediction(
        budget,
        fits["params"].at(budget),
        fits["tokens"].at(budget),
        fits["loss"].at(budget),
        law_estimate(float(np.exp(value)), run),
        _bent(optima, budget, noise, bootstrap) if len(optima) >= 4 else None,
        _hindcast(optima, noise, bootstrap) if len(optima) >= 3 else None,
    )


def _bent(optima: Sequence[Minimum], budget: float, noise: Noise | None, bootstrap: Bootstrap) -> Estimate:
    """Predict the loss at a budget from a parabola of log L* in log C."""
    line = _line(optima, "loss", noise, bootstrap, degree=2)
    powers = (np.log(budget) - line.centre) ** np.arange(3)
    value = float(powers @ line.weights @ [optimum.logs["loss"] for optimum in optima])
    return law_estimate(value, None if line.draws is None else line.draws @ powers, np.exp)


def _hindcast(optima: Sequence[Minimum], noise: Noise | None, bootstrap: Bootstrap) -> Estimate:
    """Predict the last budget's L* from the laws of all others, and subtract the measured one (nats)."""
    *earlier, last = optima
    law = laws(earlier, noise, bootstrap, ("loss",))["loss"]
    value, drawn = law.log_at(last.budget)
    error = None
    if drawn is not None and law.effects is not None:
        with np.errstate(over="ignore"):
            error = np.exp(drawn + law.effects[:, -1]) - np.exp(last.draws["loss"])
    return law_estimate(float(np.exp(value) - np.exp(last.logs["loss"])), error)
