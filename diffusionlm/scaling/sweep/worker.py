"""A worker, which runs the cells of a sweep; any number of them share its directory, each on its own devices.

A worker claims one cell after another until all are done. At a signal it saves its work and stops, and the next worker
resumes the cell. On a slice of several hosts every host calls `run`, and the first one holds the lease. `directory`
describes the files.
"""

import gc
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from diffusionlm.config import Config
from diffusionlm.console import Console
from diffusionlm.errors import UserError
from diffusionlm.ownership.lease import LEASE_SECONDS, MAX_LEASE_SECONDS, LeaseLost
from diffusionlm.parallel import processes, signals
from diffusionlm.scaling.sweep.data import with_dataset, with_settings
from diffusionlm.scaling.sweep.directory import cell_directory, leases_directory, require_own_cells
from diffusionlm.scaling.sweep.lease import Lease, Leases
from diffusionlm.scaling.sweep.recipe import Cell, Sweep, check_operational
from diffusionlm.scaling.sweep.status import State, heartbeat_step
from diffusionlm.storage import run_path
from diffusionlm.training import loop as trainer
from diffusionlm.training.programs import structure

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0  # between looks at cells that other workers have
MAX_FAILURES = 3  # failed cells in a row, after which the worker itself may be at fault


@dataclass(frozen=True)
class Finished:
    """The state of a sweep when a worker ends."""

    done: tuple[str, ...]  # ids of all finished cells, whichever worker ran them
    failed: tuple[str, ...]
    ran: tuple[str, ...]  # cells that this worker finished
    stopped: bool = False  # by a signal, before all cells were done


def run(
    sweep: Sweep,
    workdir: epath.PathLike,
    settings: Mapping[str, Any] | None = None,
    *,
    everything: bool = False,
    retry_failed: bool = False,
    wait: bool = True,
    lease_seconds: float = LEASE_SECONDS,
) -> Finished:
    """Run cells of a sweep until every one is done or has failed, or until a signal.

    Args:
      sweep: the sweep.
      workdir: its directory, which all workers share.
      settings: dotted operational fields of every cell, such as {"data.path": "data/mix", "mesh.fsdp": 4}.
      everything: include the cells of less use.
      retry_failed: give each failed cell one more try.
      wait: stay for the cells of other workers, to resume those whose worker dies. If False, return when no cell is
        free and every other worker has renewed its lease.
      lease_seconds: how long a worker may be silent before another one takes its cell over.

    Raises:
      UserError: the directory belongs to another sweep, the data or this worker's mesh do not fit, nothing can be
        written, or several cells in a row have failed.
    """
    if not 0 < lease_seconds <= MAX_LEASE_SECONDS:
        raise UserError(
            f"lease_seconds={lease_seconds} must be positive, and at most {MAX_LEASE_SECONDS:g} (a day); "
            f"{LEASE_SECONDS:g} is the default"
        )
    if not sweep.name:
        raise UserError("the sweep has no name; register it, or give it one: Sweep(..., name='mine')")
    check_operational(settings or {})
    cells = [with_settings(cell, settings or {}) for cell in sweep.select(everything)]
    processes.initialize()
    processes.check_joined()
    # A mesh that does not fit is refused before the worker claims a cell, so that no cell fails for it.
    for cfg in {(c.config.mesh, c.config.data.batch_size, c.config.run.microbatches): c.config for c in cells}.values():
        trainer.fitting_mesh(cfg)
    keep_compiled_programs()
    directory = processes.run_on_all_processes(lambda: run_path(workdir))
    first = jax.process_index() == 0
    try:
        cells = with_dataset(sweep, cells, directory)
        processes.run_on_all_processes(lambda: require_own_cells(sweep, directory) if first else None)
        processes.require_shared(directory)
        return _Worker(directory, cells, lease_seconds, retry_failed, wait).run()
    except OSError as error:
        raise UserError(f"cannot continue the sweep in {directory}: {error}") from error


class _Claim(NamedTuple):
    """A cell that this worker has claimed, if one was free."""

    cell: Cell | None
    lease: Lease | None  # on the first process
    others: int  # cells of other workers to wait for


class _Worker:
    """One worker: what it knows of the sweep, and the cell that it runs."""

    def __init__(
        self, workdir: epath.Path, cells: Sequence[Cell], lease_seconds: float, retry_failed: bool, wait: bool
    ):
        self._workdir, self._cells = workdir, {cell.id: cell for cell in cells}
        self._lease_seconds, self._wait = lease_seconds, wait
        self._first = jax.process_index() == 0
        self._console = Console(stderr=True, soft_wrap=True, highlight=False, quiet=not self._first)
        self._ran: list[str] = []
        self._failures = 0  # in a row
        self._last_structure: Config | None = None
        self._flops = 0.0  # of the cells that this worker finished
        self._seconds = 0.0  # of work on them
        self._watched: dict[str, bytes] = {}  # cell -> its lease when this worker began to wait for it
        directory = leases_directory(workdir)
        self._leases = processes.run_on_all_processes(lambda: Leases(directory) if self._first else None)
        self._retry = set(self._cells_in("failed")) if retry_failed else set()

    def run(self) -> Finished:
        """Run cells until none is free and none is to be waited for, or until a signal."""
        stopped = waiting = False
        with signals.stop_signals() as signal:
            while not stopped:
                cell, lease, others = self._claim()
                if cell is None and not others:
                    break
                if cell is None:
                    if not waiting:
                        event = "those" if self._wait else "a heartbeat of those"
                        self._print(f"no cell is free; waiting for {event} that other workers have")
                    waiting = True
                    signal.wait(POLL_SECONDS)
                    stopped = processes.any_across_processes(signal.is_set())[0]
                    continue
                waiting = False
                with lease or nullcontext():
                    stopped = processes.any_across_processes(signal.is_set())[0]
                    if stopped and lease:
                        lease.release()
                    stopped = stopped or self._run(cell, lease)
                # Reference cycles of the last run hold device memory.
                gc.collect()
        return Finished(self._cells_in("done"), self._cells_in("failed"), tuple(self._ran), stopped)

    def _cells_in(self, state: State) -> tuple[str, ...]:
        """Return the cells in a state, as the first process sees them."""

        def look() -> list[str]:
            records = self._leases.records(self._cells) if self._leases else {}
            return [cell for cell in self._cells if cell in records and records[cell].state == state]

        return tuple(json.loads(processes.gather(json.dumps(processes.run_on_all_processes(look)))[0]))

    def _claim(self) -> _Claim:
        """Claim a cell on the first process, and tell the other processes."""
        leases = self._leases
        lease, others = processes.run_on_all_processes(lambda: self._claim_free(leases) if leases else (None, 0))
        message = json.dumps([lease and lease.cell, others])
        name, others = json.loads(processes.gather(message)[0])
        return _Claim(self._cells[name] if name else None, lease, others)

    def _claim_free(self, leases: Leases) -> tuple[Lease | None, int]:
        """Return the lease of a free cell or None, and the number of cells to wait for."""
        records = leases.records(self._cells)
        ended = {name for name, record in records.items() if record.state != "running"} - self._retry
        open_cells = [cell for name, cell in self._cells.items() if name not in ended]
        # The cheapest first; within one budget, those whose program this process has compiled.
        for cell in sorted(open_cells, key=lambda c: (c.budget, structure(c.config) != self._last_structure)):
            directory = cell_directory(self._workdir, cell.id)
            step, retry = heartbeat_step(directory), cell.id in self._retry
            lease = leases.claim(cell.id, self._lease_seconds, step=step, retry_failed=retry)
            if lease:
                self._retry.discard(cell.id)
                if not (directory / "DONE.json").exists():
                    self._watched.clear()
                    return lease, 0
                lease.done()  # its worker died between writing the result and the lease
                open_cells.remove(cell)
        if self._wait:
            return None, len(open_cells)
        # A lease that has changed belongs to a living worker; the others may belong to dead ones.
        unchanged = [
            cell
            for cell in open_cells
            if self._watched.setdefault(cell.id, leases.last_seen(cell.id)) == leases.last_seen(cell.id)
        ]
        return None, len(unchanged)

    def _run(self, cell: Cell, lease: Lease | None) -> bool:
        """Train a cell and record the outcome; return whether a signal stopped it."""
        self._last_structure = structure(cell.config)
        repeated = f", for the {_ordinal(lease.starts)} time" if lease and lease.starts > 1 else ""
        self._print(f"{cell.id}: begins{repeated}")
        try:
            run = trainer.train(cell.config, cell_directory(self._workdir, cell.id), fence=lease)
        except Exception as error:
            if jax.process_count() > 1 and not isinstance(error, UserError | trainer.DivergenceError):
                raise  # an error of this process alone: the others notice when it exits, as in any run
            self._handle_failure(cell, lease, error)
            return False
        except BaseException:
            if lease:
                lease.release()
            raise
        try:
            if lease:
                lease.done() if run.done else lease.release()
        except LeaseLost:
            log.warning("%s was taken over as it ended; both workers write the same results", cell.id)
        if not run.done:
            self._print(f"{cell.id}: stopped and saved at step {run.step}")
            return True
        result: Mapping[str, Any] = run.result or {}
        self._ran.append(cell.id)
        self._failures = 0
        self._flops += cell.flops
        seconds = result.get("seconds_by_kind", {})
        self._seconds += sum(seconds.get(kind, 0.0) for kind in ("train", "data", "evaluate"))
        loss = result["eval"]["nelbo_nats_per_token"]
        evaluation = f"{loss:.4f} nats per token" if math.isfinite(loss) else "its evaluation is not finite"
        self._print(f"{cell.id}: {evaluation}; {self._remaining_work()}")
        return False

    def _handle_failure(self, cell: Cell, lease: Lease | None, error: Exception) -> None:
        """Leave the cell if it was taken over, mark it as failed, or end the worker if storage is at fault."""
        if processes.any_across_processes(lease is not None and lease.lost)[0]:
            self._print(f"{cell.id}: another worker has taken it over; leaving it")
            return
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]
        storage_failed = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
        self._failures += not storage_failed
        self._print(f"{cell.id}: {'' if storage_failed else 'failed: '}{reason}")
        log.debug("cell %s", cell.id, exc_info=error)
        if lease:
            lease.release() if storage_failed else lease.fail(reason)
        if storage_failed:  # a disk or a network, which has nothing to do with the cell
            raise error
        if self._failures >= MAX_FAILURES:
            raise UserError(
                f"{self._failures} cells in a row have failed, the last with {reason}; if this machine is at fault, "
                "mend it, then run the cells again with --retry_failed"
            )

    def _remaining_work(self) -> str:
        """Describe how much of the sweep remains, and how long that would take this worker alone."""
        done = self._cells_in("done")
        flops = sum(cell.flops for name, cell in self._cells.items() if name not in done)
        hours = flops / self._flops * self._seconds / 3600
        rest = f", the rest takes one worker about {hours:.2g} h" if flops else ""
        return f"{len(done)} of {len(self._cells)} cells are done{rest}"

    def _print(self, line: str) -> None:
        self._console.print(line)


def keep_compiled_programs() -> None:
    """Cache compiled programs on this host, for workers that start again and for others beside this one.

    JAX_COMPILATION_CACHE_DIR overrides the place. The cache is not in the sweep's directory, since programs for one
    host's processor may not run on another's.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]: added at run time
    if cache or not os.path.isabs(home):
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(home) / "diffusionlm" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
