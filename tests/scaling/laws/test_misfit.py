"""The misfit of curves: its F test, and what intervals make of it."""

import numpy as np
import pytest
from scipy import stats
from support.simulated_sweep import TRUTHS, simulated

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import isoflop_fits as fit
from diffusionlm.scaling.laws import misfit
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.noise import Noise


def test_lack_of_fit_is_the_classic_f_test():
    runs = [r for r in simulated() if r.objective == "mdm" and r.budget == 5e12]
    x, y = np.log([r.params for r in runs]), np.array([r.loss for r in runs])
    noise = Noise(0.004, dof=4, cells=2, pooled=False)
    lack = misfit.curve_lack_of_fit(fit.parabola(x, y), x, noise)
    residual = np.sum((y - np.polyval(np.polyfit(x - x.mean(), y, 2), x - x.mean())) ** 2)
    pure = sum(np.sum((y[x == size] - y[x == size].mean()) ** 2) for size in np.unique(x))
    ratio = (residual - pure) / (5 - 3) / 0.004**2
    assert lack.p == pytest.approx(stats.f.sf(ratio, 2, 4))
    assert lack.sd == pytest.approx(0.004 * np.sqrt(max(ratio - 1, 0)))
    assert misfit.curve_lack_of_fit(fit.parabola(x[:3], y[:3]), x[:3], noise) is None


@pytest.mark.slow
def test_lack_of_fit_keeps_its_level_and_sees_a_wrong_curve():
    p_values = []
    for seed in range(150):
        for fitted in analyse(simulated(seed), draws=10, full=False).objectives.values():
            p_values += [row.optimum.lack_of_fit.p for row in fitted.budgets]
    # Uniform under the parabola; the budgets of a sweep share a noise estimate, so 300 are independent.
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 300))


def test_losses_that_leave_the_curves_by_more_than_the_noise_widen_all_intervals():
    """The noise that intervals use is then the scatter about the curves, whose degrees of freedom are few."""
    clean = simulated()
    quiet, loud = (analyse(clean, noise=sd, draws=500, full=False).objectives["mdm"] for sd in (0.02, 0.001))
    assert (quiet.noise, quiet.used_noise) == (quiet.used_noise, quiet.noise) and quiet.noise.sd == 0.02
    assert loud.noise.sd == 0.001 and loud.used_noise.source == "curves"
    assert 0.004 < loud.used_noise.sd < 0.025 and loud.used_noise.dof == 4 * 5 - 3 * 4 - 2  # the truth is 0.01
    assert any(
        "the losses scatter about the curves by" in line for line in analyse(clean, noise=0.001, draws=9).warnings
    )


def test_a_noise_that_is_no_standard_deviation_is_refused():
    for noise in (0.0, True, "residual"):
        with pytest.raises(UserError, match=f"noise={noise!r} must be the standard deviation"):
            analyse(simulated(), noise=noise)
    given = analyse(simulated(), noise=np.float32(0.005), draws=100, full=False)
    assert given.objectives["arm"].noise.source == "given"


def test_noise_from_residuals_is_labelled():
    analysis = analyse(simulated(), noise="residuals", draws=500, full=False)
    for name, fitted in analysis.objectives.items():
        assert fitted.noise.source == "residuals" and fitted.used_noise == fitted.noise
        assert fitted.noise.sd == pytest.approx(TRUTHS[name].noise, rel=0.7)
        assert fitted.laws["params"].exponent.bounded
    assert sum("rest on the scatter about the fitted curves" in line for line in analysis.warnings) == 2
