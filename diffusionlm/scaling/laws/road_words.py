"""The verdict and the warnings about roads: what the best share is, and where a sweep does not determine it."""

from collections.abc import Iterator

import numpy as np

from diffusionlm.scaling.laws.bootstrap import Estimate
from diffusionlm.scaling.laws.budget_words import Note, merged
from diffusionlm.scaling.laws.diagnostics import REASONS, listed, p_words, suspicious
from diffusionlm.scaling.laws.noise import by_cell
from diffusionlm.scaling.laws.objective import FAR
from diffusionlm.scaling.laws.roads import Roads
from diffusionlm.scaling.laws.shares import ShareFit


def road_verdict(roads: Roads) -> str:
    """Return one sentence about the best share of each budget."""
    known = [f"{percent(best.share)} at {best.budget:.3g}" for best in roads.usable]
    unknown = [fit for fit in roads.budgets if not (fit.best and fit.best.usable)]
    parts = []
    if known:
        parts.append(
            f"The best share of the compute to spend as an autoregressive model first is {', '.join(known)} FLOPs"
        )
    if unknown:
        where = ", ".join(f"{fit.budget:.3g} FLOPs ({_lack(fit)})" for fit in unknown)
        parts.append(f"{'it' if known else 'The best autoregressive share'} is not determined at {where}")
    return "; ".join(parts) + "."


def percent(share: Estimate) -> str:
    """Return a share as a percentage with its interval."""
    ends = "" if share.interval is None else " [{}, {}]".format(*map(percentage, share_ends(share)))
    return percentage(share.value) + ends


def percentage(share: float) -> str:
    """Return a share as a percentage, with a decimal below one: "18%", "0.4%"."""
    return f"{100 * share:.{1 if 0.0005 <= share < 0.01 else 0}f}%"


def _ends(estimate: Estimate) -> str:
    ends = [f"{end:.3g}" if np.isfinite(end) else "unbounded" for end in estimate.interval or ()]
    return f"[{', '.join(ends)}]"


def share_ends(share: Estimate) -> tuple[float, float]:
    """Return the interval of a share, whose unbounded ends are 0 and 1."""
    assert share.interval is not None
    low, high = share.interval
    return max(low, 0.0), min(high, 1.0)


def road_warnings(roads: Roads | None) -> Iterator[str]:
    """Yield a line for everything about the best share that is missing or not to be trusted."""
    if roads is None:
        return
    used = roads.used_noise
    widened = used is not None and used.source == "surfaces"
    if used and widened:
        yield (
            f"roads: losses leave their surfaces by more than the noise explains, so intervals of the best shares use "
            f"the scatter about them, {used.sd:.3g} nats"
        )
    notes = (note for fit in roads.budgets for note in _notes(fit, widened))
    yield from (line for _, line in merged("roads", notes))
    repeated = [
        cell
        for cell in by_cell([r for fit in roads.budgets for r in (*fit.runs, *fit.distant)]).values()
        if len(cell) > 1
    ]
    if roads.noise is None:
        yield "roads: no intervals, because the noise is unknown: it takes three seeds in at least two cells"
    elif roads.noise.source != "seeds":
        return  # nothing was measured by seeds; the objectives say what the noise is
    elif roads.noise.cells > len(repeated):
        yield "roads: too few repeated seeds of their own; intervals use the noise of all objectives together"
    elif roads.budgets[-1].budget not in {cell[0].budget for cell in repeated}:
        yield (
            f"roads: no cell at {roads.budgets[-1].budget:.3g} FLOPs is repeated, so intervals and misfits there rest "
            "on noise that was measured at smaller budgets"
        )


def _notes(fit: ShareFit, widened: bool) -> Iterator[Note]:
    """Yield what is to be doubted of one budget; intervals contain the misfit of the surfaces if they are `widened`."""
    if fit.distant:
        left = listed([f"{100 * share:g}%" for share in sorted({run.arm_share for run in fit.distant})])
        yield Note(
            0,
            fit.budget,
            f"the share of {left} is in no surface, as its odds differ from those of the best measured share by more "
            f"than a factor of {FAR:g}",
        )
    if not (fit.best and fit.best.usable):
        yield Note(0, fit.budget, f"the best share is in no law and no gap: {_lack(fit)}")
    if fit.surface and fit.lack_of_fit and suspicious(fit.lack_of_fit):
        text = "losses leave the surface by so much beyond the noise"
        text += "" if widened else ", which no interval contains"
        yield Note(0, fit.budget, text, f"{fit.lack_of_fit.sd:.3g} nats, {p_words(fit.lack_of_fit.p)}")


def _lack(fit: ShareFit) -> str:
    """Return what a budget needs for a best share that is determined."""
    if len(fit.runs) > 1 and len({run.loss for run in fit.runs}) == 1:
        return REASONS["equal"]
    if fit.surface is None:
        cells = len({(run.arm_share, run.params) for run in fit.runs})
        return (
            f"{cells} {'combination of size and share does' if cells == 1 else 'combinations of size and share do'}"
            " not determine a quadratic in both, and three sizes at each of three shares do"
        )
    means = {at.share: at.best_loss for at in fit.shares}
    best = min(means, key=lambda share: means[share])
    sizes = sorted({run.params for run in fit.runs})
    measured = next(at.best_params for at in fit.shares if at.share == best)
    if best in (min(means), max(means)):
        end = "smallest" if best == min(means) else "largest"
        return f"the {end} share, {100 * best:g}%, is the best that was measured, so run {end[:-3]}er ones"
    if measured in (sizes[0], sizes[-1]):
        end = "smallest" if measured == sizes[0] else "largest"
        return f"the {end} size is the best at the best measured share, so run {end[:-3]}er ones"
    if fit.best and fit.best.inside:
        if not fit.best.share_determined:
            what, of = f"the best share, {percent(fit.best.share)}", "shares"
        else:
            what, of = f"N* at the best share, {fit.best.params.value:.3g} {_ends(fit.best.params)}", "sizes"
        return f"the {of} that were run do not bound {what}, so run more seeds, or {of} further apart"
    spread = float(np.ptp(list(means.values())))
    return (
        f"the surface has no minimum inside the grid, and the best losses of the shares differ by {spread:.2g} nats; "
        "compare that with the noise between seeds, and run more seeds, or sizes and shares further apart"
    )
