"""The runs of one budget, and of several of a surface."""

from dataclasses import replace

import numpy as np

from diffusionlm.scaling.laws.loss_surface import LossSurface
from diffusionlm.scaling.sweep.results import CellResult


def points():
    """Return log N and the loss of six runs, two of them of one size."""
    rng = np.random.default_rng(1)
    log_n = np.log(2e5) + np.array([-1.2, -0.5, -0.5, 0.1, 0.7, 1.3])
    return log_n, 4.2 + 0.09 * (log_n - np.log(2.3e5)) ** 2 + 0.01 * rng.standard_normal(6)


def grid(budgets, sizes, seed=0, noise=0.002):
    """Return runs of Chinchilla's surface, with sizes from a quarter of N* to four times."""
    surface = LossSurface(1.69, np.log(406.4), np.log(410.7), 0.34, 0.28, 6.0)
    rng, cells = np.random.default_rng(seed), []
    template = CellResult("", "arm", "", 0, 1.0, 1.0, 1, 1, 1, 10**15, 1, 1.0, 0.0, (), 1.0, ())
    for budget in np.geomspace(1e18, 3e19, budgets).tolist():
        best = surface.optimum(budget)[0]
        for factor in np.geomspace(1 / 4, 4, sizes):
            params, tokens = round(best * factor), round(budget / (6 * best * factor))
            loss = float(surface.loss(params, tokens)) + noise * rng.standard_normal()
            cells.append(replace(template, budget=budget, flops=budget, params=params, tokens=tokens, loss=loss))
    return cells
