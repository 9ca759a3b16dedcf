"""Candidates for the next cell: their worth is what a refit with them shows."""

from dataclasses import replace

import numpy as np
import pytest
from support.simulated_sweep import simulated

from diffusionlm.scaling.laws import curves, next_cells
from diffusionlm.scaling.laws import isoflop_fits as fit
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.optima import fit_budget


def test_what_a_candidate_teaches_is_what_a_refit_with_it_shows():
    fitted = analyse(simulated()).objectives["mdm"]
    rows, ahead = [row.optimum for row in fitted.budgets], fitted.prediction.budget

    def variance(rows, key):
        """Return that of the law ahead, whose budgets have a random effect that no run takes anything off."""
        effect = (fitted.laws[key].lack_of_fit.sd / fitted.used_noise.sd) ** 2
        variances = np.array([r.variances()[key] for r in rows]) + effect
        weights = fit.power_law(np.log([r.budget for r in rows]), [0.0] * 4, variances).weights
        at = np.array([1, np.log(ahead) - np.mean(np.log([r.budget for r in rows]))]) @ weights
        return at**2 @ variances

    for candidate in [c for c in fitted.candidates if c.kind != "next budget"][::9]:
        extended = []
        for fits in fitted.budgets:
            row = fits.optimum
            if row.budget == candidate.budget:
                # A run exactly on the curve moves no coefficient, so only variances change.
                x = np.log(candidate.params)
                extra = replace(fits.runs[0], params=candidate.params, loss=float(row.curve(x)))
                points = curves.Points(np.append(row.log_n, x), np.append(row.losses, extra.loss))
                more = curves.curve(points, row.curve.alpha, row.curve.beta)
                np.testing.assert_allclose([more.log_n, more.loss], [row.curve.log_n, row.curve.loss])
                row = fit_budget([*fits.runs, extra], None, more, None, None).optimum
            extended.append(row)
        for key, reduction in (("loss", candidate.loss_reduction), ("params", candidate.params_reduction)):
            assert 1 - variance(extended, key) / variance(rows, key) == pytest.approx(reduction)


def test_a_candidate_at_the_next_budget_is_a_bayesian_update():
    fitted = analyse(simulated()).objectives["arm"]
    rows, ahead = [row.optimum for row in fitted.budgets], fitted.prediction.budget
    designs = [next_cells._design(row) for row in rows]
    before = next_cells._variances(designs, rows, fitted.laws, ahead, fitted.used_noise)
    curvature = np.mean([row.curve.curvature for row in rows])
    for candidate in [c for c in fitted.candidates if c.kind == "next budget"]:
        offset = np.log(candidate.params / fitted.prediction.params.value)
        gradient = np.array([fitted.prediction.loss.value, -2 * curvature * offset])
        after = np.linalg.inv(np.diag(1 / before) + np.outer(gradient, gradient))  # information adds
        np.testing.assert_allclose(
            1 - np.diag(after) / before, [candidate.loss_reduction, candidate.params_reduction], atol=1e-9
        )
    assert fitted.candidates[0].loss_reduction == max(c.loss_reduction for c in fitted.candidates)
