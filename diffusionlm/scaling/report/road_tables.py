"""The tables about roads: the best share of each budget, and what is known of each share."""

from diffusionlm.scaling.laws.analysis import REFERENCE, Analysis
from diffusionlm.scaling.laws.road_words import percent
from diffusionlm.scaling.laws.roads import Roads
from diffusionlm.scaling.laws.shares import ROAD, AtShare, ShareFit
from diffusionlm.scaling.report.formatting import Table, number, with_unit


def road_tables(analysis: Analysis) -> dict[str, Table]:
    """Return the tables by the names that the template has for them, without rows where there are no roads."""
    roads = analysis.roads
    return {
        "best_shares": _best_shares(analysis, roads) if roads else Table([], []),
        "share_laws": _share_law(roads) if roads else Table([], []),
        "shares": _shares(analysis, roads) if roads else Table([], []),
    }


def _best_shares(analysis: Analysis, roads: Roads) -> Table:
    names = list(roads.differences)
    gaps = {gap.objective: dict(gap.at_own) for gap in analysis.gaps}.get(ROAD, {})
    header = ["C (FLOPs)", "best share", "N*", "D* (tokens)", "L* (nats/token)"]
    header += [*(f"minus L* of {name.upper()}" for name in names), f"gap over {REFERENCE.upper()}", "misfit p", "from"]
    return Table(header, [_best_share(fit, roads, names, number(gaps.get(fit.budget))) for fit in roads.budgets])


def _best_share(fit: ShareFit, roads: Roads, names: list[str], gap: str) -> list[str]:
    best, misfit = fit.best, fit.lack_of_fit
    cells = ["no minimum", "", "", ""]
    if best:
        cells = [percent(best.share), number(best.params), number(best.tokens), number(best.loss)]
    differences = [number(dict(roads.differences[name]).get(fit.budget)) for name in names]
    p = "" if misfit is None or misfit.p is None else f"{misfit.p:.2g}"
    usable = "" if best and best.usable else "; not in the gap"
    return [f"{fit.budget:.3g}", *cells, *differences, gap, p, f"{len(fit.runs)} runs{usable}"]


def _share_law(roads: Roads) -> Table:
    """Return how the odds of the best share, and its N* and L*, change with C."""
    symbols = {"share": "share / (1 - share)", "params": "N*", "tokens": "D*", "loss": "L*"}
    rows = [[symbols[key], number(law.exponent), str(len(law.budgets))] for key, law in roads.laws.items()]
    return Table(["of the best road", "exponent of C", "budgets"], rows)


def _shares(analysis: Analysis, roads: Roads) -> Table:
    exact = {}
    if REFERENCE in analysis.objectives:
        optima = [row.optimum for row in analysis.objectives[REFERENCE].budgets if row.usable]
        exact = {optimum.budget: number(optimum.loss) for optimum in optima if optimum}
    rows = [_share(fit, at, exact.get(fit.budget, "")) for fit in roads.budgets for at in fit.shares]
    header = ["C (FLOPs)", "share", "N*", "L* (bound)", "measured: N", "bound", "exact loss as an ARM, at the end"]
    return Table([*header, "after its ARM steps", f"L* of {REFERENCE.upper()} with all of C"], rows)


def _share(fit: ShareFit, at: AtShare, exact: str) -> list[str]:
    losses = at.best_loss, at.autoregressive_loss, at.first_autoregressive_loss
    bound, last, first = ("" if loss is None else f"{loss:.4g}" for loss in losses)
    size, share = with_unit(at.best_params, 3), f"{100 * at.share:g}%"
    return [f"{fit.budget:.3g}", share, number(at.params), number(at.loss), size, bound, last, first, exact]
