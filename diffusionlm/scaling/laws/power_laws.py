"""Power laws of the compute through the optima, and what follows from them: the gap between objectives, a prediction.

The loss follows a pure power law, as in SMDM (2410.18514, section 3). An irreducible term would bend log L over log C;
whether it does, the misfit of the law and the bent law of the prediction say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from diffusionlm.scaling.laws import misfit
from diffusionlm.scaling.laws.fit import PowerLaw, gls_weights, power_law
from diffusionlm.scaling.laws.optima import QUANTITIES, BudgetFit
from diffusionlm.scaling.laws.uncertainty import Bootstrap, Estimate, Noise, estimate

DIFFER = 0.05  # p value of equal exponents below which no one number is the gap


@dataclass(frozen=True)
class Law:
    """A power law of C through the optima of one objective."""

    fit: PowerLaw
    exponent: Estimate
    lack_of_fit: misfit.LackOfFit | None  # in log units; None through two points
    shift_exponent: float | None  # the bias that asymmetric curves would mean; None where that is unknown
    budgets: tuple[float, ...]  # that it goes through
    without: tuple[tuple[float, Estimate], ...]  # (budget, exponent without it); empty through two points
    draws: np.ndarray | None = field(repr=False)  # (draws, 2) of (level, exponent)

    def log_at(self, c: float) -> tuple[float, np.ndarray | None]:
        """Natural logarithm of the law at C, and its draws."""
        offset = float(np.log(c) - self.fit.centre)
        drawn = None if self.draws is None else self.draws[:, 0] + offset * self.draws[:, 1]
        return self.fit.level + self.fit.exponent * offset, drawn

    def at(self, c: float) -> Estimate:
        """The law at C."""
        return _estimate(*self.log_at(c), np.exp)

    def beyond(self, c: float) -> float:
        """The factor by which C lies outside its budgets; 1 inside."""
        return float(max(self.budgets[0] / c, c / self.budgets[-1], 1.0))

    @property
    def hangs_on(self) -> tuple[tuple[float, Estimate], ...]:
        """Of `without`, the budgets without which the exponent lies outside its own interval."""
        low, high = self.exponent.low, self.exponent.high
        return tuple((c, e) for c, e in self.without if low is not None and not low <= e.value <= high)


@dataclass(frozen=True)
class Prediction:
    """What the laws of one objective say about the next budget."""

    budget: float
    params: Estimate
    tokens: Estimate
    loss: Estimate  # of the law
    loss_of_run: Estimate  # of one run at the optimum: the error of the law and the noise of a seed
    bent_loss: Estimate | None  # had log L* a second-order term in log C; needs four budgets
    hindcast: Estimate | None  # the largest budget's L* as predicted from the others, minus the measured one (nats)


@dataclass(frozen=True)
class Gap:
    """How many times the compute C of the reference an objective needs to reach the same loss.

    What takes a falling loss law of the objective is empty or None where there is none.
    """

    objective: str
    reference: str
    laws: tuple[Law | None, Law] = field(repr=False)  # of the loss: of the objective and of the reference
    at_budgets: tuple[tuple[float, Estimate, bool], ...]  # (C, gap, whether C times the gap is a measured budget too)
    at_own: tuple[tuple[float, Estimate], ...]  # (C of the objective, over what the reference needs for its L* there)
    common: Estimate | None  # one number for all C, from laws with one exponent
    common_exponent: Estimate | None
    equal_p: float | None  # two-sided, of equal exponents
    size_ratio: tuple[tuple[float, Estimate], ...]  # (C, N* of the objective over that of the reference), measured
    size_ratio_law: Estimate | None  # of the laws, in the middle of the budgets

    @property
    def parallel(self) -> bool:
        """Whether one number may stand for all C: there is one, and nothing says that the exponents differ."""
        return self.common is not None and (self.equal_p is None or self.equal_p >= DIFFER)

    @property
    def beyond(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """By which factors the law of the objective is extrapolated in `at_budgets`, the reference's in `at_own`."""
        other, reference = self.laws
        return (
            tuple(other.beyond(c * factor.value) for c, factor, _ in self.at_budgets),
            tuple(reference.beyond(c / factor.value) for c, factor in self.at_own),
        )

    def at(self, c: float) -> Estimate:
        """The horizontal distance of the two loss laws where the reference has spent C, as a factor."""
        other, reference = self.laws
        value, drawn = reference.log_at(c)

        def log_gap(log_loss, level, exponent):
            gap = other.fit.centre + (log_loss - level) / np.where(exponent == 0, 1, exponent) - np.log(c)
            return np.where(exponent >= 0, np.inf, gap)  # a loss that does not fall never gets there

        best = float(log_gap(value, other.fit.level, other.fit.exponent))
        if drawn is None or other.draws is None:
            return _estimate(best, None, np.exp)
        level, exponent = other.draws.T
        return _estimate(best, log_gap(drawn, level, exponent), np.exp)


def _estimate(value: float, draws: np.ndarray | None = None, transform: Callable[[float], float] = float) -> Estimate:
    """Of something that follows from laws: they only go through optima whose curvature is significant."""
    return estimate(value, draws, transform, has_minimum=True)


def laws(rows: Sequence[BudgetFit], noise: Noise | None) -> dict[str, Law]:
    """The three laws through usable optima, by QUANTITIES; none with fewer than two of them."""
    if len(rows) < 2:
        return {}
    found = {}
    for key in QUANTITIES:
        fitted, draws = _line(rows, key)
        variances = [row.variances()[key] for row in rows]
        found[key] = Law(
            fitted,
            _estimate(fitted.exponent, None if draws is None else draws[:, 1]),
            misfit.law_lack_of_fit(fitted, variances, noise),
            _shift(rows, key, fitted),
            tuple(row.budget for row in rows),
            _without_each(rows, key) if len(rows) > 2 else (),
            draws,
        )
    return found


def _line(rows: Sequence[BudgetFit], key: str) -> tuple[PowerLaw, np.ndarray | None]:
    """The law of one quantity, and draws (draws, 2) of its level and exponent."""
    variances = [row.variances()[key] for row in rows]
    fitted = power_law(np.log([row.budget for row in rows]), [row.logs[key] for row in rows], variances)
    if not all(row.draws for row in rows):
        return fitted, None
    return fitted, np.stack([row.draws[key] for row in rows], 1) @ fitted.weights.T


def _without_each(rows: Sequence[BudgetFit], key: str) -> tuple[tuple[float, Estimate], ...]:
    found = []
    for left_out in rows:
        fitted, draws = _line([row for row in rows if row is not left_out], key)
        found.append((left_out.budget, _estimate(fitted.exponent, None if draws is None else draws[:, 1])))
    return tuple(found)


def _shift(rows: Sequence[BudgetFit], key: str, fitted: PowerLaw) -> float | None:
    shifts = {
        "params": [row.shift_log_n for row in rows],
        "tokens": [None if row.shift_log_n is None else -row.shift_log_n for row in rows],
        "loss": [None if row.shift_loss is None else row.shift_loss / np.exp(row.logs["loss"]) for row in rows],
    }[key]
    if any(shift is None or np.isnan(shift) for shift in shifts):
        return None
    return float(fitted.weights[1] @ shifts)


def predict(
    rows: Sequence[BudgetFit], of: Mapping[str, Law], bootstrap: Bootstrap, budget: float, noise: Noise | None
) -> Prediction:
    """Extrapolates the laws `of` an objective, fitted to `rows`, to a budget."""
    value, drawn = of["loss"].log_at(budget)
    run = None if drawn is None else np.exp(drawn) + bootstrap.new_run(rows[0].objective)
    return Prediction(
        budget,
        of["params"].at(budget),
        of["tokens"].at(budget),
        of["loss"].at(budget),
        _estimate(float(np.exp(value)), run),
        _bent(rows, budget) if len(rows) >= 4 else None,
        _hindcast(rows, noise) if len(rows) >= 3 else None,
    )


def _bent(rows: Sequence[BudgetFit], budget: float) -> Estimate:
    """The loss at a budget from a parabola of log L* in log C."""
    log_c = np.log([row.budget for row in rows])
    design = np.vander(log_c - log_c.mean(), 3, increasing=True)
    weights = gls_weights(design, np.diag([row.variances()["loss"] for row in rows]))
    weights = (np.log(budget) - log_c.mean()) ** np.arange(3) @ weights
    drawn = np.stack([row.draws["loss"] for row in rows], 1) @ weights if all(row.draws for row in rows) else None
    return _estimate(float(weights @ [row.logs["loss"] for row in rows]), drawn, np.exp)


def _hindcast(rows: Sequence[BudgetFit], noise: Noise | None) -> Estimate:
    """What the laws of all budgets but the last say of the last one's L*, minus the measured one (nats)."""
    *earlier, last = rows
    value, drawn = laws(earlier, noise)["loss"].log_at(last.budget)
    return _estimate(
        float(np.exp(value) - np.exp(last.logs["loss"])),
        None if drawn is None else np.exp(drawn) - np.exp(last.draws["loss"]),
    )


def gap(
    objective: str,
    reference: str,
    rows: tuple[Sequence[BudgetFit], Sequence[BudgetFit]],
    of: tuple[Mapping[str, Law], Mapping[str, Law]],
    noises: tuple[Noise | None, Noise | None],
) -> Gap:
    """Compares two objectives: the first of each pair is the objective, the second the reference.

    The reference has a loss law that falls. The objective has usable optima; its laws may be missing, or not fall.
    """
    matched = {row.budget: row for row in rows[1]}
    ratios = tuple(
        (row.budget, _ratio(row.logs["params"], row.draws, other.logs["params"], other.draws))
        for row in rows[0]
        if (other := matched.get(row.budget))
    )
    at_own = tuple(_at_own(row, of[1]["loss"]) for row in rows[0])
    if not of[0] or of[0]["loss"].fit.exponent >= 0:
        return Gap(objective, reference, (None, of[1]["loss"]), (), at_own, None, None, None, ratios, None)
    both = of[0]["loss"], of[1]["loss"]
    common, exponent = _common_exponent(rows, noises)
    drawn = None if both[0].draws is None or both[1].draws is None else both[0].draws[:, 1] - both[1].draws[:, 1]
    middle = float(np.exp(np.mean(np.log([*both[0].budgets, *both[1].budgets]))))
    made = Gap(objective, reference, both, (), at_own, common, exponent, _two_sided(drawn), ratios, None)
    (value, drawn), (other_value, other_drawn) = (of_one["params"].log_at(middle) for of_one in of)
    known = drawn is not None and other_drawn is not None
    of_laws = _estimate(value - other_value, drawn - other_drawn if known else None, np.exp)
    at = [(c, made.at(c)) for c in both[1].budgets]
    at_budgets = tuple((c, factor, both[0].beyond(c * factor.value) == 1) for c, factor in at)
    return replace(made, at_budgets=at_budgets, size_ratio_law=of_laws)


def _at_own(row: BudgetFit, reference: Law) -> tuple[float, Estimate]:
    """What an objective spent on its measured optimum, over what the law of the reference asks for the same loss."""

    def log_gap(log_loss, level, exponent):
        needed = reference.fit.centre + (log_loss - level) / np.where(exponent == 0, 1, exponent)
        return np.where(exponent >= 0, np.nan, np.log(row.budget) - needed)

    value = float(log_gap(row.logs["loss"], reference.fit.level, reference.fit.exponent))
    known = row.draws and reference.draws is not None
    return row.budget, _estimate(value, log_gap(row.draws["loss"], *reference.draws.T) if known else None, np.exp)


def _ratio(value: float, draws: Mapping, other: float, other_draws: Mapping) -> Estimate:
    drawn = draws["params"] - other_draws["params"] if draws and other_draws else None
    return _estimate(value - other, drawn, np.exp)


def _two_sided(drawn: np.ndarray | None) -> float | None:
    """The two-sided p value of zero: how often draws lie on its other side."""
    if drawn is None:
        return None
    drawn = drawn[~np.isnan(drawn)]
    return float(min(1.0, 2 * min(np.mean(drawn <= 0), np.mean(drawn >= 0)) + 1 / len(drawn)))


def _common_exponent(
    rows: tuple[Sequence[BudgetFit], Sequence[BudgetFit]], noises: tuple[Noise | None, Noise | None]
) -> tuple[Estimate, Estimate]:
    """The gap from two parallel lines in log L* over log C, and their exponent."""
    everything = [*rows[0], *rows[1]]
    log_c = np.log([row.budget for row in everything])
    first = np.arange(len(everything)) < len(rows[0])
    design = np.stack([first, ~first, log_c - log_c.mean()], 1).astype(float)
    variances = [
        row.variances()["loss"] * (noise.sd**2 if noise else 1.0)
        for row, noise in zip(everything, [noises[0]] * len(rows[0]) + [noises[1]] * len(rows[1]), strict=True)
    ]
    weights = gls_weights(design, np.diag(variances))

    def log_gap(level, reference, exponent):
        return np.where(exponent >= 0, np.inf, (level - reference) / -np.where(exponent == 0, 1, exponent))

    best = weights @ [row.logs["loss"] for row in everything]
    if not all(row.draws for row in everything):
        return _estimate(float(log_gap(*best)), None, np.exp), _estimate(float(best[2]))
    drawn = weights @ np.stack([row.draws["loss"] for row in everything])
    return _estimate(float(log_gap(*best)), log_gap(*drawn), np.exp), _estimate(float(best[2]), drawn[2])
