"""How noisy the cells of a sweep are, and what that does to everything that is computed from them.

The noise of a run is measured where a cell was repeated with other seeds, and nowhere else: residuals of a parabola
also hold its misfit, and with five points they have two degrees of freedom. The parametric bootstrap here draws the
noise variance as well as the fits, so that few repeats make wide intervals, as Student's t does; for log N* its
quantiles are Fieller's exact limits.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from diffusionlm.scaling.laws.fit import Parabola
from diffusionlm.scaling.sweep.results import CellResult

CONFIDENCE = 0.95
MIN_SEEDS, MIN_REPEATED = 3, 2  # fewer say too little about the noise to put an interval on anything


@dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval: None where the noise is unknown, infinite on a side that the data leave open."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def bounded(self) -> bool:
        return self.low is not None and bool(np.isfinite([self.low, self.high]).all())


@dataclass(frozen=True)
class Noise:
    """The standard deviation of the loss between seeds, nats, and how well it is known."""

    sd: float
    dof: int
    cells: int  # that were repeated
    pooled: bool  # over the objectives, because this one alone has too few repeats


@dataclass(frozen=True)
class PairedError:
    """Noise of the masks in the differences between the sizes of one budget, against what they differ by (nats)."""

    stderr: float  # the largest over all pairs of sizes, from the differences draw by draw
    stderr_unpaired: float  # the same pair, had the two been evaluated with masks of their own
    effect: float  # the largest minus the smallest loss over the sizes
    draws: int

    @property
    def small(self) -> bool:
        """Whether the error is below a tenth of the effect."""
        return self.stderr < 0.1 * self.effect


def by_cell(results: Iterable[CellResult]) -> dict[tuple, list[CellResult]]:
    """Runs that differ in nothing but their seed, by (objective, budget, size)."""
    cells = defaultdict(list)
    for result in results:
        cells[result.objective, result.budget, result.params].append(result)
    return dict(cells)


def seed_noise(results: Sequence[CellResult]) -> dict[str, Noise | None]:
    """The noise of each objective, pooled over its repeated cells; None where it cannot be estimated.

    An objective is on its own where it has three seeds in two cells, because a test for equal variances with so few
    would not notice that one is three times the other. With fewer it borrows the repeats of all objectives.
    """
    squares = defaultdict(list)  # objective -> (sum of squares, degrees of freedom) of a cell
    for (objective, _, _), runs in by_cell(results).items():
        losses = np.array([run.loss for run in runs])
        if len(losses) > 1:
            squares[objective].append((float(((losses - losses.mean()) ** 2).sum()), len(losses) - 1))
    everywhere = _pool([cell for cells in squares.values() for cell in cells], pooled=True)
    return {o: _pool(squares[o], pooled=False) or everywhere for o in sorted({r.objective for r in results})}


def _pool(cells: Sequence[tuple[float, int]], pooled: bool) -> Noise | None:
    if sum(dof >= MIN_SEEDS - 1 for _, dof in cells) < MIN_REPEATED:
        return None
    total, dof = map(sum, zip(*cells, strict=True))
    return Noise(float(np.sqrt(total / dof)), dof, len(cells), pooled) if total > 0 else None


def variance_ratio(results: Sequence[CellResult]) -> tuple[str, float, float] | None:
    """The objective whose seeds scatter more, by which ratio of variances, and the two-sided p value of the F test.

    None unless exactly two objectives have repeats of their own.
    """
    noises = {name: noise for name, noise in seed_noise(results).items() if noise is not None and not noise.pooled}
    if len(noises) != 2:
        return None
    (name, high), (_, low) = sorted(noises.items(), key=lambda item: -item[1].sd)
    ratio = (high.sd / low.sd) ** 2
    return name, ratio, float(min(1.0, 2 * stats.f.sf(ratio, high.dof, low.dof)))


def common_error(results: Sequence[CellResult]) -> tuple[float, int]:
    """What the noise of the masks adds to all cells of one objective alike: its standard error (nats), and dof.

    Cells are evaluated with the same masks, so that much of that noise is a common shift: it is in no difference
    between cells, seeds included, and yet in every loss. (0, 0) where nothing is random, as for an ARM.
    """
    draws = [result.loss_per_draw for result in results]
    if not draws or len({len(of_cell) for of_cell in draws}) != 1 or len(draws[0]) < 2:
        return 0.0, 0
    mean = np.mean(draws, axis=0)  # over cells
    return float(mean.std(ddof=1) / np.sqrt(len(mean))), len(mean) - 1


def paired_error(results: Sequence[CellResult]) -> PairedError | None:
    """The error of differences between the sizes of one budget; None where single draws are not there to be paired.

    Args:
      results: of one objective and budget.
    """
    sizes: dict[int, list[CellResult]] = defaultdict(list)
    for result in results:
        sizes[result.params].append(result)
    means = [np.mean([run.loss for run in runs]) for runs in sizes.values()]
    effect = float(max(means) - min(means))
    if len(sizes) < 2:
        return None
    if all(result.loss_stderr == 0 for result in results):
        return PairedError(0.0, 0.0, effect, max(len(result.loss_per_draw) for result in results))
    count = len(results[0].loss_per_draw)
    if count < 2 or any(len(result.loss_per_draw) != count for result in results):
        return None
    first = [np.asarray(runs[0].loss_per_draw) for runs in sizes.values()]

    def stderr(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / np.sqrt(count))

    worst = max(combinations(first, 2), key=lambda pair: stderr(pair[0] - pair[1]))
    unpaired = float(np.hypot(stderr(worst[0]), stderr(worst[1])))
    return PairedError(stderr(worst[0] - worst[1]), unpaired, effect, count)


class Bootstrap:
    """Draws of what the fits could have been, in common for everything that is derived from them.

    For each objective: the noise variance given its estimate (s^2 nu / chi^2_nu), then the coefficients of every
    parabola given the variance, then the common shift of the masks. These are draws from the posterior under the usual
    flat prior, so quantiles of a coefficient are Student's t.
    """

    def __init__(self, noises: Mapping[str, Noise | None], draws: int, seed: int):
        self.size = draws
        self._rng = np.random.default_rng(seed)
        self._sds: dict[str, np.ndarray] = {}
        drawn: dict = {}  # objectives that share an estimate share what it could have been
        for objective, noise in noises.items():
            if noise is not None:
                key = noise if noise.pooled else (noise, objective)
                if key not in drawn:
                    drawn[key] = noise.sd * np.sqrt(noise.dof / self._rng.chisquare(noise.dof, draws))
                self._sds[objective] = drawn[key]

    def known(self, objective: str) -> bool:
        return objective in self._sds

    def coefficients(self, objective: str, fits: Sequence[Parabola], common: tuple[float, int]) -> np.ndarray:
        """(draws, fits, 3) coefficients of the parabolas of one objective; `common` is its `common_error`."""
        sds = self._sds[objective]
        drawn = np.empty((self.size, len(fits), 3))
        for i, fit in enumerate(fits):
            values, vectors = np.linalg.eigh(fit.unscaled)
            root = vectors * np.sqrt(np.maximum(values, 0))
            drawn[:, i] = fit.coefficients + sds[:, None] * (self._rng.standard_normal((self.size, 3)) @ root.T)
        stderr, dof = common
        if stderr > 0:
            drawn[:, :, 0] += stderr * self._rng.standard_t(dof, self.size)[:, None]
        return drawn

    def new_run(self, objective: str) -> np.ndarray:
        """(draws,) the seed noise of one more run."""
        return self._sds[objective] * self._rng.standard_normal(self.size)


def estimate(
    value: float,
    draws: np.ndarray | None = None,
    transform: Callable[[float], float] = float,
    *,
    has_minimum: bool = False,
) -> Estimate:
    """A number with the central interval of its draws.

    A draw that is NaN (a parabola without a minimum) could lie anywhere, so it counts as lying beyond both ends: that
    is how Fieller's interval becomes unbounded when the curvature is not significant.

    Args:
      value: the estimate.
      draws: of the same; without them there is no interval.
      transform: increasing; applied to all numbers, as `np.exp` to logarithms.
      has_minimum: it is known that there is one, because it goes into a law, so that NaN is left out.
    """
    if draws is None:
        return Estimate(float(transform(value)))
    missing = np.isnan(draws)
    if has_minimum and not missing.all():
        draws, missing = draws[~missing], missing[~missing]
    tail = (1 - CONFIDENCE) / 2
    low = np.quantile(np.where(missing, -np.inf, draws), tail, method="lower")
    high = np.quantile(np.where(missing, np.inf, draws), 1 - tail, method="higher")
    with np.errstate(over="ignore"):  # a size of exp(1000) is as good as unbounded
        low, high = (float(transform(end)) if np.isfinite(end) else float(end) for end in (low, high))
    return Estimate(float(transform(value)), low, high)
