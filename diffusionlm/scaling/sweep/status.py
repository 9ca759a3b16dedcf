"""How far a sweep is, from its files alone: done, running, failed, pending."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from etils import epath
from rich.console import Console
from rich.live import Live
from rich.table import Table

from diffusionlm.errors import UserError
from diffusionlm.scaling.sweep.lease import Board, Record
from diffusionlm.scaling.sweep.plan import wide_console
from diffusionlm.scaling.sweep.recipe import Cell, Sweep
from diffusionlm.scaling.sweep.results import at_once, read_identity
from diffusionlm.storage import read_json_lines, run_path
from diffusionlm.training import timeline

T = TypeVar("T")

# A lease that its holder, by its own clock, has not renewed for so much longer than it lasts is that of a dead worker;
# clocks of hosts may differ by seconds. This is for people only: who takes a cell over goes by what it has seen itself.
SLACK_SECONDS = 60.0


@dataclass(frozen=True)
class CellStatus:
    """Where one cell stands."""

    id: str
    state: Literal["done", "running", "failed", "pending"]
    step: int
    steps: int
    flops: float  # spent on the steps so far
    holder: str = ""  # the worker that has it
    starts: int = 0  # claims so far
    eta_seconds: float | None = None  # of a running cell
    loss: float | None = None  # held-out nats per token of a finished one
    note: str = ""  # why it failed, or what became of its worker


@dataclass(frozen=True)
class SweepStatus:
    """Where a sweep stands."""

    sweep: str
    cells: tuple[CellStatus, ...]
    flops: float  # of all cells when they are done
    unplanned: tuple[str, ...] = ()  # cells in the directory that the sweep has not, as its recipe has changed

    def count(self, state: str) -> int:
        return sum(cell.state == state for cell in self.cells)

    @property
    def spent(self) -> float:
        """FLOPs of the steps that were taken, those of unfinished cells included."""
        return sum(cell.flops for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        states = ("done", "running", "failed", "pending")
        counts = {state: self.count(state) for state in states}
        return {
            "sweep": self.sweep,
            **counts,
            "flops_spent": self.spent,
            "flops": self.flops,
            "unplanned": list(self.unplanned),
            "cells": [asdict(cell) for cell in self.cells],
        }


def status(sweep: Sweep, workdir: epath.PathLike, *, everything: bool = False) -> SweepStatus:
    """Where the sweep in this directory stands.

    Args:
      sweep: what is run there.
      workdir: its directory, which need not exist yet.
      everything: also the cells of less use.

    Raises:
      UserError: it is of another sweep, or a file in it is damaged.
    """
    workdir, cells = run_path(workdir), sweep.select(everything)
    if (identity := read_identity(workdir)) and identity["sweep"] != sweep.name:
        raise UserError(f"{workdir} is of sweep {identity['sweep']!r}, not {sweep.name!r}; give its own --workdir")
    try:
        records = Board(workdir / "leases").records([cell.id for cell in cells])
        found = at_once(lambda cell: _cell_status(cell, workdir / "cells" / cell.id, records.get(cell.id)), cells)
        planned = {cell.id for cell in sweep.select(everything=True)}
        there = (path.name for path in (workdir / "cells").iterdir()) if (workdir / "cells").exists() else ()
        others = sorted(name for name in there if name not in planned)
    except OSError as error:
        raise UserError(f"cannot read the sweep in {workdir}: {error}") from error
    return SweepStatus(sweep.name, tuple(found), sum(cell.flops for cell in cells), tuple(others))


def _cell_status(cell: Cell, directory: epath.Path, record: Record | None) -> CellStatus:
    done = directory / "DONE.json"
    starts = record.starts if record else 0
    if done.exists():
        loss = _read(done, lambda: float(json.loads(done.read_text())["eval"]["nelbo_nats_per_token"]))
        return CellStatus(cell.id, "done", cell.steps, cell.steps, cell.flops, starts=starts, loss=loss)
    step, eta = _progress(cell, directory)
    known = {"step": step, "steps": cell.steps, "flops": cell.flops * step / cell.steps, "starts": starts}
    if record is None:
        return CellStatus(cell.id, "pending", **known, note="stopped on the way" if step else "")
    if record.state == "failed":
        return CellStatus(cell.id, "failed", **known, note=record.reason)
    if time.time() - record.time > record.seconds + SLACK_SECONDS:
        return CellStatus(cell.id, "pending", **known, note=f"no sign of life of {record.holder}")
    return CellStatus(cell.id, "running", **known, holder=record.holder, eta_seconds=eta)


def _progress(cell: Cell, directory: epath.Path) -> tuple[int, float | None]:
    """Steps taken, and seconds that the others will take."""
    metrics = directory / "metrics.jsonl"

    def last() -> tuple[int, list[float]]:
        lines = [line for line in read_json_lines(metrics) if "step_seconds" in line]
        return int(lines[-1]["step"]) if lines else 0, [float(line["step_seconds"]) for line in lines[-10:]]

    logged, recent = _read(metrics, last)
    step = max(logged, heartbeat_step(directory))
    return step, (cell.steps - step) * sum(recent) / len(recent) if recent else None


def heartbeat_step(directory: epath.Path) -> int:
    """The step at which the run in this directory last gave a sign of life; 0 where there is none."""
    beat = directory / timeline.HEARTBEAT
    return _read(beat, lambda: int(json.loads(beat.read_text())["step"])) if beat.exists() else 0


def _read(path: epath.Path, how: Callable[[], T]) -> T:
    try:
        return how()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete {path.parent} and the cell's lease to "
            "repeat it"
        ) from error


def show(found: SweepStatus, console: Console | None = None) -> None:
    """Prints it as a table."""
    (console or wide_console()).print(_table(found))


def watch(
    sweep: Sweep,
    workdir: epath.PathLike,
    *,
    everything: bool = False,
    seconds: float = 5.0,
    console: Console | None = None,
) -> None:
    """Shows it, always up to date, until all cells are done or have failed, or until Ctrl-C.

    Raises:
      UserError: there is no terminal.
    """
    console = console or Console()
    if not console.is_terminal:
        raise UserError("watch needs a terminal; leave it out, or use json")
    with Live(console=console, refresh_per_second=4) as live:
        while True:
            found = status(sweep, workdir, everything=everything)
            live.update(_table(found, most=max(live.console.height - 8, 5)))
            if found.count("done") + found.count("failed") == len(found.cells):
                return
            time.sleep(seconds)


def _table(found: SweepStatus, most: int | None = None) -> Table:
    """Of at most `most` rows, where what moves comes first; None: all, as planned."""
    title = (
        f"{found.sweep}: {found.count('done')} done, {found.count('running')} running, {found.count('failed')} failed, "
        f"{found.count('pending')} pending; {found.spent:.3g} of {found.flops:.3g} FLOPs"
    )
    table = Table("cell", "state", "steps", "ETA", "loss", "worker or note", title=title, title_justify="left")
    rows: Sequence[CellStatus] = found.cells
    if most and len(rows) > most:
        order = ("running", "failed", "pending", "done")
        rows = sorted(rows, key=lambda cell: order.index(cell.state))[:most]
        table.caption = f"{len(found.cells) - most} more"
    if found.unplanned:
        more = f"; {table.caption}" if table.caption else ""
        table.caption = f"{len(found.unplanned)} cells in the directory are not in the sweep{more}"
    colours = {"done": "green", "running": "cyan", "failed": "red", "pending": ""}
    for cell in rows:
        share = f"{cell.step}/{cell.steps}"
        eta = _duration(cell.eta_seconds) if cell.eta_seconds is not None else ""
        loss = f"{cell.loss:.4f}" if cell.loss is not None else ""
        table.add_row(cell.id, cell.state, share, eta, loss, cell.note or cell.holder, style=colours[cell.state])
    return table


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min" if minutes else "< 1 min"
