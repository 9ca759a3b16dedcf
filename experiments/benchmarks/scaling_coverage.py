"""Do the 95% intervals of scaling laws hold, with and without misfit?

Sweeps with known laws are simulated on three grids, and the share of intervals that contain the truth is printed:

    python experiments/benchmarks/scaling_coverage.py --replicates 400

The truth has two kinds of misfit: curves that are no parabolas, as all surfaces E + A / N^alpha + B / D^beta have them
("shape": those of the asymmetric surface of arXiv 2603.22339, alpha 0.465 and beta 0.155), and optima that scatter
about their laws by 10% in N and 0.5% in L ("scatter"). Without misfit the curves are Chinchilla's (0.34 and 0.28), or
each sweep has a shape that is drawn from the prior of the fits ("drawn"), under which intervals are meant to hold.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import numpy as np

from diffusionlm.scaling.laws import curves
from diffusionlm.scaling.laws.simulation import Truth, coverage, make_grid

BUDGETS = (1e13, 3e13, 1e14, 3e14, 1e15, 3e15)
GRIDS = {  # half width of the grid as a factor of N, sizes, and the factor by which its middle drifts off
    "narrow": (2.0, 7, 1.0),
    "wide": (16.0, 9, 1.0),
    "drifting": (8.0, 9, 3.0),
}
MISFITS = {
    "none": {"shape": (0.34, 0.28)},
    "shape": {"shape": (0.465, 0.155)},
    "scatter": {"shape": (0.34, 0.28), "scatter": (0.1, 0.005)},
    "both": {"shape": (0.465, 0.155), "scatter": (0.1, 0.005)},
    "drawn": {},
}
SHOWN = ("exponent", "at the largest budget", "ten times beyond")


def measure(grid: str, misfit: str, replicates: int, seed: int = 0) -> dict[str, tuple[float, int]]:
    """Return the share of intervals of N* and L* that contain the truth, and their number, by quantity."""
    if misfit != "drawn":
        return _coverage(grid, MISFITS[misfit], replicates, seed)
    sweeps = [_coverage(grid, {"shape": shape}, 1, seed + i) for i, shape in enumerate(_shapes(replicates, seed), 1)]
    totals = {}
    for key in dict.fromkeys(key for sweep in sweeps for key in sweep):
        shares = [sweep[key] for sweep in sweeps if key in sweep]
        count = sum(number for _, number in shares)
        totals[key] = sum(share * number for share, number in shares) / count, count
    return totals


def _shapes(count: int, seed: int) -> Iterator[tuple[float, float]]:
    """Yield the alpha and beta of curves, drawn from the prior."""
    for logs in curves.TYPICAL + curves.WIDTH * np.random.default_rng(seed).standard_normal((count, 2)):
        alpha, beta = np.exp(logs).tolist()
        yield alpha, beta


def _coverage(grid: str, misfit: Mapping[str, Any], replicates: int, seed: int) -> dict[str, tuple[float, int]]:
    """Return the shares of sweeps of one truth; a quantity that no sweep has an interval of is missing."""
    half_width, sizes, drift = GRIDS[grid]
    truths = {"arm": Truth((6e5, 0.60), (3.95, -0.06), curvature=0.07, noise=0.003, **misfit)}
    spacing = half_width ** (2 / (sizes - 1))
    cells = make_grid(truths, BUDGETS, sizes, spacing, off_centre=0.0, repeated=2, drift=drift)
    shares = coverage(cells, truths, replicates, draws=1000, seed=seed)
    names = [f"{key} {place}" for key, place in product(("params", "loss"), SHOWN)]
    return {name: shares[f"arm {name}"] for name in names if f"arm {name}" in shares}


def main() -> None:
    """Print one line of JSON for each grid and misfit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=400, help="simulated sweeps for each line")
    parser.add_argument("--grid", choices=GRIDS, help="this one only")
    parser.add_argument("--misfit", choices=MISFITS, help="this one only")
    arguments = parser.parse_args()
    for grid, misfit in product(GRIDS, MISFITS):
        if arguments.grid in (None, grid) and arguments.misfit in (None, misfit):
            shares = measure(grid, misfit, arguments.replicates)
            print(json.dumps({"grid": grid, "misfit": misfit, **{key: round(s, 3) for key, (s, _) in shares.items()}}))


if __name__ == "__main__":
    main()
