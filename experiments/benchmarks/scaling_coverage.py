"""Do the 95% intervals of scaling laws hold, with and without misfit?

Sweeps with known laws are simulated on three grids, and the share of intervals that contain the truth is printed:

    python experiments/benchmarks/scaling_coverage.py --replicates 400

The truth has two kinds of misfit: curves that are no parabolas, as all surfaces E + A / N^alpha + B / D^beta have them
("shape": those of the asymmetric surface of arXiv 2603.22339, alpha 0.465 and beta 0.155), and optima that scatter
about their laws by 10% in N and 0.5% in L ("scatter"). Without misfit the curves are Chinchilla's (0.34 and 0.28).
"""

import argparse
import json
from itertools import product

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
}
SHOWN = ("exponent", "at the largest budget", "ten times beyond")


def measure(grid: str, misfit: str, replicates: int, seed: int = 0) -> dict[str, tuple[float, int]]:
    """Return the share of intervals of N* and L* that contain the truth, and their number, by quantity."""
    half_width, sizes, drift = GRIDS[grid]
    truths = {"arm": Truth((6e5, 0.60), (3.95, -0.06), curvature=0.07, noise=0.003, **MISFITS[misfit])}
    spacing = half_width ** (2 / (sizes - 1))
    cells = make_grid(truths, BUDGETS, sizes, spacing, off_centre=0.0, repeated=2, drift=drift)
    shares = coverage(cells, truths, replicates, draws=1000, seed=seed)
    return {f"{key} {place}": shares[f"arm {key} {place}"] for key, place in product(("params", "loss"), SHOWN)}


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
