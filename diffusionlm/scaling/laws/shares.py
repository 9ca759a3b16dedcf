"""The best autoregressive share of one budget: the minimum of a surface over size and share, with its interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import special

from diffusionlm.scaling.laws import surface as surfaces
from diffusionlm.scaling.laws.bootstrap import Bootstrap, Estimate, estimate
from diffusionlm.scaling.laws.misfit import LackOfFit, lack_of_fit
from diffusionlm.scaling.laws.noise import Noise, by_cell, common_error
from diffusionlm.scaling.laws.optima import QUANTITIES, REACH, tokens_of_size
from diffusionlm.scaling.laws.road_surfaces import RoadSurface, Surfaces, cells_of
from diffusionlm.scaling.laws.surface import Surface
from diffusionlm.scaling.sweep.results import CellResult

ROAD = "road"  # the name of the road with the best share of each budget


@dataclass(frozen=True)
class BestShare:
    """The minimum of the surface of one budget; `optima.Minimum` for laws and gaps."""

    budget: float  # FLOPs
    share: Estimate
    params: Estimate  # N*
    tokens: Estimate  # D*
    loss: Estimate  # L*, nats per token
    inside: bool  # between the smallest and the largest share, and size
    share_determined: bool  # its interval ends within `REACH` spacings of the shares that were run
    params_determined: bool  # that of N* likewise, of the sizes
    logs: Mapping[str, float] = field(repr=False)  # natural logarithms by QUANTITIES, and of the odds as "share"
    draws: Mapping[str, np.ndarray] = field(repr=False)  # (draws,) of the same; empty where the noise is unknown
    unscaled: Mapping[str, float] = field(repr=False)  # variances of `logs`, in units of the variance of one run
    objective: str = ROAD
    shift_log_n: float | None = None  # the bias of a surface is not estimated
    shift_loss: float | None = None

    @property
    def usable(self) -> bool:
        """True if laws and gaps use it."""
        return self.inside and self.share_determined and self.params_determined

    def variances(self) -> Mapping[str, float]:
        """Return the variances of `logs`, in units of the variance of one run (delta method)."""
        return self.unscaled


@dataclass(frozen=True)
class AtShare:
    """The best loss and size of one share at one budget."""

    share: float
    runs: int
    params: Estimate | None  # N* of the surface at this share; None without a surface, or too far from its minimum
    loss: Estimate | None
    best_params: int  # the size with the smallest mean loss that was measured
    best_loss: float
    autoregressive_loss: float | None  # of the same runs, the exact loss of the final network
    first_autoregressive_loss: float | None  # and when the autoregressive steps had ended


@dataclass(frozen=True)
class ShareFit:
    """All roads of one budget."""

    budget: float  # FLOPs
    runs: tuple[CellResult, ...]
    distant: tuple[CellResult, ...]  # those whose share is too far from the best for the surface
    surface: Surface | None  # None where the runs do not determine one
    drawn: np.ndarray | None = field(repr=False)  # (draws, 6) coefficients; None where the noise is unknown
    best: BestShare | None  # None without a minimum
    lack_of_fit: LackOfFit | None
    shares: tuple[AtShare, ...]

    def at(self, share: float) -> tuple[Estimate, Estimate]:
        """Return N* and L* of the surface at one share."""
        assert self.surface is not None
        x = float(special.logit(share)) - self.surface.centre[1]

        def values(coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            u, loss = surfaces.at_share(coefficients, x)
            return self.surface.centre[0] + u, loss  # pyright: ignore[reportOptionalMemberAccess]

        log_n, loss = map(float, values(self.surface.coefficients))
        drawn = (None, None) if self.drawn is None else values(self.drawn)
        return estimate(log_n, drawn[0], np.exp), estimate(loss, drawn[1])


def fit_shares(roads: Surfaces, bootstrap: Bootstrap) -> tuple[ShareFit, ...]:
    """Read the best share of each budget off its surface.

    Args:
      roads: the surfaces. What the noise of the masks adds to all losses alike is drawn once.
      bootstrap: the draws that everything shares, with the noise of the surfaces as that of `ROAD`.
    """
    drawn: list[np.ndarray | None] = [None] * len(roads.budgets)
    determined = [k for k, budget in enumerate(roads.budgets) if budget.fit]
    if determined and roads.used_noise:
        known = [budget.fit for budget in roads.budgets if budget.fit]
        common = common_error([run for budget in roads.budgets for run in budget.runs])
        coefficients = bootstrap.coefficients(ROAD, known, common)
        for i, k in enumerate(determined):
            drawn[k] = coefficients[:, i]
    return tuple(_share_fit(*parts, roads.noise) for parts in zip(roads.budgets, drawn, strict=True))


def _share_fit(budget: RoadSurface, drawn: np.ndarray | None, noise: Noise | None) -> ShareFit:
    """Return the fit of one budget, given its surface and what that could have been."""
    runs, fit, misfit, best = budget.runs, budget.fit, None, None
    if fit and budget.by_run:
        misfit = lack_of_fit(budget.by_run.residuals, cells_of(runs), surfaces.TERMS, noise)
        if np.isfinite(surfaces.minimum(fit.coefficients)[0]):
            best = _best(runs, fit, drawn)
    plain = ShareFit(runs[0].budget, runs, budget.distant, fit, drawn, best, misfit, ())
    shares = sorted({run.arm_share for run in (*runs, *budget.distant)})
    return replace(plain, shares=tuple(_at_share(plain, share) for share in shares))


def _best(runs: Sequence[CellResult], fit: Surface, drawn: np.ndarray | None) -> BestShare:
    tokens = tokens_of_size(runs, fit.centre[0])

    def logs(coefficients: np.ndarray) -> dict[str, np.ndarray]:
        u, x, loss = surfaces.minimum(coefficients)
        return {
            "params": fit.centre[0] + u,
            "tokens": np.polynomial.polynomial.polyval(u, tokens),
            "loss": np.log(np.where(loss > 0, loss, np.nan)),
            "share": fit.centre[1] + x,
        }

    best = {key: float(value) for key, value in logs(fit.coefficients).items()}
    draws = {} if drawn is None else logs(drawn)
    params, optimal_tokens, loss = (estimate(best[key], draws.get(key), np.exp) for key in QUANTITIES)
    share = estimate(best["share"], draws.get("share"), special.expit)
    of_u, of_x, of_loss = surfaces.variances(fit)
    grids = [np.unique(np.log([run.params for run in runs])), np.unique(special.logit([run.arm_share for run in runs]))]
    places = best["params"], best["share"]
    log_params = estimate(best["params"], draws.get("params"))
    log_odds = estimate(best["share"], draws.get("share"))
    return BestShare(
        budget=runs[0].budget,
        share=share,
        params=params,
        tokens=optimal_tokens,
        loss=loss,
        inside=all(bool(grid[0] <= place <= grid[-1]) for grid, place in zip(grids, places, strict=True)),
        share_determined=_ends_near(log_odds, grids[1]),
        params_determined=_ends_near(log_params, grids[0]),
        logs=best,
        draws=draws,
        unscaled={"params": of_u, "tokens": of_u, "loss": of_loss / np.exp(2 * best["loss"]), "share": of_x},
    )


def _ends_near(place: Estimate, grid: np.ndarray) -> bool:
    """Return True if an interval ends within `REACH` spacings of a grid, as `optima.Optimum.determined` asks of N*."""
    if place.interval is None:
        return True
    reach = REACH * float(np.median(np.diff(grid)))
    return bool(grid[0] - reach <= place.interval[0] and place.interval[1] <= grid[-1] + reach)


def _at_share(fit: ShareFit, share: float) -> AtShare:
    near = [run for run in fit.runs if run.arm_share == share]
    runs = near or [run for run in fit.distant if run.arm_share == share]
    best = min(by_cell(runs).values(), key=lambda cell: float(np.mean([run.loss for run in cell])))
    params, loss = fit.at(share) if fit.surface and near else (None, None)

    def mean(name: str) -> float | None:
        values = [value for run in best if (value := getattr(run, name)) is not None]
        return float(np.mean(values)) if values else None

    return AtShare(
        share,
        len(runs),
        params,
        loss,
        best[0].params,
        float(np.mean([run.loss for run in best])),
        mean("autoregressive_loss"),
        mean("first_autoregressive_loss"),
    )
