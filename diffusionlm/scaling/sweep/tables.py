"""Tables on the terminal: the plan and the status of a sweep."""

import os
import time
from collections.abc import Sequence
from typing import Any

from etils import epath
from rich.live import Live
from rich.table import Table

from diffusionlm.console import Console
from diffusionlm.errors import UserError
from diffusionlm.scaling.sweep.plan import Plan, PlannedCell, peak_flops
from diffusionlm.scaling.sweep.recipe import Sweep
from diffusionlm.scaling.sweep.status import CellStatus, SweepStatus, status

_COLOURS = {"done": "green", "running": "cyan", "failed": "red", "pending": ""}
_ORDER = ("running", "failed", "pending", "done")  # of rows that compete for the height of a terminal


def show_plan(plan: Plan, chip: str, price: float | None = None, *, cells: bool = False) -> None:
    """Print a plan as a table, with a row for each objective and budget or for each cell, and its total.

    Args:
      plan: the plan.
      chip: the chip whose hours are shown.
      price: the price of an hour of one such chip; None: no money is shown.
      cells: show every cell.
    """
    peak_flops(chip)  # raises UserError for an unknown chip
    console = _wide_console()
    columns = ["objective", "FLOPs", "cells", "N", "tokens", "steps", f"{chip}-hours", "of it evaluation"]
    table = Table(*(["cell"] if cells else []), *columns, *(["money"] if price is not None else []), title=plan.sweep)
    groups: dict[Any, list[PlannedCell]] = {}
    for cell in plan.cells:
        groups.setdefault(cell.id if cells else (cell.objective, cell.budget_flops), []).append(cell)
    for group in groups.values():
        table.add_row(*([group[0].id] if cells else []), *_plan_row(group, chip, price))
    console.print(table)
    flops, hours = sum(cell.flops for cell in plan.cells), plan.chip_hours(chip)
    money = f", {hours * price:,.2f} at {price:g} an hour" if price is not None else ""
    console.print(
        f"{plan.sweep}: {len(plan.cells)} cells, {flops:.3g} FLOPs; "
        f"{hours:,.3g} {chip}-hours at {plan.mfu:.0%} MFU{money}",
        highlight=False,
        soft_wrap=True,
    )
    for note in dict.fromkeys(cell.fit_note for cell in plan.cells if cell.fit_note):
        console.print(note, highlight=False, soft_wrap=True)


def _plan_row(cells: Sequence[PlannedCell], chip: str, price: float | None) -> list[str]:
    """Return a row about cells of one objective and budget: ranges over the cells, and sums of their costs."""

    def between(values: list[float]) -> str:
        low, high = f"{min(values):.3g}", f"{max(values):.3g}"
        return low if low == high else f"{low} to {high}"

    hours = sum(cell.chip_hours[chip] for cell in cells)
    evaluation = sum(c.flops_evaluation for c in cells) / sum(c.flops_evaluation + c.flops_credited for c in cells)
    row = [cells[0].objective, f"{cells[0].budget_flops:.3g}", str(len(cells))]
    row += [between([getattr(cell, name) for cell in cells]) for name in ("params", "tokens", "steps")]
    row += [f"{hours:,.3g}", f"{evaluation:.1%}"]
    return row + ([f"{hours * price:,.2f}"] if price is not None else [])


def show_status(sweep_status: SweepStatus) -> None:
    """Print the status of a sweep as a table."""
    _wide_console().print(_status_table(sweep_status))


def watch(
    sweep: Sweep,
    workdir: epath.PathLike,
    *,
    everything: bool = False,
    seconds: float = 5.0,
    console: Console | None = None,
) -> None:
    """Keep a table of the status of a sweep up to date, until no cell is left to run or until Ctrl-C.

    Args:
      sweep: the sweep that runs in `workdir`.
      workdir: its directory.
      everything: include the cells of less use.
      seconds: the time between two looks at the directory.
      console: the terminal; None: standard output.

    Raises:
      UserError: there is no terminal.
    """
    console = console or Console()
    if not console.is_terminal:
        raise UserError("watch needs a terminal; leave it out, or use json")
    with Live(console=console, refresh_per_second=4) as live:
        while True:
            current = status(sweep, workdir, everything=everything)
            live.update(_status_table(current, max_rows=max(live.console.height - 8, 5)))
            if current.count("done") + current.count("failed") == len(current.cells):
                return
            time.sleep(seconds)


def _status_table(current: SweepStatus, max_rows: int | None = None) -> Table:
    """Return a table in the order of the plan or, where not all rows fit, with the cells first that change."""
    title = (
        f"{current.sweep}: {current.count('done')} done, {current.count('running')} running, "
        f"{current.count('failed')} failed, {current.count('pending')} pending; "
        f"{current.spent:.3g} of {current.flops:.3g} FLOPs"
    )
    table = Table("cell", "state", "steps", "ETA", "loss", "worker or note", title=title, title_justify="left")
    rows: Sequence[CellStatus] = current.cells
    captions = []
    if current.unplanned:
        captions.append(f"{len(current.unplanned)} cells in the directory are not in the sweep")
    if max_rows and len(rows) > max_rows:
        rows = sorted(rows, key=lambda cell: _ORDER.index(cell.state))[:max_rows]
        captions.append(f"{len(current.cells) - max_rows} more")
    table.caption = "; ".join(captions) or None
    for cell in rows:
        steps = f"{cell.step}/{cell.steps}"
        eta = _duration(cell.eta_seconds) if cell.eta_seconds is not None else ""
        loss = f"{cell.loss:.4f}" if cell.loss is not None else ""
        table.add_row(cell.id, cell.state, steps, eta, loss, cell.note or cell.holder, style=_COLOURS[cell.state])
    return table


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"


def _wide_console() -> Console:
    """Return a console that does not cut tables off in files and pipes, which have no width of their own."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=200)
