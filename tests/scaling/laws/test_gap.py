"""The compute gap between objectives."""

from dataclasses import replace

import numpy as np
import pytest
from support.simulated_sweep import TRUTHS, simulated

from diffusionlm.scaling.laws.analysis import analyse


def test_without_noise_the_laws_gap_and_prediction_are_exact():
    truths = {name: replace(truth, shape=(0.34, 0.28)) for name, truth in TRUTHS.items()}
    analysis = analyse(simulated(noise=0.0, truths=truths), full=False)
    for name, truth in truths.items():
        fitted = analysis.objectives[name]
        # Tokens and sizes are whole numbers.
        assert fitted.laws["params"].exponent.value == pytest.approx(truth.params[1], abs=1e-4)
        assert fitted.laws["tokens"].exponent.value == pytest.approx(1 - truth.params[1], abs=1e-4)
        assert fitted.laws["loss"].exponent.value == pytest.approx(truth.loss[1], abs=1e-6)
        ahead = fitted.prediction
        assert ahead.budget == pytest.approx(5e13 * (5e13 / 1.6e12) ** (1 / 3))
        assert ahead.loss.value == pytest.approx(np.exp(truth.log_at("loss", ahead.budget)))
        assert ahead.bent_loss.value == pytest.approx(ahead.loss.value)
        assert ahead.hindcast.value == pytest.approx(0, abs=1e-6)
        assert fitted.noise is None and ahead.loss.low is None
    gap = analysis.gaps[0]
    factor = (4.6 / 3.95) ** (1 / 0.06)
    assert gap.common.value == pytest.approx(factor, rel=1e-4)
    assert [e.value for _, e, _ in gap.at_budgets] == pytest.approx([factor] * 4, rel=1e-4)
    assert [inside for *_, inside in gap.at_budgets] == [True, False, False, False]  # 31 times between the budgets
    assert [e.value for _, e in gap.at_own] == pytest.approx([factor] * 4, rel=1e-4)
    needed = np.array([c for c, _ in gap.at_own]) / factor  # what the reference needs, which has run 1.6e12 and more
    np.testing.assert_allclose(gap.extrapolations[1], np.maximum(1.6e12 / needed, 1), rtol=1e-4)
    spent = np.array([c for c, *_ in gap.at_budgets]) * factor
    np.testing.assert_allclose(gap.extrapolations[0], np.maximum(spent / 5e13, 1), rtol=1e-4)
    middle = np.sqrt(1.6e12 * 5e13)
    assert gap.size_ratio_law.value == pytest.approx(0.5 * (middle / 1e13) ** -0.02, rel=1e-3)


@pytest.mark.slow
def test_laws_with_one_exponent_are_called_different_once_in_twenty():
    p = [analyse(simulated(seed=seed), draws=1000, full=False).gaps[0].equal_p for seed in range(300)]
    # Four standard errors of a share of 300 are 5%; the test is a little lax (Behrens and Fisher).
    assert 0.005 < np.mean(np.array(p) < 0.05) < 0.1 and 0.35 < np.mean(np.array(p) < 0.5) < 0.6
