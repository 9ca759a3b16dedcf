"""Approach 1 against curves with known exponents."""

import numpy as np
import pytest
from support.simulated_sweep import TRUTHS

from diffusionlm.scaling.laws import envelope


def test_the_envelope_of_noiseless_curves_has_the_exponents_of_their_law():
    sizes = np.geomspace(3e4, 3e6, 15)
    c = np.geomspace(1e11, 5e13, 400)
    truth = TRUTHS["mdm"]
    curves = []
    for n in sizes:
        offset = np.log(n) - np.log(truth.params[0]) - truth.params[1] * np.log(c / 1e13)
        loss = truth.loss[0] * (c / 1e13) ** truth.loss[1] + truth.curvature * offset**2
        curves.append((n, list(zip(c, loss, strict=True))))
    fitted = envelope.envelope(curves, 1.6e12, 5e13)
    assert fitted.params_law.exponent == pytest.approx(truth.params[1], abs=0.03)  # sizes come in steps of 1.4
    assert fitted.loss_law.exponent == pytest.approx(truth.loss[1], abs=0.001)
    assert envelope.envelope(curves[:2], 1.6e12, 5e13) is None


def test_smoothing_keeps_straight_lines():
    x = np.sort(np.random.default_rng(0).uniform(28, 32, 80))
    at = np.linspace(x[0], x[-1], 30)
    np.testing.assert_allclose(envelope.smooth(x, 3 - 0.2 * x, at), 3 - 0.2 * at, atol=1e-6)


def test_the_ends_of_curves_make_no_spikes():
    c = np.geomspace(1e9, 1e10, 200)
    curves = [(n, list(zip(c, 3 * (c / 1e9) ** -0.05 + 0.01 * i, strict=True))) for i, n in enumerate((1e4, 2e4, 3e4))]
    noisy = [(n, [(x, y - (0.3 if x > 0.97e10 else 0)) for x, y in curve]) for n, curve in curves]
    smooth, spiked = (envelope.envelope(some, 2e9, 1e10) for some in (curves, noisy))
    assert smooth.c[-1] < 1e10 * np.exp(-0.9 * envelope.BANDWIDTH)
    assert np.abs(spiked.loss - smooth.loss).max() < 0.1
