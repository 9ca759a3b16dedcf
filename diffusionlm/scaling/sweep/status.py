"""The status of a sweep, from its files alone: which cells are done, running, failed and pending."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from etils import epath

from diffusionlm.errors import UserError
from diffusionlm.ownership.process_identity import has_ended
from diffusionlm.scaling.sweep.cost import credited_flops
from diffusionlm.scaling.sweep.directory import cell_directory, leases_directory, read_identity, unplanned_cells
from diffusionlm.scaling.sweep.lease import LeaseRecord, Leases
from diffusionlm.scaling.sweep.recipe import Cell, Sweep
from diffusionlm.scaling.sweep.results import read_concurrently
from diffusionlm.storage import read_json_lines, run_path
from diffusionlm.training import heartbeat, outcome

T = TypeVar("T")
State = Literal["done", "running", "failed", "pending"]

# A lease that has not been renewed for this much longer than it lasts, by its holder's clock, is a dead worker's; two
# hosts' clocks may differ by seconds. This is for people: a worker that takes a cell over trusts its own clock alone.
SLACK_SECONDS = 60.0


@dataclass(frozen=True)
class CellStatus:
    """The status of one cell."""

    id: str
    state: State
    step: int
    steps: int
    flops: float  # FLOPs of the steps so far
    holder: str = ""  # the worker that has the cell
    starts: int = 0  # claims so far
    eta_seconds: float | None = None  # of a running cell
    loss: float | None = None  # held-out nats per token of a finished cell; NaN if they are not finite
    note: str = ""  # why the cell failed, or what became of its worker


@dataclass(frozen=True)
class SweepStatus:
    """The status of a sweep."""

    sweep: str
    cells: tuple[CellStatus, ...]
    flops: float  # FLOPs of all cells when they are done
    unplanned: tuple[str, ...] = ()  # cells in the directory that the sweep does not have, as when its recipe changed

    def count(self, state: State) -> int:
        """Return the number of cells in a state."""
        return sum(cell.state == state for cell in self.cells)

    @property
    def spent(self) -> float:
        """FLOPs of all steps so far, those of unfinished cells included."""
        return sum(cell.flops for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        """Return the status as `sweep status --json` prints it."""
        return {
            "sweep": self.sweep,
            "done": self.count("done"),
            "running": self.count("running"),
            "failed": self.count("failed"),
            "pending": self.count("pending"),
            "flops_spent": self.spent,
            "flops": self.flops,
            "unplanned": list(self.unplanned),
            "cells": [asdict(cell) for cell in self.cells],
        }


def status(sweep: Sweep, workdir: epath.PathLike, *, everything: bool = False) -> SweepStatus:
    """Return the status of a sweep.

    Args:
      sweep: the sweep that runs in `workdir`.
      workdir: its directory, which need not exist yet.
      everything: include the cells of less use.

    Raises:
      UserError: the directory belongs to another sweep, or a file in it is damaged.
    """
    directory, cells = run_path(workdir), sweep.select(everything)
    if (identity := read_identity(directory)) and identity["sweep"] != sweep.name:
        raise UserError(f"{directory} is of sweep {identity['sweep']!r}, not {sweep.name!r}; give its own --workdir")
    try:
        records = Leases(leases_directory(directory)).records([cell.id for cell in cells])
        statuses = read_concurrently(
            lambda cell: _cell_status(cell, cell_directory(directory, cell.id), records.get(cell.id)), cells
        )
        unplanned, _ = unplanned_cells(sweep, directory)
    except OSError as error:
        raise UserError(f"cannot read the sweep in {directory}: {error}") from error
    return SweepStatus(sweep.name, tuple(statuses), sum(cell.flops for cell in cells), tuple(unplanned))


def _cell_status(cell: Cell, directory: epath.Path, record: LeaseRecord | None) -> CellStatus:
    result = directory / outcome.FILE
    starts = record.starts if record else 0
    if result.exists():
        loss = _parse(result, lambda: float(outcome.read(result)["eval"]["nelbo_nats_per_token"]))
        note = "" if math.isfinite(loss) else "its evaluation is not finite"
        return CellStatus(cell.id, "done", cell.steps, cell.steps, cell.flops, starts=starts, loss=loss, note=note)
    step, eta = _progress(cell, directory)
    flops = cell.flops * step / cell.steps
    if record is None:
        note = "stopped on the way" if step else ""
        return CellStatus(cell.id, "pending", step, cell.steps, flops, starts=starts, note=note)
    if record.state == "failed":
        return CellStatus(cell.id, "failed", step, cell.steps, flops, starts=starts, note=record.reason)
    silent = time.time() - record.time > record.seconds + SLACK_SECONDS
    if silent or (record.process and has_ended(record.process)):
        note = f"no heartbeat of {record.holder}"
        return CellStatus(cell.id, "pending", step, cell.steps, flops, starts=starts, note=note)
    return CellStatus(cell.id, "running", step, cell.steps, flops, record.holder, starts, eta)


def _progress(cell: Cell, directory: epath.Path) -> tuple[int, float | None]:
    """Return the number of steps taken, and the seconds that the remaining ones will take if that is known."""
    metrics = directory / "metrics.jsonl"

    def last_steps() -> list[tuple[int, float]]:
        lines = [line for line in read_json_lines(metrics, outcome.MetricsLine) if "step_seconds" in line]
        return [(int(line["step"]), float(line["step_seconds"])) for line in lines[-10:]]

    last = _parse(metrics, last_steps)
    step = max(last[-1][0] if last else 0, heartbeat_step(directory))
    # Steps of the two parts of a cell differ in their work.
    work = sum(credited_flops(cell, logged - 1, logged) for logged, _ in last)
    return step, credited_flops(cell, step) / work * sum(seconds for _, seconds in last) if last else None


def heartbeat_step(directory: epath.Path) -> int:
    """Return the step of the last heartbeat of the run in a directory; 0 if there is none.

    Raises:
      UserError: the file is damaged.
    """
    path = directory / heartbeat.FILE
    return _parse(path, lambda: heartbeat.read(path).step) if path.exists() else 0


def _parse(path: epath.Path, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete {path.parent} and the cell's lease to "
            "repeat it"
        ) from error
