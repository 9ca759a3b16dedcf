"""Approach 1 of Hoffmann et al. (2203.15556): the envelope of all training curves. A cross-check, without intervals.

Its points share curves, so no error can be put on its exponents. A run that continues to a larger budget has a higher
learning rate than one that ends there, so the envelope lies too high.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffusionlm.scaling.laws.isoflop_fits import PowerLaw, power_law

POINTS = 60  # of the grid in C
BANDWIDTH = 0.15  # in log C: training losses are averaged over about 30% of the compute


@dataclass(frozen=True)
class Envelope:
    """The smallest smoothed training loss at each C, and power laws through the sizes and losses there."""

    c: np.ndarray  # (points,) FLOPs
    loss: np.ndarray  # (points,) nats per token
    params: np.ndarray  # (points,) the size with this loss
    used: np.ndarray  # (points,) bool: the size is neither the smallest nor the largest that has a curve there
    params_law: PowerLaw | None  # None with fewer than three sizes on the envelope
    loss_law: PowerLaw | None
    curves: tuple[tuple[float, np.ndarray, np.ndarray], ...]  # (N, C, smoothed loss) of each run


def envelope(
    curves: Sequence[tuple[float, Sequence[tuple[float, float]]]], first: float, last: float
) -> Envelope | None:
    """Return the envelope over a range of C; None where fewer than three sizes have a curve there.

    Args:
      curves: N and the points (FLOPs, training loss) of each run.
      first: the smallest C, FLOPs.
      last: the largest C, FLOPs.
    """
    if last <= first:
        return None
    grid = np.geomspace(first, last, POINTS)
    sizes = sorted({n for n, _ in curves})
    best = np.full((len(sizes), POINTS), np.inf)
    smoothed = []
    for n, curve in curves:
        c, loss = np.array([point for point in curve if point[0] > 0 and np.isfinite(point[1])], float).reshape(-1, 2).T
        if len(c) < 3:
            continue
        # At an end the window has one side only, and its line bends with the noise of a few points: leave ends out.
        inside = (grid >= c[0] * np.exp(BANDWIDTH)) & (grid <= c[-1] * np.exp(-BANDWIDTH))
        if not inside.any():
            continue
        values = smooth(np.log(c), loss, np.log(grid[inside]))
        smoothed.append((float(n), grid[inside], values))
        row = sizes.index(n)
        best[row, inside] = np.minimum(best[row, inside], values)
    reached = np.isfinite(best)
    covered = reached.sum(0) >= 3
    if covered.sum() < 3:
        return None
    best, reached, grid = best[:, covered], reached[:, covered], grid[covered]
    winner = best.argmin(0)
    smallest, largest = reached.argmax(0), len(sizes) - 1 - reached[::-1].argmax(0)
    used = (winner > smallest) & (winner < largest)
    params = np.array(sizes, float)[winner]
    loss = best.min(0)
    params_law = loss_law = None
    if len(set(winner[used])) >= 3:
        params_law, loss_law = (power_law(np.log(grid[used]), np.log(y[used])) for y in (params, loss))
    return Envelope(grid, loss, params, used, params_law, loss_law, tuple(smoothed))


def smooth(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Smooth by local linear regression with a Gaussian kernel.

    Unlike a running mean, it does not lag behind a falling curve.

    Args:
      x: (points,) log C.
      y: (points,) loss.
      at: (values,) log C of the smoothed values.

    Returns:
      (values,) smoothed losses.
    """
    offsets = x - at[:, None]
    weights = np.exp(-0.5 * (offsets / BANDWIDTH) ** 2) + 1e-12  # not all zero where logged points are far apart
    s0, s1, s2 = (np.sum(weights * offsets**k, 1) for k in range(3))
    determinant = s0 * s2 - s1**2
    return (s2 * (weights @ y) - s1 * ((weights * offsets) @ y)) / determinant
