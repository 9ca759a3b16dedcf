"""The misfit of parabolas: its F test, and the bias of curves that are not symmetric."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.simulated_sweep import TRUTHS, simulated

from diffusionlm.scaling.laws import isoflop_fits as fit
from diffusionlm.scaling.laws import misfit
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.noise import Noise


def test_lack_of_fit_is_the_classic_f_test():
    runs = [r for r in simulated() if r.objective == "mdm" and r.budget == 5e12]
    x, y = np.log([r.params for r in runs]), np.array([r.loss for r in runs])
    noise = Noise(0.004, dof=4, cells=2, pooled=False)
    lack = misfit.parabola_lack_of_fit(fit.parabola(x, y), x, noise)
    residual = np.sum((y - np.polyval(np.polyfit(x - x.mean(), y, 2), x - x.mean())) ** 2)
    pure = sum(np.sum((y[x == size] - y[x == size].mean()) ** 2) for size in np.unique(x))
    ratio = (residual - pure) / (5 - 3) / 0.004**2
    assert lack.p == pytest.approx(stats.f.sf(ratio, 2, 4))
    assert lack.sd == pytest.approx(0.004 * np.sqrt(max(ratio - 1, 0)))
    assert misfit.parabola_lack_of_fit(fit.parabola(x[:3], y[:3]), x[:3], noise) is None


@pytest.mark.slow
def test_lack_of_fit_keeps_its_level_and_sees_a_wrong_curve():
    p_values = []
    for seed in range(150):
        for fitted in analyse(simulated(seed), draws=10, full=False).objectives.values():
            p_values += [row.optimum.lack_of_fit.p for row in fitted.budgets]
    # Uniform under the parabola; the budgets of a sweep share a noise estimate, so 300 are independent.
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 300))
    bent = []
    for r in simulated():
        z = np.log(r.params) - TRUTHS[r.objective].log_at("params", r.budget)
        bent.append(replace(r, loss=r.loss + 0.05 * z**3))
    analysis = analyse(bent, draws=100, full=False)
    assert all(fitted.asymmetry.p < 0.05 for fitted in analysis.objectives.values())
    assert any("not symmetric" in line for line in analysis.warnings)


def test_the_bias_of_an_asymmetric_curve_is_what_a_cubic_takes_back():
    log_n = [np.log(3e5) + np.array([-1.3, -0.6, 0.1, 0.6, 1.2]), np.log(9e5) + np.array([-1.1, -0.5, 0.0, 0.7, 1.4])]
    truth = [np.log(3e5), np.log(9e5)]
    loss = [4 + 0.08 * (x - x0) ** 2 + 0.02 * (x - x0) ** 3 for x, x0 in zip(log_n, truth, strict=True)]
    fits = [fit.parabola(x, y) for x, y in zip(log_n, loss, strict=True)]
    bias = misfit.asymmetry(fits, log_n, loss, None)
    assert bias.cubic.value == pytest.approx(0.02)
    for fitted, x0, shift, loss_shift in zip(fits, truth, bias.shift_log_n, bias.shift_loss, strict=True):
        assert abs(fitted.log_n - x0) > 0.02
        assert fitted.log_n + shift == pytest.approx(x0)
        assert fitted.loss + loss_shift == pytest.approx(4)
