"""Points of others in the groups that are fitted together, with warnings that name doubtful rows."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from statistics import median

from diffusionlm.errors import UserError, suggest
from diffusionlm.scaling.sweep.points import (
    UNFLAGGED,
    USED,
    LeftOut,
    Points,
    Row,
    Table,
    Unit,
    result_of,
    without_budget,
)
from diffusionlm.scaling.sweep.results import OBJECTIVES

SIZES = 3  # a parabola needs so many
ROUNDING = 0.02  # the share by which the compute of runs of one budget may differ
OPTIMUM = "optimum"  # the flag of rows that are results of fits
UNIFORM = math.log(300_000)  # nats: the loss of guessing, with the largest vocabulary in use
BEST = 1.0  # nats per token, below what any model of text has; bytes, characters and amino acids may have less
BITS = 1 / math.log(2)  # bits in a nat
ALIKE, NEAR = 0.4, 0.05  # log losses: of neighbours that are alike, and of a factor that is nearly BITS
USUAL = (1.0, 60.0)  # of C / (N D): 6, or more with attention and head
# Tokens per parameter. Those of ten public collections of runs are 0.006 to 19,000: in millions, their tokens are below
# the range and their parameters above it but for the runs at the other end.
RATIOS = (1e-3, 1e6)
SMALLEST = 1e9  # FLOPs of a run: less is a second of one core
ROUNDED = 1e-4  # the share of N or D that rounding may change; no optimum is known so well
APART = 4.0  # the factor by which the C / (N D) of a row may differ from the others'


def groups(table: Table, *, use: Sequence[str] = (), unit: Unit = "nats", counted: str = "") -> list[Points]:
    """Return the points of each source and corpus, in the order of the table.

    Args:
      table: all rows.
      use: flags of the rows to use, "unflagged" among them for those without one; empty: `USED`.
      unit: the unit in which the losses were given.
      counted: which parameters are counted, for the page.

    Raises:
      UserError: `use` has a flag that no row has, or no row with a loss is left.
    """
    _check_use(table, use)
    members: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in table.rows:
        members[row.point.source, row.point.corpus].append(row)
    built = []
    for (source, corpus), rows in members.items():
        group = _group(table, rows, use or USED, " ".join(filter(None, (source, corpus))))
        built.append(replace(group, context=_context(table, rows, source, corpus, unit, counted, group)))
    if not any(group.results for group in built):
        reasons = Counter(left.reason for group in built for left in group.left_out)
        words = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        what = "see --use (in Python, use)"
        if set(reasons) == {f"flag {OPTIMUM}"}:
            what = (
                "these are optima that somebody fitted, and it takes the runs: at least three sizes at each of two "
                "budgets. Of optima alone, numpy.polyfit of log params over log budget_flops has the exponent"
            )
        raise UserError(f"{table.name} has no row to fit: all {len(table.rows)} are left out ({words}); {what}")
    return built


def _check_use(table: Table, use: Sequence[str]) -> None:
    known = {row.point.flag or UNFLAGGED for row in table.rows}
    if OPTIMUM in use and OPTIMUM in known:
        raise UserError(f"use={OPTIMUM!r}: a row with this flag is an optimum that was fitted, no run; use the runs")
    for flag in use:
        if flag not in known:
            raise UserError(f"use={flag!r} is the flag of no row of {table.name}{suggest(flag, known)}")


def _group(table: Table, rows: Sequence[Row], use: Sequence[str], name: str) -> Points:
    used, left_out, seen = [], [], {}
    twins: list[int] = []
    for row in rows:
        flag = row.point.flag or UNFLAGGED
        reason = ""
        if flag not in use:
            reason = f"flag {row.point.flag}" if row.point.flag else UNFLAGGED
        elif row.point.loss is None:
            reason = "no finite loss"
        elif row.point in seen:
            reason = f"the same as {table.unit} {seen[row.point]}"
            twins.append(row.number)
        if reason:
            left_out.append(LeftOut(result_of(row, table), reason))
        else:
            seen[row.point] = row.number
            used.append(row)
    warnings = []
    if lost := [row.number for row in rows if row.point.loss is None and (row.point.flag or UNFLAGGED) in use]:
        warnings.append(f"{table.at(lost)}: no finite loss, so left out")
    if twins:
        warnings.append(f"{table.at(twins)}: the same in every column as a row above, so left out")
    warnings += [line for check in _CHECKS for line in check(table, used)]
    results, line = _on_budgets(table, used)
    return Points(name or PurePath(table.name).stem, results, tuple(left_out), (*warnings, *line), {})


def _on_budgets(table: Table, rows: Sequence[Row]) -> tuple[tuple, list[str]]:
    """Return the results, those at budgets with fewer than three sizes without their budget, and a warning of them."""
    sizes: dict[tuple[str, float], set[float]] = defaultdict(set)
    for row in rows:
        if row.point.budget_flops:
            sizes[row.point.objective, row.point.budget_flops].add(row.point.params)
    lonely = {key for key, params in sizes.items() if len(params) < SIZES}
    alone = [row for row in rows if (row.point.objective, row.point.budget_flops) in lonely]
    numbers = {row.number for row in alone}
    results = [without_budget(result_of(r, table)) if r.number in numbers else result_of(r, table) for r in rows]
    if not alone:
        return tuple(results), []
    which = f"{len(lonely)} budgets have" if len(lonely) > 1 else f"the budget {alone[0].point.budget_flops:.3g} has"
    return tuple(results), [
        f"{table.at(r.number for r in alone)}: {which} fewer than {SIZES} sizes, and so no curve; these rows are in "
        f"the parametric law alone{_nominal(lonely)}"
    ]


def _nominal(lonely: Iterable[tuple[str, float]]) -> str:
    """Say that budgets are to be rounded, where those of few sizes would be one of enough within `ROUNDING`."""
    budgets: dict[str, list[float]] = defaultdict(list)
    for objective, budget in sorted(lonely):
        budgets[objective].append(budget)
    for several in budgets.values():
        for low, high in zip(several, several[SIZES - 1 :], strict=False):
            if high <= low * (1 + ROUNDING):
                return (
                    f"; budgets such as {low:.6g} and {high:.6g} seem to be one: give the runs of a budget one value "
                    "of budget_flops, the nominal one"
                )
    return ""


def _repeated(table: Table, rows: Sequence[Row]) -> Iterator[str]:
    """Warn of rows that are one point by every column, but for their losses."""
    cells: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        point = row.point
        cells[point.objective, point.budget_flops, point.params, point.tokens, point.seed].append(row)
    if not (repeated := [cell for cell in cells.values() if len(cell) > 1]):
        return
    first = repeated[0]
    losses = sorted(row.point.loss or math.nan for row in first)
    others = f", and {len(repeated) - 1} more points likewise" if len(repeated) > 1 else ""
    repeats = "if they are repeats, add a column seed; " if first[0].point.seed is None else ""
    yield (
        f"{table.at(row.number for row in first)}: one point ({first[0].point.objective}, N = "
        f"{first[0].point.params:.3g}, D = {first[0].point.tokens:.3g}) has losses from {losses[0]:.4g} to "
        f"{losses[-1]:.4g}{others}: {repeats}if they are of different text, add a column corpus or source"
        f"{_hint(table)}; until then all are fitted together, and are no measure of noise"
    )


def _hint(table: Table) -> str:
    flags = sorted({row.point.flag for row in table.rows} - {"", *USED})
    return f", or --use choose some by their flag ({', '.join(flags)})" if flags else ""


def _units(table: Table, rows: Sequence[Row]) -> Iterator[str]:
    """Warn of losses that text cannot have in nats per token."""
    losses = {row.number: row.point.loss for row in rows if row.point.loss}
    if high := [number for number, loss in losses.items() if loss > UNIFORM]:
        yield (
            f"{table.at(high)}: loss={losses[high[0]]:.4g} nats is more than guessing has with 300,000 tokens "
            f"({UNIFORM:.1f}): a perplexity, or the loss of a diverged run? Give the loss in nats, or bits with "
            "--unit bits"
        )
    text = {row.number: losses[row.number] for row in rows if row.point.objective != "mlm" and row.number in losses}
    if low := [number for number, loss in text.items() if loss < BEST]:
        smallest = min(low, key=lambda number: text[number])
        yield (
            f"{table.at([smallest])}: loss={text[smallest]:.4g} nats is less than any model of text has for a token; "
            "if it is of a byte, a character or a part of it, or of another unit, losses and E are in that unit here"
        )


def _mixed_units(table: Table, rows: Sequence[Row]) -> Iterator[str]:
    """Warn of rows, and of whole budgets, that are off by the factor between nats and bits."""
    budgets: dict[tuple[str, float], dict[float, Row]] = defaultdict(dict)
    for row in rows:
        if row.point.budget_flops and row.point.loss:
            budgets[row.point.objective, row.point.budget_flops][row.point.params] = row
    odd = {}
    for by_size in budgets.values():
        cells = [by_size[size] for size in sorted(by_size)]
        odd |= _odd_between(cells)
    for objective in {name for name, _ in budgets}:
        best = [
            min(budgets[key].values(), key=lambda row: row.point.loss or math.inf)
            for key in sorted(key for key in budgets if key[0] == objective)
        ]
        odd |= _odd_between(best)
    if odd:
        factors = f"{min(odd.values()):.2f}" + (f" to {max(odd.values()):.2f}" if len(odd) > 1 else "")
        what, whose = ("its loss is", "its") if len(odd) == 1 else ("their losses are", "their")
        yield (
            f"{table.at(odd)}: {what} {factors} times that of {whose} neighbours, as "
            f"bits are of nats ({BITS:.2f}, or {1 / BITS:.2f}): are all rows in one unit?"
        )


def _odd_between(rows: Sequence[Row]) -> dict[int, float]:
    """Return the rows whose factor over two neighbours that are alike is the one between the units, and that factor."""
    losses = [row.point.loss or math.nan for row in rows]
    odd = {}
    for row, before, loss, after in zip(rows[1:], losses, losses[1:], losses[2:], strict=False):
        factor = loss / math.sqrt(before * after)
        if abs(math.log(before / after)) < ALIKE and abs(abs(math.log(factor)) - math.log(BITS)) < NEAR:
            odd[row.number] = factor
    return odd


def _compute(table: Table, rows: Sequence[Row]) -> Iterator[str]:
    """Warn of C / (N D) that no convention has: parameters in millions, tokens of another run."""
    factors = {}
    for row in rows:
        if compute := row.point.flops or row.point.budget_flops:
            factors[row.number] = compute / (row.point.params * row.point.tokens)
    if not factors:
        return
    middle = median(factors.values())
    if not USUAL[0] <= middle <= USUAL[1]:
        yield (
            f"{table.at([next(iter(factors))])} and most others: C / (N D) is {middle:.3g}, where 6 is usual: are "
            "params and tokens counted one by one, and C in FLOPs?"
        )
    if off := [number for number, factor in factors.items() if not 1 / APART < factor / middle < APART]:
        yield (
            f"{table.at(off)}: C / (N D) is {factors[off[0]]:.3g}, but {middle:.3g} in the middle of all rows: is one "
            "of params, tokens and the compute wrong?"
        )


def _counts(table: Table, rows: Sequence[Row]) -> Iterator[str]:
    """Warn of parameters and tokens that do not seem to be counted one by one."""
    for column in ("params", "tokens"):
        values = {row.number: float(getattr(row.point, column)) for row in rows}
        if off := [number for number, value in values.items() if abs(round(value) - value) > ROUNDED * value]:
            value = values[off[0]]
            yield (
                f"{table.at(off)}: {column}={value:.6g} is no whole number, and rounded to {round(value)}: are "
                f"{column} counted one by one?"
            )
    alone = [row for row in rows if not (row.point.flops or row.point.budget_flops)]  # else `_compute` sees more
    ratios = {row.number: row.point.tokens / row.point.params for row in alone}
    if off := [number for number, ratio in ratios.items() if not RATIOS[0] <= ratio <= RATIOS[1]]:
        yield (
            f"{table.at(off)}: D / N is {ratios[off[0]]:.3g}, and published runs have 0.006 to 19,000: is one of "
            "params and tokens in thousands, millions or billions?"
        )
    small = {row.number: 6 * row.point.params * row.point.tokens for row in alone if row.number not in off}
    if off := [number for number, compute in small.items() if compute < SMALLEST]:
        yield (
            f"{table.at(off)}: 6 N D is {small[off[0]]:.3g} FLOPs, no more than a second of one core: are params and "
            "tokens counted one by one?"
        )


def _one_budget(table: Table, rows: Sequence[Row]) -> Iterator[str]:
    """Warn of objectives that cannot have a law."""
    for name in sorted({row.point.objective for row in rows}):
        budgets = {row.point.budget_flops for row in rows if row.point.objective == name}
        if len(budgets) == 1 and (budget := budgets.pop()):
            first = next(row.number for row in rows if row.point.objective == name)
            yield f"{table.at([first])} and all others of {name}: one budget, {budget:.3g} FLOPs, and a law needs two"


def _no_bounds(table: Table, rows: Sequence[Row]) -> Iterator[str]:
    """Warn of losses that cannot be compared with those of the other objectives."""
    first = {row.point.objective: row.number for row in reversed(rows)}
    for name in ("mlm", "prime"):
        if name in first and len(first) > 1:
            yield (
                f"{table.at([first[name]])} and all others of {name}: {OBJECTIVES[name]}; a gap to other objectives "
                "compares two quantities"
            )


_CHECKS: Sequence[Callable[[Table, Sequence[Row]], Iterable[str]]] = (
    _repeated,
    _units,
    _mixed_units,
    _compute,
    _counts,
    _one_budget,
    _no_bounds,
)


def _context(
    table: Table, rows: Sequence[Row], source: str, corpus: str, unit: Unit, counted: str, group: Points
) -> Mapping[str, str]:
    """Return what the points are, for the table of the page."""
    flags = Counter(row.point.flag for row in rows if row.point.flag)
    rounded = sum(not (row.point.params.is_integer() and row.point.tokens.is_integer()) for row in rows)
    context = {
        "points": f"{len(group.results)} of {len(rows)} rows of {table.name}",
        "source": source,
        "corpus": corpus,
        "loss": "given in bits per token, and multiplied by ln 2" if unit == "bits" else "in nats per token, as given",
        "parameters": counted or "as the source counts them; --counted says which",
        "rounded": f"N or D of {rounded} rows, to whole numbers" if rounded else "",
        "flags": ", ".join(f"{flag}: {count}" for flag, count in flags.items()),
        "comments of the file": " / ".join(table.header),
    }
    return {key: value for key, value in context.items() if value}
