"""The misfit of curves: its F test, and what intervals make of it."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.simulated_sweep import TRUTHS, simulated

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import curves, misfit
from diffusionlm.scaling.laws import isoflop_fits as fit
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.noise import Noise
from diffusionlm.scaling.laws.simulation import Truth, coverage, make_grid


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


def widens(budgets, sizes, spacing, rng, shape, sd=0.005, dof=8):
    """Return True if the F test rejects curves that are exact but for the noise."""
    alpha, beta = shape
    truth = Truth((6e5, 0.6), (3.95, -0.06), 0.07, sd, (alpha, beta))
    u = (np.arange(sizes) - (sizes - 1) / 2) * np.log(spacing)
    rise = np.array([truth.rise(offset) for offset in u])
    points = [curves.Points(15 + i + u, 3 + rise + sd * rng.standard_normal(sizes)) for i in range(budgets)]
    noise = Noise(sd * float(np.sqrt(rng.chisquare(dof) / dof)), dof, 4, False)
    shared = curves.fit_shape(points, noise.sd)
    fits = [curves.curve(at, shared.alpha, shared.beta) for at in points]
    return misfit.widened(noise, fits, [at.log_n for at in points], shared) != noise


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budgets", "sizes", "spacing"), [(2, 4, 3.0), (3, 4, 1.8), (3, 4, 3.0), (3, 5, 1.8), (4, 5, 1.8), (5, 7, 1.8)]
)
def test_the_f_test_of_all_curves_rejects_one_in_twenty_without_misfit(budgets, sizes, spacing):
    """Shapes are drawn from the prior; subtracting two rejects 26 and 12% of three narrow budgets."""
    rng = np.random.default_rng(0)
    shapes = np.exp(curves.TYPICAL + curves.WIDTH * rng.standard_normal((250, 2)))
    rejected = sum(widens(budgets, sizes, spacing, rng, shape) for shape in shapes)
    low, high = stats.binom.ppf([0.001, 0.999], 250, misfit.REJECTED)
    assert low <= rejected <= high


@pytest.mark.slow
def test_intervals_hold_on_three_budgets_of_four_sizes_with_misfit():
    """Losses scatter by 0.02 nats where their seeds say 0.005, as a recipe makes them that suits some sizes better."""
    truth = Truth((6e5, 0.60), (3.95, -0.06), 0.07, 0.02)
    grid = make_grid({"arm": truth}, (1e13, 3e13, 1e14), sizes=4, spacing=3.0, off_centre=0.0, repeated=0)
    shares = coverage(grid, {"arm": truth}, 300, draws=1000, noise=0.005)
    for quantity in ("params", "loss"):
        for place in ("exponent", "at the largest budget"):
            assert shares[f"arm {quantity} {place}"][0] >= 0.92, (quantity, place)


def test_one_spare_size_is_enough_to_see_a_misfit():
    """Two budgets of four sizes have eight losses, and their curves take six numbers."""
    runs = [run for run in simulated(noise=0.001, sizes=4) if run.budget <= 5e12 and run.seed == 0]
    sizes = sorted({run.params for run in runs if (run.objective, run.budget) == ("arm", 5e12)})
    wrong = [replace(r, loss=r.loss + 0.05) if r.params == sizes[2] and r.budget == 5e12 else r for r in runs]
    right, moved = (analyse(x, noise=0.001, draws=500, full=False).objectives["arm"] for x in (runs, wrong))
    assert right.used_noise == right.noise and right.shape.scatter < 0.003
    assert moved.used_noise.source == "curves" and moved.used_noise.sd > 0.01 and 1 <= moved.used_noise.dof <= 2
    for before, after in zip(right.budgets, moved.budgets, strict=True):
        assert after.optimum.loss.width > 5 * before.optimum.loss.width


def test_losses_that_leave_the_curves_by_more_than_the_noise_widen_all_intervals():
    """The noise that intervals use is then the scatter about the curves, whose degrees of freedom are few."""
    clean = simulated()
    quiet, loud = (analyse(clean, noise=sd, draws=500, full=False).objectives["mdm"] for sd in (0.02, 0.001))
    assert (quiet.noise, quiet.used_noise) == (quiet.used_noise, quiet.noise) and quiet.noise.sd == 0.02
    assert loud.noise.sd == 0.001 and loud.used_noise.source == "curves"
    assert 0.004 < loud.used_noise.sd < 0.025  # the truth is 0.01
    assert 4 * 5 - 3 * 4 - 2 < loud.used_noise.dof < 4 * 5 - 3 * 4  # a narrow grid hardly shows alpha and beta
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
