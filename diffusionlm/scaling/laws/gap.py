"""The compute gap between two objectives: how many times the compute one needs for the loss of the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from diffusionlm.scaling.laws.bootstrap import Estimate
from diffusionlm.scaling.laws.isoflop_fits import gls_weights
from diffusionlm.scaling.laws.noise import Noise
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.optima import Minimum
from diffusionlm.scaling.laws.power_laws import Law, law_estimate

DIFFERENT = 0.05  # p value of equal exponents below which no single number is the gap


class Side(NamedTuple):
    """One of the two objectives."""

    objective: str
    optima: Sequence[Minimum]  # usable ones
    laws: Mapping[str, Law]
    noise: Noise | None


@dataclass(frozen=True)
class Gap:
    """The multiple of the compute C of the reference that an objective needs to reach the same loss.

    Whatever takes a falling loss law of the objective is empty or None where there is none.
    """

    objective: str
    reference: str
    law: Law | None = field(repr=False)  # of the objective's loss
    reference_law: Law = field(repr=False)  # of the reference's loss
    at_budgets: tuple[tuple[float, Estimate, bool], ...]  # (C, gap, True if C times the gap is within the budgets too)
    at_own: tuple[tuple[float, Estimate], ...]  # (C of the objective, over what the reference needs for its L* there)
    common: Estimate | None  # one number for all C, from laws with one exponent
    common_exponent: Estimate | None
    equal_p: float | None  # two-sided p value of equal exponents
    size_ratio: tuple[tuple[float, Estimate], ...]  # (C, N* of the objective over that of the reference), measured
    size_ratio_law: Estimate | None  # from the laws, in the middle of the budgets

    @property
    def parallel(self) -> bool:
        """True if one number may stand for all C: it exists, and equal exponents are not rejected."""
        return self.common is not None and (self.equal_p is None or self.equal_p >= DIFFERENT)

    @property
    def extrapolations(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The factors of compute by which laws are extrapolated.

        Those of the objective's law in `at_budgets`, and those of the reference's law in `at_own`.
        """
        law, reference = self.law, self.reference_law
        return (
            tuple(law.extrapolation(c * factor.value) for c, factor, _ in self.at_budgets) if law else (),
            tuple(reference.extrapolation(c / factor.value) for c, factor in self.at_own),
        )


def quoted(gaps: Sequence[Gap], objectives: Mapping[str, ObjectiveFit]) -> list[Gap]:
    """Return the gaps between objectives whose laws hang on no suspected cell; a report shows no others."""
    hanging = {name for name, fit in objectives.items() if fit.hanging}
    return [gap for gap in gaps if not {gap.objective, gap.reference} & hanging]


def gap(side: Side, reference: Side) -> Gap:
    """Compare two objectives.

    Args:
      side: an objective with usable optima; its laws may be missing, or its loss law may not fall.
      reference: an objective with a loss law that falls.
    """
    matched = {optimum.budget: optimum for optimum in reference.optima}
    ratios = tuple(
        (optimum.budget, _size_ratio(optimum, matched[optimum.budget]))
        for optimum in side.optima
        if optimum.budget in matched
    )
    reference_law = reference.laws["loss"]
    at_own = tuple((optimum.budget, _at_own(optimum, reference_law)) for optimum in side.optima)
    names = side.objective, reference.objective
    if not side.laws or side.laws["loss"].fit.exponent >= 0:
        return Gap(*names, None, reference_law, (), at_own, None, None, None, ratios, None)
    law = side.laws["loss"]
    common, exponent = _common_exponent(side, reference)
    at_budgets = tuple(
        (c, factor, law.extrapolation(c * factor.value) == 1)
        for c, factor in ((c, distance(law, reference_law, c)) for c in reference_law.budgets)
    )
    return Gap(
        *names,
        law,
        reference_law,
        at_budgets,
        at_own,
        common,
        exponent,
        _equal_exponents_p(law, reference_law),
        ratios,
        _size_ratio_of_laws(side, reference),
    )


def distance(law: Law, reference: Law, c: float) -> Estimate:
    """Return the horizontal distance of two loss laws, as a factor of compute, where the reference has spent C."""
    value, drawn = reference.log_at(c)

    def log_gap(log_loss, level, exponent):
        gap = law.fit.centre + (log_loss - level) / np.where(exponent == 0, 1, exponent) - np.log(c)
        return np.where(exponent >= 0, np.inf, gap)  # a loss that does not fall never gets there

    best = float(log_gap(value, law.fit.level, law.fit.exponent))
    if drawn is None or law.draws is None:
        return law_estimate(best, None, np.exp)
    level, exponent = law.draws.T
    return law_estimate(best, log_gap(drawn, level, exponent), np.exp)


def _at_own(optimum: Minimum, reference: Law) -> Estimate:
    """Divide the compute of a measured optimum by what the law of the reference needs for the same loss."""

    def log_gap(log_loss, level, exponent):
        needed = reference.fit.centre + (log_loss - level) / np.where(exponent == 0, 1, exponent)
        return np.where(exponent >= 0, np.nan, np.log(optimum.budget) - needed)

    value = float(log_gap(optimum.logs["loss"], reference.fit.level, reference.fit.exponent))
    drawn = None
    if optimum.draws and reference.draws is not None:
        drawn = log_gap(optimum.draws["loss"], *reference.draws.T)
    return law_estimate(value, drawn, np.exp)


def _size_ratio(optimum: Minimum, reference: Minimum) -> Estimate:
    """Divide the N* of two measured optima."""
    drawn = None
    if optimum.draws and reference.draws:
        drawn = optimum.draws["params"] - reference.draws["params"]
    return law_estimate(optimum.logs["params"] - reference.logs["params"], drawn, np.exp)


def _size_ratio_of_laws(side: Side, reference: Side) -> Estimate:
    """Divide the laws of N* in the middle of all budgets."""
    budgets = [*side.laws["loss"].budgets, *reference.laws["loss"].budgets]
    middle = float(np.exp(np.mean(np.log(budgets))))
    value, drawn = side.laws["params"].log_at(middle)
    reference_value, reference_drawn = reference.laws["params"].log_at(middle)
    ratio = None if drawn is None or reference_drawn is None else drawn - reference_drawn
    return law_estimate(value - reference_value, ratio, np.exp)


def _equal_exponents_p(law: Law, reference: Law) -> float | None:
    """Return the two-sided p value of equal exponents: how often their drawn difference has the other sign."""
    if law.draws is None or reference.draws is None:
        return None
    drawn = law.draws[:, 1] - reference.draws[:, 1]
    drawn = drawn[~np.isnan(drawn)]
    return float(min(1.0, 2 * min(np.mean(drawn <= 0), np.mean(drawn >= 0)) + 1 / len(drawn)))


def _common_exponent(side: Side, reference: Side) -> tuple[Estimate, Estimate]:
    """Return the gap from two parallel lines in log L* over log C, and their exponent."""
    optima = [*side.optima, *reference.optima]
    log_c = np.log([optimum.budget for optimum in optima])
    first = np.arange(len(optima)) < len(side.optima)
    design = np.stack([first, ~first, log_c - log_c.mean()], 1).astype(float)
    laws = side.laws["loss"], reference.laws["loss"]
    known = [np.ones(len(law.budgets)) if law.variances is None else law.variances for law in laws]
    variances = np.concatenate(known)
    weights = gls_weights(design, np.diag(variances))

    def log_gap(level, reference, exponent):
        return np.where(exponent >= 0, np.inf, (level - reference) / -np.where(exponent == 0, 1, exponent))

    best = weights @ [optimum.logs["loss"] for optimum in optima]
    if any(law.effects is None for law in laws):
        return law_estimate(float(log_gap(*best)), None, np.exp), law_estimate(float(best[2]))
    effects = np.concatenate([law.effects[:, :-1] for law in laws if law.effects is not None], 1)
    drawn = weights @ (np.stack([optimum.draws["loss"] for optimum in optima]) + effects.T)
    return law_estimate(float(log_gap(*best)), log_gap(*drawn), np.exp), law_estimate(float(best[2]), drawn[2])
