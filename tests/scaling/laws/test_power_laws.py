"""Power laws through the optima, and their predictions."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.simulated_sweep import fit_runs, runs_on, simulated

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import isoflop_fits as fit
from diffusionlm.scaling.laws import power_laws
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.bootstrap import Bootstrap
from diffusionlm.scaling.laws.noise import Noise


def test_a_law_without_a_budget_is_that_of_a_sweep_without_it():
    results = simulated()
    for name, fitted in analyse(results, full=False).objectives.items():
        for key, law in fitted.laws.items():
            assert [c for c, _ in law.without] == list(law.budgets)
            for c, exponent in law.without:
                fewer = [r for r in results if r.objective == name and r.budget != c]
                rows = [row for row in fitted.budgets if row.budget != c]
                again = analyse(fewer, full=False).objectives[name].laws[key]
                assert exponent.value == pytest.approx(again.exponent.value, rel=1e-6) and len(rows) == 3
                assert (exponent.low, exponent.high) != (law.exponent.low, law.exponent.high)
                moved = not law.exponent.low <= exponent.value <= law.exponent.high
                assert moved == (c in dict(law.decisive))


def test_a_law_needs_two_usable_optima():
    assert power_laws.laws([], None) == {}
    results = [r for r in simulated() if r.objective == "mdm" and r.budget == 5e13]
    analysis = analyse(results, full=False)
    assert analysis.objectives["mdm"].laws == {} and analysis.objectives["mdm"].prediction is None
    assert analysis.next_budget is None
    with pytest.raises(UserError, match="no finished cell"):
        analyse([replace(r, loss=float("nan")) for r in results])


def test_one_run_is_as_uncertain_as_the_law_and_a_seed_together():
    for fitted in analyse(simulated(), full=False).objectives.values():
        law, run = ((e.high - e.low) / 2 for e in (fitted.prediction.loss, fitted.prediction.loss_of_run))
        seed = stats.t.ppf(0.975, fitted.noise.dof) * fitted.noise.sd
        assert run == pytest.approx(np.hypot(law, seed), rel=0.15) and run > law


def test_the_bias_of_an_exponent_is_what_shifted_optima_would_change_it_by():
    results = simulated(sizes=6)
    middle = np.mean(np.log([r.params for r in results]))
    bent = [replace(r, loss=r.loss + 0.003 * (np.log(r.params) - middle) ** 3) for r in results]
    for fitted in analyse(bent, full=False).objectives.values():
        rows = [row.optimum for row in fitted.budgets]
        log_c = np.log([row.budget for row in rows])
        for key, law in fitted.laws.items():
            moved = {
                "params": [row.logs["params"] + row.shift_log_n for row in rows],
                "tokens": [row.logs["tokens"] - row.shift_log_n for row in rows],
                "loss": [np.log(np.exp(row.logs["loss"]) + row.shift_loss) for row in rows],
            }[key]
            again = fit.power_law(log_c, moved, [row.variances()[key] for row in rows])
            assert abs(law.shift_exponent) > 1e-5
            assert law.shift_exponent == pytest.approx(again.exponent - law.exponent.value, rel=0.05)


BUDGETS = (1e13, 4e13, 2e14, 5e14)


def optima_on(log_loss, budgets=BUDGETS, drawn=None):
    """Return optima at N* = 0.2 C^0.6 with noiseless losses; `drawn` are (draws, 3) coefficients at each budget."""
    optima = []
    for i, c in enumerate(budgets):
        log_n = np.log(0.2) + 0.6 * np.log(c)
        runs = runs_on(
            lambda x, c=c, n=log_n: np.exp(log_loss(np.log(c))) + 0.08 * (x - n) ** 2,
            budget=c,
            log_n=log_n + np.array([-1.2, -0.5, 0.0, 0.6, 1.1]),
        )
        optima.append(fit_runs(runs, None if drawn is None else drawn[i]).optimum)
    return optima


def power(log_c):
    return np.log(3.0) - 0.06 * (log_c - np.log(1e14))


def bent(log_c):
    return power(log_c) + 0.004 * (log_c - np.log(1e14)) ** 2


def test_laws_through_exact_optima_are_exact_everywhere():
    fits = power_laws.laws(optima_on(power), None)
    assert {key: law.exponent.value for key, law in fits.items()} == pytest.approx(
        {"params": 0.6, "tokens": 0.4, "loss": -0.06}, rel=1e-6
    )
    for c in (1e12, 1e14, 1e17):
        expected = (0.2 * c**0.6, c / 6 / (0.2 * c**0.6), np.exp(power(np.log(c))))
        assert [fits[key].at(c).value for key in ("params", "tokens", "loss")] == pytest.approx(expected, rel=1e-6)
        assert fits["loss"].log_at(c) == (pytest.approx(power(np.log(c))), None)
    for law in fits.values():
        assert law.budgets == BUDGETS and law.decisive == ()
        assert [c for c, _ in law.without] == list(BUDGETS)
        assert [e.value for _, e in law.without] == pytest.approx([law.exponent.value] * 4, rel=1e-6)


def test_a_law_is_an_extrapolation_by_the_factor_to_its_nearest_budget():
    law = power_laws.laws(optima_on(power), None)["loss"]
    for c, factor in ((1e12, 10), (1e13, 1), (1e14, 1), (5e14, 1), (2e15, 4)):
        assert law.extrapolation(c) == pytest.approx(factor)


def test_laws_through_two_and_three_budgets():
    two, three, four = (power_laws.laws(optima_on(power, BUDGETS[:n]), None) for n in (2, 3, 4))
    assert two["loss"].exponent.value == pytest.approx(-0.06, rel=1e-6)
    assert two["loss"].without == () and two["loss"].lack_of_fit is None
    assert len(three["loss"].without) == 3
    bootstrap = Bootstrap({}, 10, 0)
    for n, fits in ((2, two), (3, three), (4, four)):
        ahead = power_laws.predict(optima_on(power, BUDGETS[:n]), fits, bootstrap, 1e16, None)
        assert (ahead.hindcast is not None, ahead.bent_loss is not None) == (n >= 3, n >= 4)
        assert ahead.budget == 1e16 and ahead.loss_of_run.value == ahead.loss.value and ahead.loss.interval is None
        assert ahead.loss.value == pytest.approx(np.exp(power(np.log(1e16))), rel=1e-6)


def test_a_bent_law_is_followed_by_the_second_order_and_missed_by_the_law():
    """log L* on a parabola of log C: the bent prediction is exact, and the hindcast is the error of a straight line."""
    optima = optima_on(bent)
    ahead = power_laws.predict(optima, power_laws.laws(optima, None), Bootstrap({}, 10, 0), 1e16, None)
    assert ahead.bent_loss.value == pytest.approx(np.exp(bent(np.log(1e16))), rel=1e-6)
    assert abs(ahead.loss.value - ahead.bent_loss.value) > 0.01
    log_c = np.log(BUDGETS)
    weights = [1 / np.sqrt(optimum.variances()["loss"]) for optimum in optima[:3]]
    slope, intercept = np.polyfit(log_c[:3], bent(log_c[:3]), 1, w=weights)
    expected = np.exp(intercept + slope * log_c[3]) - np.exp(bent(log_c[3]))
    assert abs(expected) > 0.003
    assert ahead.hindcast.value == pytest.approx(expected, rel=1e-5)


def test_intervals_of_laws_and_predictions_are_those_of_laws_through_each_draw():
    """The second draw from either end of every derived number, against fits to each draw by itself."""
    rng = np.random.default_rng(0)
    exact = optima_on(bent)
    drawn = [o.parabola.coefficients + rng.normal(size=(60, 3)) * [0.01, 0.002, 0.001] for o in exact]
    optima = optima_on(bent, drawn=drawn)
    log_c, c = np.log(BUDGETS), 1e16
    exponents, at, second_order, errors = [], [], [], []
    for d in range(60):
        log_loss = np.array([o.draws["loss"][d] for o in optima])
        scales = np.array([1 / np.sqrt(o.variances()["loss"]) for o in optima])
        line = np.polyfit(log_c, log_loss, 1, w=scales)
        exponents.append(line[0])
        at.append(np.exp(np.polyval(line, np.log(c))))
        parabola = np.polyfit(log_c - log_c.mean(), log_loss, 2, w=scales)
        second_order.append(np.exp(np.polyval(parabola, np.log(c) - log_c.mean())))
        earlier = np.polyfit(log_c[:3], log_loss[:3], 1, w=scales[:3])
        errors.append(np.exp(np.polyval(earlier, log_c[3])) - np.exp(log_loss[3]))
    fits = power_laws.laws(optima, None)
    bootstrap = Bootstrap({optima[0].objective: Noise(0.02, 4, 2, False)}, 60, 0)
    ahead = power_laws.predict(optima, fits, bootstrap, c, None)
    for estimate, draws in (
        (fits["loss"].exponent, exponents),
        (fits["loss"].at(c), at),
        (ahead.loss, at),
        (ahead.bent_loss, second_order),
        (ahead.hindcast, errors),
    ):
        assert estimate.interval == pytest.approx((np.sort(draws)[1], np.sort(draws)[-2]), rel=1e-6)
    low, high = ahead.loss_of_run.interval
    assert low < ahead.loss.low and high > ahead.loss.high


def test_the_bias_of_an_exponent_is_unknown_if_that_of_an_optimum_is():
    shifted = [replace(o, shift_log_n=0.1, shift_loss=0.01) for o in optima_on(power)]
    assert power_laws.laws(shifted, None)["loss"].shift_exponent is not None
    for unknown in ({"shift_log_n": None}, {"shift_loss": None}, {"shift_log_n": np.nan, "shift_loss": np.nan}):
        fits = power_laws.laws([*shifted[:3], replace(shifted[3], **unknown)], None)
        assert all(law.shift_exponent is None for law in fits.values())
