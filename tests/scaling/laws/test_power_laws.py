"""Power laws through the optima, and their predictions."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.simulated_sweep import TRUTHS, fit_runs, runs_on, simulated

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import isoflop_fits as fit
from diffusionlm.scaling.laws import power_laws
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.bootstrap import Bootstrap
from diffusionlm.scaling.laws.noise import Noise


def test_a_law_without_a_budget_is_the_law_through_the_others():
    for fitted in analyse(simulated(), full=False).objectives.values():
        bootstrap = Bootstrap({fitted.objective: fitted.used_noise}, 10_000, 0)
        rows = {row.budget: row.optimum for row in fitted.budgets}
        for key, law in fitted.laws.items():
            assert [c for c, _ in law.without] == list(law.budgets)
            for c, exponent in law.without:
                others = [optimum for budget, optimum in rows.items() if budget != c]
                again = power_laws.laws(others, fitted.used_noise, bootstrap)[key]
                assert exponent.value == pytest.approx(again.exponent.value)
                assert exponent.width == pytest.approx(again.exponent.width, rel=0.2)
                assert (c in dict(law.decisive)) == law.exponent.excludes(exponent.value)


def test_a_law_needs_two_usable_optima():
    assert power_laws.laws([], None, NOTHING) == {}
    results = [r for r in simulated() if r.objective == "mdm" and r.budget == 5e13]
    analysis = analyse(results, full=False)
    assert analysis.objectives["mdm"].laws == {} and analysis.objectives["mdm"].prediction is None
    assert analysis.next_budget is None
    with pytest.raises(UserError, match="no finished cell"):
        analyse([replace(r, loss=float("nan")) for r in results])


def test_one_run_is_as_uncertain_as_the_law_its_budget_and_a_seed_together():
    """Without a random effect its error is that of the law and of a seed; with one it is larger."""
    for fitted in analyse(simulated(seed=1), full=False).objectives.values():
        law, run = (e.width / 2 for e in (fitted.prediction.loss, fitted.prediction.loss_of_run))
        together = np.hypot(law, stats.t.ppf(0.975, fitted.noise.dof) * fitted.noise.sd)
        if fitted.objective == "mdm":
            assert fitted.laws["loss"].lack_of_fit.sd == 0 and run == pytest.approx(together, rel=0.15)
        else:
            assert fitted.laws["loss"].lack_of_fit.sd > 0 and run > 1.2 * together


def test_the_exponent_of_plain_parabolas_is_reported_beside_that_of_the_curves():
    """The difference is what a law through the parabolas' minima, with the same weights, has less."""
    truths = {name: replace(truth, shape=(0.465, 0.155)) for name, truth in TRUTHS.items()}
    for fitted in analyse(simulated(sizes=7, truths=truths, drift=3.0), full=False).objectives.values():
        rows = fitted.budgets
        log_c = np.log([row.budget for row in rows])
        for key, law in fitted.laws.items():
            if key != "tokens":
                plain = [row.parabola.log_n if key == "params" else np.log(row.parabola.loss) for row in rows]
                again = fit.power_law(log_c, plain, law.variances)
                assert abs(law.shift_exponent) > 1e-5
                assert law.shift_exponent == pytest.approx(law.exponent.value - again.exponent, rel=0.05)
        assert fitted.laws["tokens"].shift_exponent == pytest.approx(-fitted.laws["params"].shift_exponent)


BUDGETS = (1e13, 4e13, 2e14, 5e14)
NOTHING = Bootstrap({}, 10, 0)  # no noise, so no draws


def optima_on(log_loss, budgets=BUDGETS, drawn=None, off=None):
    """Return optima at N* = 0.2 C^0.6 with noiseless losses.

    `drawn` are (draws, 3) coefficients of parabolas at each budget, and `off` what is added to log N* by budget.
    """
    optima = []
    for i, c in enumerate(budgets):
        log_n = np.log(0.2) + 0.6 * np.log(c) + (off or {}).get(c, 0.0)
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
    fits = power_laws.laws(optima_on(power), None, NOTHING)
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
    law = power_laws.laws(optima_on(power), None, NOTHING)["loss"]
    for c, factor in ((1e12, 10), (1e13, 1), (1e14, 1), (5e14, 1), (2e15, 4)):
        assert law.extrapolation(c) == pytest.approx(factor)


def test_laws_through_two_and_three_budgets():
    two, three, four = (power_laws.laws(optima_on(power, BUDGETS[:n]), None, NOTHING) for n in (2, 3, 4))
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
    ahead = power_laws.predict(optima, power_laws.laws(optima, None, NOTHING), NOTHING, 1e16, None)
    assert ahead.bent_loss.value == pytest.approx(np.exp(bent(np.log(1e16))), rel=1e-6)
    assert abs(ahead.loss.value - ahead.bent_loss.value) > 0.01
    log_c = np.log(BUDGETS)
    slope, intercept = np.polyfit(log_c[:3], bent(log_c[:3]), 1)
    expected = np.exp(intercept + slope * log_c[3]) - np.exp(bent(log_c[3]))
    assert abs(expected) > 0.003
    assert ahead.hindcast.value == pytest.approx(expected, rel=1e-5)


def test_intervals_of_laws_and_predictions_are_those_of_laws_through_each_draw():
    """The second draw from either end of every derived number, against fits to each draw by itself.

    The optima lie on a line within the noise, so that there is no random effect.
    """
    rng = np.random.default_rng(0)
    exact = optima_on(power)
    drawn = [o.curve.coefficients + rng.normal(size=(60, 3)) * [0.01, 0.002, 0.001] for o in exact]
    optima = optima_on(power, drawn=drawn)
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
    noise = Noise(0.02, 4, 2, False)
    bootstrap = Bootstrap({optima[0].objective: noise}, 60, 0)
    fits = power_laws.laws(optima, noise, bootstrap)
    assert fits["loss"].lack_of_fit.sd == 0
    ahead = power_laws.predict(optima, fits, bootstrap, c, noise)
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


def test_a_scatter_of_the_optima_widens_everything_and_evens_the_weights_out():
    """Optima far off their line: its interval is that of least squares, with the t of two degrees of freedom."""
    off = dict(zip(BUDGETS, (0.3, -0.3, -0.3, 0.3), strict=True))
    exact = optima_on(power, off=off)
    noise, draws = Noise(0.001, 10**6, 0, False, "given"), 40_000
    rng = np.random.default_rng(0)
    root = np.linalg.cholesky(exact[0].curve.unscaled)
    drawn = [o.curve.coefficients + noise.sd * rng.standard_normal((draws, 3)) @ root.T for o in exact]
    optima = optima_on(power, drawn=drawn, off=off)
    law = power_laws.laws(optima, noise, Bootstrap({optima[0].objective: noise}, draws, 0))["params"]
    log_c, log_n = np.log(BUDGETS), [o.logs["params"] for o in optima]
    line = stats.linregress(log_c, log_n)
    assert law.exponent.value == pytest.approx(line.slope, rel=1e-3)
    half = stats.t.ppf(0.975, 2) * line.stderr
    np.testing.assert_allclose(
        [law.exponent.low, law.exponent.high], [line.slope - half, line.slope + half], atol=0.1 * half
    )
    residual = np.sqrt(np.sum((log_n - line.intercept - line.slope * log_c) ** 2) / stats.chi2.median(2))
    assert law.lack_of_fit.sd == pytest.approx(residual, rel=0.05) and law.lack_of_fit.p < 1e-6


def test_the_bias_of_an_exponent_is_unknown_if_that_of_an_optimum_is():
    shifted = [replace(o, shift_log_n=0.1, shift_loss=0.01) for o in optima_on(power)]
    assert power_laws.laws(shifted, None, NOTHING)["loss"].shift_exponent is not None
    for unknown in ({"shift_log_n": None}, {"shift_loss": None}, {"shift_log_n": np.nan, "shift_loss": np.nan}):
        fits = power_laws.laws([*shifted[:3], replace(shifted[3], **unknown)], None, NOTHING)
        assert all(law.shift_exponent is None for law in fits.values())
