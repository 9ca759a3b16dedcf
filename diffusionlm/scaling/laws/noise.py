"""The noise of the cells of a sweep: between training seeds, and of the masks of the evaluation.

The noise of a run is measured where a cell was repeated with other seeds. It may also be given, or taken from the
residuals of the curves, which contain their misfit as well; it then says so (`Noise.source`).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws.curves import Shape
from diffusionlm.scaling.sweep.results import CellResult

MIN_SEEDS, MIN_REPEATED = 3, 2  # fewer say too little about the noise to put an interval on anything
RESIDUALS = "residuals"
NoiseOption = float | Literal["residuals"] | None  # of a run in nats; the scatter about the curves; that between seeds
EXACT_DOF = 1_000_000  # degrees of freedom of a noise that is known


@dataclass(frozen=True)
class Noise:
    """The standard deviation of the loss of a run, nats, how well it is known, and where it is from."""

    sd: float
    dof: float  # degrees of freedom of the estimate
    cells: int  # repeated cells, or fitted curves, that it comes from
    pooled: bool  # over all roads, or over all objectives where this one has too few repeats
    # "seeds"; "given" by the user; "residuals" of the curves, for want of seeds; or "curves" and, for roads,
    # "surfaces": the same where seeds or the user say that there is less noise than the losses scatter by.
    source: Literal["seeds", "given", "residuals", "curves", "surfaces"] = "seeds"


class CommonError(NamedTuple):
    """The error that the noise of the masks adds to all losses of one objective alike."""

    stderr: float  # nats; 0 where nothing is random, as for an ARM
    dof: int


class VarianceRatio(NamedTuple):
    """Two objectives compared by the variance between their seeds."""

    objective: str  # the one whose seeds scatter more
    ratio: float
    p: float  # two-sided F test


@dataclass(frozen=True)
class PairedError:
    """The noise of the masks in differences between the sizes of one budget, beside those differences (nats)."""

    stderr: float  # the largest over all pairs of sizes, from the differences draw by draw
    stderr_unpaired: float  # of the same pair, if each had been evaluated with masks of its own
    effect: float  # the largest minus the smallest loss over the sizes
    draws: int

    @property
    def small(self) -> bool:
        """True if the error is below a tenth of the effect."""
        return self.stderr < 0.1 * self.effect


def by_cell(results: Iterable[CellResult]) -> dict[tuple[str, float, int], list[CellResult]]:
    """Group runs that differ in nothing but their seed, by (objective, budget, size).

    Tokens take the place of the budget of runs that belong to none (NaN).
    """
    cells = defaultdict(list)
    for result in results:
        budget = float(result.tokens) if math.isnan(result.budget) else result.budget
        cells[result.objective, budget, result.params].append(result)
    return dict(cells)


def repeats(results: Iterable[CellResult]) -> dict[tuple[str, float, int], list[CellResult]]:
    """Return the cells with several seeds; runs of one seed are no repeats, whatever they differ in."""
    return {key: runs for key, runs in by_cell(results).items() if len({run.seed for run in runs}) > 1}


def seed_noise(results: Sequence[CellResult]) -> dict[str, Noise | None]:
    """Return the noise of each objective, pooled over its repeated cells; None where it cannot be estimated.

    An objective with three seeds in two cells is on its own, because a test for equal variances with so few would not
    notice that one is three times the other. With fewer it borrows the repeats of all objectives. Roads that differ in
    their autoregressive share are one objective here.
    """
    squares = defaultdict(list)  # objective -> (sum of squares, degrees of freedom) of each repeated cell
    for (objective, _, _), runs in repeats(results).items():
        losses = np.array([run.loss for run in runs])
        squares[objective].append((float(((losses - losses.mean()) ** 2).sum()), len(losses) - 1))
    everywhere = _pool([cell for cells in squares.values() for cell in cells], pooled=True)
    roads = {result.objective for result in results if result.arm_share}
    of_roads = _pool([cell for road in roads for cell in squares[road]], pooled=True)
    return {
        o: (of_roads if o in roads else _pool(squares[o], pooled=False)) or everywhere
        for o in sorted({r.objective for r in results})
    }


def check_noise(noise: object) -> NoiseOption:
    """Return a noise as `analyse` takes it: None, "residuals", or a positive number, also one that is written as text.

    Raises:
      UserError: it is anything else.
    """
    if noise is None or noise == RESIDUALS:
        return noise  # pyright: ignore[reportReturnType]  # the comparison says which
    try:
        sd = float(noise)  # pyright: ignore[reportArgumentType]  # what is no number is refused
    except (TypeError, ValueError):
        sd = math.nan
    if isinstance(noise, bool) or not 0 < sd < math.inf:
        raise UserError(
            f"noise={noise!r} must be the standard deviation of the loss between seeds in nats, such as 0.005, or "
            f"{RESIDUALS!r}"
        )
    return sd


def given_noise(sd: float) -> Noise:
    """Return the noise of a run as the user states it, known exactly."""
    return Noise(sd, EXACT_DOF, 0, False, "given")


def residual_noise(shape: Shape) -> Noise | None:
    """Return the scatter of the losses of one objective about its curves; None without a degree of freedom."""
    if not shape.scatter or not shape.dof:
        return None
    return Noise(shape.scatter, shape.dof, 0, False, "residuals")


def _pool(cells: Sequence[tuple[float, int]], pooled: bool) -> Noise | None:
    if sum(dof >= MIN_SEEDS - 1 for _, dof in cells) < MIN_REPEATED:
        return None
    total, dof = sum(square for square, _ in cells), sum(dof for _, dof in cells)
    return Noise(float(np.sqrt(total / dof)), dof, len(cells), pooled) if total > 0 else None


def variance_ratio(results: Sequence[CellResult]) -> VarianceRatio | None:
    """Compare the seeds of two objectives; None unless exactly two have repeats of their own."""
    noises = {name: noise for name, noise in seed_noise(results).items() if noise is not None and not noise.pooled}
    if len(noises) != 2:
        return None
    (name, high), (_, low) = sorted(noises.items(), key=lambda item: -item[1].sd)
    ratio = (high.sd / low.sd) ** 2
    return VarianceRatio(name, ratio, float(min(1.0, 2 * stats.f.sf(ratio, high.dof, low.dof))))


def common_error(results: Sequence[CellResult]) -> CommonError:
    """Estimate the error that the noise of the masks adds to all cells of one objective alike.

    Cells are evaluated with the same masks, so much of that noise is a common shift: it is in no difference between
    cells, seeds included, and yet in every loss.
    """
    draws = [result.loss_per_draw for result in results]
    if not draws or len({len(losses) for losses in draws}) != 1 or len(draws[0]) < 2:
        return CommonError(0.0, 0)
    mean = np.mean(draws, axis=0)  # over cells
    return CommonError(float(mean.std(ddof=1) / np.sqrt(len(mean))), len(mean) - 1)


def paired_error(results: Sequence[CellResult]) -> PairedError | None:
    """Return the error of differences between sizes; None where the losses of single draws cannot be paired.

    Args:
      results: the runs of one objective and budget.
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
    draws = [np.asarray(runs[0].loss_per_draw) for runs in sizes.values()]

    def stderr(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / np.sqrt(count))

    worst = max(combinations(draws, 2), key=lambda pair: stderr(pair[0] - pair[1]))
    unpaired = float(np.hypot(stderr(worst[0]), stderr(worst[1])))
    return PairedError(stderr(worst[0] - worst[1]), unpaired, effect, count)
