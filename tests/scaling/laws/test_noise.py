"""The noise between seeds, and of the evaluation masks."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.simulated_sweep import TRUTHS, simulated

from diffusionlm.scaling.laws import noise


def test_noise_is_pooled_over_repeated_cells_of_an_objective():
    results = simulated()
    noises = noise.seed_noise(results)
    for name in TRUTHS:
        cells = [runs for key, runs in noise.by_cell(results).items() if key[0] == name and len(runs) > 1]
        assert [len(runs) for runs in cells] == [3, 3]
        variances = [np.var([run.loss for run in runs], ddof=1) for runs in cells]
        assert noises[name].sd == pytest.approx(np.sqrt(np.mean(variances)))
        assert (noises[name].dof, noises[name].cells, noises[name].pooled) == (4, 2, False)


def test_noise_is_borrowed_or_unknown_where_repeats_are_too_few():
    results = simulated()
    lean = [r for r in results if r.objective == "mdm" or r.seed == 0]
    noises = noise.seed_noise(lean)
    assert noises["arm"].pooled and not noises["mdm"].pooled
    assert noises["arm"].sd == noises["mdm"].sd
    one_cell = [r for r in results if r.seed == 0 or (r.objective == "mdm" and r.budget == 5e12)]
    assert noise.seed_noise(one_cell) == {"mdm": None, "arm": None}


def test_the_error_of_paired_differences():
    rng = np.random.default_rng(0)
    runs = [r for r in simulated() if r.objective == "mdm" and r.budget == 5e13]
    common, own = 0.2 * rng.standard_normal(16), 0.01 * rng.standard_normal((5, 16))
    runs = [
        replace(r, loss_per_draw=tuple(r.loss + common + noise_of_size), loss_stderr=0.05)
        for r, noise_of_size in zip(runs, own, strict=True)
    ]
    error = noise.paired_error(runs)
    pairs = [stats.sem(own[i] - own[j]) for i in range(5) for j in range(i)]
    assert error.stderr == pytest.approx(max(pairs))
    assert error.stderr_unpaired > 10 * error.stderr
    assert error.effect == pytest.approx(max(r.loss for r in runs) - min(r.loss for r in runs))
    assert error.small == (max(pairs) < 0.1 * error.effect)
    assert noise.paired_error([replace(r, loss_per_draw=r.loss_per_draw[:1]) for r in runs]) is None
