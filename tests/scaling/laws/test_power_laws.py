"""Power laws through the optima, and their predictions."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.simulated_sweep import simulated

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import isoflop_fits as fit
from diffusionlm.scaling.laws import power_laws
from diffusionlm.scaling.laws.analysis import analyse


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
