"""A given noise that is not the scatter of the losses is named, and so is the budget that a wrong cell hides."""

import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.scaling_points import grid

from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.scatter import contrasts, too_large


def fit(cells, noise):
    analysis = analyse(cells, noise=noise, draws=300, full=False)
    return analysis, analysis.objectives["arm"]


def test_the_noise_that_the_losses_have_is_in_no_contrast():
    for seed in range(5):
        analysis, arm = fit(grid(4, 7, seed, 0.003), 0.003)
        assert contrasts(arm) == [] and "the given noise of 0.003 nats is" not in " ".join(analysis.warnings)


@pytest.mark.parametrize("noise", [0.01, 2.0])
def test_a_noise_that_is_far_too_large_is_named_and_the_data_are_not_blamed(noise):
    cells = grid(4, 7, 0, 0.001)
    analysis, arm = fit(cells, noise)
    contrast = too_large(arm)
    assert contrast.about == "curves" and contrast.scatter == pytest.approx(0.001, rel=0.4)
    # 28 losses less 3 for each of 4 curves, and up to 2 of the shape that they share: a chi-square of less than this.
    square = 14 * (contrast.scatter / noise) ** 2
    assert stats.chi2.cdf(square, 16) <= contrast.p <= max(stats.chi2.cdf(1.3 * square, 14), 1e-12)
    [line] = [line for line in analysis.warnings if "is larger than the scatter about the curves" in line]
    assert "(p < 1e-6)" in line and "--noise residuals" in line
    assert f"the given noise of {noise:.3g} nats is larger than the scatter" in analysis.verdict
    text = " ".join([*analysis.warnings, analysis.verdict])
    assert "went wrong" not in text and "more seeds" not in text
    assert (analysis.warnings.index(line) <= 1) if noise == 2 else arm.laws


def test_a_noise_that_is_too_small_for_a_surface_is_named():
    """No curve shows it where the runs are of no budget."""
    cells = [replace(cell, budget=np.nan) for cell in grid(4, 7, 0, 0.02)]
    analysis, arm = fit(cells, 0.01)
    [contrast] = contrasts(arm)
    assert not contrast.too_large and contrast.about == "surface"
    assert contrast.p == pytest.approx(stats.chi2.sf(23 * (contrast.scatter / 0.01) ** 2, 23), rel=0.01)
    assert "the given noise of 0.01 nats is smaller than the scatter about the surface, 0.0" in analysis.verdict
    assert contrasts(fit(cells, None)[1]) == contrasts(fit(cells, "residuals")[1]) == []


def test_the_verdict_of_a_surface_names_suspected_cells():
    cells = [replace(cell, budget=np.nan) for cell in grid(4, 7, 0, 0.002)]
    cells[9] = replace(cells[9], loss=cells[9].loss + 1.0)
    assert "so that only the surface is fitted; 1 of its cells is suspected" in fit(cells, 0.002)[0].verdict


def test_a_budget_whose_optimum_a_wrong_cell_hides_says_so():
    """Its own curve is good: without the wrong cell of another budget the law has it."""
    cells = grid(4, 7, 0, 0.002)
    wrong = [replace(cell, loss=cell.loss + 0.5 * (i == 10)) for i, cell in enumerate(cells)]
    analysis, arm = fit(wrong, 0.002)
    clean = {row.budget for row in fit(cells[:10] + cells[11:], 0.002)[1].budgets if row.usable}
    lost = {row.budget for row in arm.budgets if not row.usable}
    assert len(lost & clean) >= 2
    lines = [
        line for line in analysis.warnings if re.search("suspected cells .*hides? the optimum, so repeat them", line)
    ]
    places = " ".join(re.sub(r" \(.*?\)", "", line.split(": ")[0]) for line in lines)
    assert {float(place) for place in re.findall(r"[\d.]+e\+\d+", places)} == {float(f"{c:.3g}") for c in lost & clean}
    assert f"hides the optima of {len(lost & clean)} budgets, as the scatter that all are judged by" in analysis.verdict
    assert "more seeds" not in " ".join([*analysis.warnings, analysis.verdict])
