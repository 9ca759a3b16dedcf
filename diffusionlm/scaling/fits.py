"""Scaling laws of arrays and tables, without a report: what `dlm.scaling` has besides types.

Losses are in nats per token, compute in FLOPs. The functions take what NumPy takes; a mistake is a `UserError` that
names the row. What is doubtful is in the `warnings` of the result or, where a function returns one fit, a
`ScalingWarning` for each line.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from diffusionlm.scaling.laws.surface_fit import TERMS, SurfaceFit
from diffusionlm.scaling.laws.warnings import of_objective
from diffusionlm.scaling.sweep import point_groups, points
from diffusionlm.scaling.sweep.points import Points, Unit


class ScalingWarning(UserWarning):
    """A doubt about runs that were given, or about what was fitted to them."""


def read_points(
    source: epath.PathLike | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    unit: Unit = "nats",
    use: Sequence[str] = (),
    counted: str = "",
) -> list[Points]:
    """Read the points of other people's sweeps, one group for each source and corpus.

    Args:
      source: a CSV file, a mapping of columns such as a data frame, or a list of mappings, one for each run. Columns:
        objective, params, tokens, loss, and those that there are of budget_flops, flops, seed, source, corpus, flag.
      unit: the unit of the losses, "nats" or "bits" per token; bits become nats.
      use: flags of the rows to use, "unflagged" among them; empty: unflagged, synthetic and no_budget.
      counted: which parameters are counted, for the page of a report.

    Returns:
      The groups; their `warnings` name rows that are doubtful, and `left_out` has the rows that are not used.

    Raises:
      UserError: a column is missing, a row is wrong, or no row is left to fit.
    """
    return point_groups.groups(points.read(source, unit), use=use, unit=unit, counted=counted)


def fit_points(group: Points, noise: NoiseOption = None) -> Analysis:
    """Fit everything that the points of one group allow: optima, power laws, gaps and a prediction.

    Args:
      group: one of the groups that `read_points` returned.
      noise: the standard deviation of the loss between seeds, nats whatever the unit of the file; "residuals": the
        scatter about the fitted curves, which contains misfit; None: as repeated seeds show it.

    Returns:
      The fits; their `warnings` are those of the points and those of the fits.

    Raises:
      UserError: this is no group, or `noise` is wrong.
    """
    if not isinstance(group, Points):
        raise UserError(
            f"fit_points takes one group, not a {type(group).__name__}; read_points returns a list of them, such as "
            "[group] = read_points(...)"
        )
    analysis = analyse(group.results, noise=noise)
    return replace(analysis, warnings=(*group.warnings, *analysis.warnings), left_out=group.left_out)


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

    Every doubt about the runs or the fits is a `ScalingWarning`.

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
    columns = {"budget_flops": budget, "params": params, "tokens": tokens, "loss": loss}
    fit, lines = _fit(columns, objective, noise)
    _warn([*lines, *of_objective(fit)])
    return fit


def fit_surface(
    params: ArrayLike, tokens: ArrayLike, loss: ArrayLike, *, objective: str = "arm", noise: NoiseOption = None
) -> SurfaceFit:
    """Fit L = E + A / N^alpha + B / D^beta to runs of any budgets, by least squares with variable projection.

    E, A and B are solved for, and only alpha and beta are searched, as the VPNLS of 2603.22339 does.

    Args:
      params: (runs,) N.
      tokens: (runs,) D.
      loss: (runs,) nats per token.
      objective: as for `fit_isoflops`.
      noise: as for `fit_points`; runs have no seeds here.

    Returns:
      The surface with C = 6 N D; its intervals use the scatter of the losses about it if that is larger than the noise.

    Raises:
      UserError: there are fewer than seven different runs; or as for `fit_isoflops`.
    """
    fit, lines = _fit({"params": params, "tokens": tokens, "loss": loss}, objective, noise)
    if fit.surface is None:
        raise _no_surface(fit, TERMS + 2)
    undetermined = "these runs do not determine the surface: a term is at its bound, or the exponent of N* may be any"
    _warn(lines if fit.surface.determined else [*lines, undetermined])
    return fit.surface


def fit_parametric(
    params: ArrayLike, tokens: ArrayLike, loss: ArrayLike, *, objective: str = "arm", noise: NoiseOption = None
) -> Parametric:
    """Fit L = E + A / N^alpha + B / D^beta to runs of any budgets, as Approach 3 of 2203.15556 does.

    It minimises the Huber loss of log L, so single runs that are far off move it less than `fit_surface`.

    Args:
      params: (runs,) N.
      tokens: (runs,) D.
      loss: (runs,) nats per token.
      objective: as for `fit_isoflops`.
      noise: as for `fit_points`; runs have no seeds here.

    Returns:
      The law with C = 6 N D; where the noise is unknown, its standard errors are those of the scatter about it.

    Raises:
      UserError: there are fewer than six different runs, or losses that do not change with N and D; or as for
        `fit_isoflops`.
    """
    fit, lines = _fit({"params": params, "tokens": tokens, "loss": loss}, objective, noise)
    if fit.parametric is None:
        raise _no_surface(fit, TERMS + 1)
    undetermined = "these runs do not determine the exponents: an error is more than half of one, or E is zero"
    _warn(lines if fit.parametric.determined else [*lines, undetermined])
    return fit.parametric


def _fit(columns: Mapping[str, ArrayLike], objective: str, noise: NoiseOption) -> tuple[ObjectiveFit, Sequence[str]]:
    """Fit arrays of one objective, and return the fits and the warnings about the rows."""
    arrays = {name: _array(name, values) for name, values in columns.items()}
    arrays["objective"] = np.full(len(arrays["params"]), objective)
    [group] = read_points(arrays)
    [fit] = analyse(group.results, noise=noise).objectives.values()
    return fit, group.warnings


def _array(name: str, values: ArrayLike) -> np.ndarray:
    """Return values as a flat array; raise `UserError` for one number or ragged lists."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise UserError(
            f"{name} must be an array with a number for each run: its rows are of several lengths"
        ) from error
    if array.ndim == 0:
        raise UserError(f"{name}={repr(values)[:40]} must be an array with a number for each run")
    return np.ravel(array)


def _no_surface(fit: ObjectiveFit, needed: int) -> UserError:
    """Return the error of runs that are too few, or whose losses do not change."""
    different = len({(run.params, run.tokens) for run in fit.runs})
    if different < needed:
        return UserError(f"a surface has five numbers, so it needs {needed} different runs; these are {different}")
    return UserError("a surface cannot be fitted to losses that do not change with both N and D")


def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        warnings.warn(line, ScalingWarning, stacklevel=3)


def published_laws() -> dict[str, PublishedLaw]:
    """Return the published laws that come with this package, by the names that overlays of reports have."""
    return {name: published.get(name) for name in published.names()}
