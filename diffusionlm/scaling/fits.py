"""Scaling laws of arrays and tables, without a report: what `dlm.scaling` has besides types.

Losses are in nats per token, compute in FLOPs. The functions take what NumPy takes; a mistake is a `UserError` that
names the row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from numpy.typing import ArrayLike

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import published
from diffusionlm.scaling.laws.analysis import Analysis, analyse
from diffusionlm.scaling.laws.noise import NoiseOption
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.parametric import Parametric
from diffusionlm.scaling.laws.published import PublishedLaw
from diffusionlm.scaling.sweep import point_groups, points
from diffusionlm.scaling.sweep.points import Points, Unit


def read_points(
    source: epath.PathLike | Mapping[str, Any],
    *,
    unit: Unit = "nats",
    use: Sequence[str] = (),
    counted: str = "",
) -> list[Points]:
    """Read the points of other people's sweeps, one group for each source and corpus.

    Args:
      source: a CSV file, or a mapping of columns such as a data frame. Columns: objective, params, tokens, loss, and
        those that there are of budget_flops, flops, seed, source, corpus, flag.
      unit: the unit of the losses, "nats" or "bits" per token; bits become nats.
      use: flags of the rows to use, "unflagged" among them; empty: unflagged, synthetic and no_budget.
      counted: which parameters are counted, for the page of a report.

    Raises:
      UserError: a column is missing, a row is wrong, or no row is left to fit.
    """
    return point_groups.groups(points.read(source, unit), use=use, unit=unit, counted=counted)


def fit_points(group: Points, noise: NoiseOption = None) -> Analysis:
    """Fit everything that the points of one group allow: optima, power laws, gaps and a prediction.

    Args:
      group: points that `read_points` returned.
      noise: the standard deviation of the loss between seeds, nats; "residuals": the scatter about the fitted curves,
        which contains misfit; None: as repeated seeds show it.
    """
    return analyse(group.results, noise=noise)


def fit_isoflops(
    budget: ArrayLike,
    params: ArrayLike,
    tokens: ArrayLike,
    loss: ArrayLike,
    *,
    objective: str = "arm",
    noise: NoiseOption = None,
) -> ObjectiveFit:
    """Fit a curve at each budget and power laws through their minima, as Approach 2 of 2203.15556 does with parabolas.

    Args:
      budget: (runs,) FLOPs; runs of one budget have the same number.
      params: (runs,) N.
      tokens: (runs,) D.
      loss: (runs,) nats per token.
      objective: what the losses are of: "arm", "mdm", "uniform", "mlm" or "prime".
      noise: as for `fit_points`; runs have no seeds here.

    Returns:
      The fit: `budgets` has the optimum of each budget, `laws` the power laws of "params", "tokens" and "loss".

    Raises:
      UserError: the arrays are of several lengths, or a number is out of its range.
    """
    return _fit({"budget_flops": budget, "params": params, "tokens": tokens, "loss": loss}, objective, noise)


def fit_surface(
    params: ArrayLike, tokens: ArrayLike, loss: ArrayLike, *, objective: str = "arm", noise: NoiseOption = None
) -> Parametric:
    """Fit L = E + A / N^alpha + B / D^beta to runs of any budgets (Approach 3 of Hoffmann et al. 2203.15556).

    Args:
      params: (runs,) N.
      tokens: (runs,) D.
      loss: (runs,) nats per token.
      objective: as for `fit_isoflops`.
      noise: as for `fit_points`; runs have no seeds here.

    Returns:
      The law with C = 6 N D; its standard errors are None where the noise is unknown.

    Raises:
      UserError: there are fewer than six different runs, or losses that do not change with N and D; or as for
        `fit_isoflops`.
    """
    fit = _fit({"params": params, "tokens": tokens, "loss": loss}, objective, noise)
    if fit.parametric is None:
        if len({(run.params, run.tokens) for run in fit.runs}) > 5:
            raise UserError("a surface cannot be fitted to losses that do not change with both N and D")
        raise UserError(f"a surface has five numbers, so it needs six different runs; these are {len(fit.runs)}")
    return fit.parametric


def _fit(columns: Mapping[str, ArrayLike], objective: str, noise: NoiseOption) -> ObjectiveFit:
    arrays = {name: np.ravel(np.asarray(values)) for name, values in columns.items()}
    arrays["objective"] = np.full(len(arrays["params"]), objective)
    [group] = read_points(arrays)
    return fit_points(group, noise).objectives[objective]


def published_laws() -> dict[str, PublishedLaw]:
    """Return the published laws that come with this package, by the names that overlays of reports have."""
    return {name: published.get(name) for name in published.names()}
