"""Runs the cells of a sweep: any number of workers share its directory, each on its own devices.

    DIR/sweep.json          which sweep, and the dataset that all cells are trained on
    DIR/leases/CELL         who has the cell (see `lease`), or why it failed
    DIR/cells/CELL/         the run directory of the cell; DONE.json ends it
    DIR/data/               the dataset, where the sweep prepares its own
    DIR/report/             what `diffusionlm sweep report` writes

A worker takes one cell after another until all are done. It stops at a signal, saving what it has, and the next one
goes on there. On a slice of several hosts every host calls `run`; the first one holds the lease.
"""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from etils import epath
from rich.console import Console

from diffusionlm import config as config_lib
from diffusionlm import runtime, trainer
from diffusionlm.config import Config
from diffusionlm.data import datasets
from diffusionlm.errors import UserError
from diffusionlm.files import run_path, write_atomically
from diffusionlm.scaling.lease import SECONDS, Board, Lease, LeaseLost
from diffusionlm.scaling.recipe import Cell, Sweep
from diffusionlm.scaling.results import at_once, read_identity

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0  # between looks at cells that others have


@dataclass(frozen=True)
class Finished:
    """What became of a sweep while this worker was at it."""

    done: tuple[str, ...]  # ids of all finished cells, whoever ran them
    failed: tuple[str, ...]
    ran: tuple[str, ...]  # those that this worker finished
    stopped: bool = False  # by a signal, before all were done


def run(
    sweep: Sweep,
    workdir: epath.PathLike,
    settings: Config | None = None,
    *,
    everything: bool = False,
    retry_failed: bool = False,
    wait: bool = True,
    lease_seconds: float = SECONDS,
) -> Finished:
    """Works on a sweep until every cell is done or has failed, or until a signal.

    Args:
      sweep: what to run.
      workdir: the sweep's directory, which all workers share.
      settings: its operational fields that are not at their defaults replace those of every cell: the data's path, the
        mesh, micro-batches. No other field may differ from its default.
      everything: also the cells of less use.
      retry_failed: begin cells again that have failed.
      wait: stay for the cells of other workers, to go on with those whose worker dies; if not, return when no cell is
        free.
      lease_seconds: after so long without a sign of life, a worker's cell is another's to go on with.

    Raises:
      UserError: the directory is of another sweep, or the data do not fit.
    """
    if lease_seconds <= 0:
        raise UserError(f"lease_seconds={lease_seconds} must be positive")
    changes = operational(settings or Config())
    cells = [_changed(cell, changes) for cell in sweep.select(everything)]
    runtime.initialize()
    runtime.check_joined()
    keep_compiled()
    workdir = runtime.everywhere(lambda: run_path(workdir))
    cells = _with_data(sweep, cells, workdir)
    worker = _Worker(workdir, cells, lease_seconds, retry_failed, wait)
    return worker.run()


class _Worker:
    """One worker: what it knows of the sweep, and the cell that it is at."""

    def __init__(self, workdir: epath.Path, cells: Sequence[Cell], seconds: float, retry_failed: bool, wait: bool):
        self._workdir, self._cells = workdir, {cell.id: cell for cell in cells}
        self._seconds, self._wait = seconds, wait
        self._first = jax.process_index() == 0
        self._board = runtime.everywhere(lambda: Board(workdir / "leases") if self._first else None)
        # Each failed cell gets one more try of this worker.
        self._retry = set(self._failed()) if retry_failed and self._first else set()
        self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, quiet=not self._first)
        self._ran: list[str] = []
        self._known_done: set[str] = set()
        self._last: Cell | None = None
        self._began = time.monotonic()

    def run(self) -> Finished:
        stopped, waiting = False, False
        with runtime.stop_signals() as signal:
            while not stopped:
                lease, left = self._next()
                if not lease and not (left and self._wait):
                    break
                if not lease:
                    if not waiting:
                        self._say("no cell is free; waiting for those that other workers have")
                    waiting = not signal.wait(POLL_SECONDS)
                    stopped = runtime.any_process(not waiting)[0]
                    continue
                waiting = False
                stopped = self._run(*lease) or runtime.any_process(signal.is_set())[0]
        done, failed = json.loads(runtime.gather(json.dumps([self._done(), self._failed()]) if self._first else "")[0])
        return Finished(tuple(done), tuple(failed), tuple(self._ran), stopped)

    def _next(self) -> tuple[tuple[str, Lease | None] | None, int]:
        """A cell that is this worker's now, if any is free, and how many others have."""
        found: dict[str, Any] = {}

        def claim() -> None:
            if self._first:
                found.update(zip(("lease", "left"), self._claim(), strict=True))

        runtime.everywhere(claim)
        lease = found.get("lease")
        cell, left = json.loads(runtime.gather(json.dumps([lease and lease.cell, found.get("left")]))[0])
        return ((cell, lease) if cell else None), left

    def _claim(self) -> tuple[Lease | None, int]:
        done, failed = set(self._done()), set(self._failed()) - self._retry
        open_cells = [cell for name, cell in self._cells.items() if name not in done | failed]
        for cell in sorted(open_cells, key=lambda cell: not self._like_last(cell)):  # stable: cheap ones first
            lease = self._board.claim(cell.id, self._seconds, failed=cell.id in self._retry)
            if not lease:
                continue
            self._retry.discard(cell.id)
            if (self._directory(cell.id) / "DONE.json").exists():  # since we looked
                lease.release()
                continue
            return lease, 0
        return None, len(open_cells)

    def _like_last(self, cell: Cell) -> bool:
        """Whether it has the shapes of the last one, whose compiled programs are at hand."""
        shape = lambda c: (c.objective, c.config.model, c.recipe.batch_size, c.recipe.sequence_length)  # noqa: E731
        return self._last is not None and cell.budget == self._last.budget and shape(cell) == shape(self._last)

    def _run(self, name: str, lease: Lease | None) -> bool:
        """Trains a cell to its end and gives it back; True if it was stopped on the way."""
        cell = self._last = self._cells[name]
        self._say(f"{name}: begins{f', for the {_ordinal(lease.starts)} time' if lease and lease.starts > 1 else ''}")
        with lease or nullcontext():
            try:
                result = trainer.train(cell.config, self._directory(name), fence=lease)
            except Exception as error:
                if self._lost(lease):
                    self._say(f"{name}: another worker has taken it over; leaving it")
                    return False
                if jax.process_count() > 1 and not isinstance(error, UserError | trainer.DivergenceError):
                    raise  # who knows what the other processes are at
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]
                self._give_back(lease, lambda why=reason: lease.fail(why))
                self._say(f"{name}: failed: {reason}")
                log.debug("cell %s failed", name, exc_info=error)
                return False
            except BaseException:
                self._give_back(lease, lambda: lease.release())
                raise
            self._give_back(lease, lambda: lease.release())
        if not result.done:
            self._say(f"{name}: stopped and saved at step {result.step}")
            return True
        self._ran.append(name)
        self._say(f"{name}: {result.result['eval']['nelbo_nats_per_token']:.4f} nats per token; {self._outlook()}")
        return False

    def _lost(self, lease: Lease | None) -> bool:
        """Whether the cell went to another worker, on all processes alike."""
        return runtime.any_process(lease is not None and lease.lost)[0]

    @staticmethod
    def _give_back(lease: Lease | None, how: Callable[[], None]) -> None:
        if lease:
            try:
                how()
            except LeaseLost:  # since the last write: DONE.json, if there is one, is as good as the other worker's
                pass

    def _directory(self, cell: str) -> epath.Path:
        return self._workdir / "cells" / cell

    def _done(self) -> list[str]:
        left = [name for name in self._cells if name not in self._known_done]
        there = at_once(lambda name: (self._directory(name) / "DONE.json").exists(), left)
        self._known_done.update(name for name, done in zip(left, there, strict=True) if done)
        return [name for name in self._cells if name in self._known_done]

    def _failed(self) -> list[str]:
        records = self._board.records()
        return [name for name in self._cells if name in records and records[name].state == "failed"]

    def _outlook(self) -> str:
        """How much is left, and for how long if this worker were alone with it."""
        done = set(self._done())
        left = sum(cell.flops for name, cell in self._cells.items() if name not in done)
        spent = sum(self._cells[name].flops for name in self._ran)
        hours = left / (spent / (time.monotonic() - self._began)) / 3600
        return f"{len(done)} of {len(self._cells)} cells are done, the rest takes one worker about {hours:.2g} h"

    def _say(self, line: str) -> None:
        self._console.print(line)


def operational(settings: Config) -> dict[str, Any]:
    """The fields of `settings` that are not at their defaults.

    Raises:
      UserError: one of them is part of a cell's science.
    """
    default, science = config_lib.flat(Config()), config_lib.scientific_fields(Config())
    changes = {name: value for name, value in config_lib.flat(settings).items() if value != default[name]}
    if wrong := next((name for name in changes if name in science), None):
        raise UserError(
            f"{wrong}={changes[wrong]} is part of what a cell measures, so it cannot be set for a worker; register a "
            "sweep of your own with another recipe"
        )
    return changes


def _changed(cell: Cell, changes: dict[str, Any]) -> Cell:
    return dataclasses.replace(cell, config=config_lib.with_fields(cell.config, changes))


def _with_data(sweep: Sweep, cells: list[Cell], workdir: epath.Path) -> list[Cell]:
    """The cells with the dataset's path, which is the same dataset for all workers at all times."""
    first = cells[0].config
    if not first.data.path and not sweep.source:
        raise UserError(
            f"sweep {sweep.name!r} names no data: give --data.path, a directory made by `diffusionlm data prepare` "
            f"with --vocab_size {first.model.vocab_size} --sequence_length {first.data.sequence_length}"
        )
    if not first.data.path:
        prepared = dataclasses.replace(first, data=dataclasses.replace(first.data, source=sweep.source))
        datasets.open_or_prepare(prepared, workdir)
        cells = [_changed(cell, {"data.path": str(workdir / "data")}) for cell in cells]
    dataset = datasets.open_or_prepare(cells[0].config, workdir)
    identity = {
        "sweep": sweep.name,
        "dataset": dataset.metadata.sha256,
        "unique_tokens": dataset.metadata.splits["train"].records * first.data.sequence_length,
    }
    runtime.everywhere(lambda: _require_identity(workdir, identity) if jax.process_index() == 0 else None)
    return cells


def _require_identity(workdir: epath.Path, identity: dict[str, Any]) -> None:
    there = read_identity(workdir)
    if there is None:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / "sweep.json", json.dumps(identity, indent=2) + "\n")
        return
    if differ := [name for name in ("sweep", "dataset") if there.get(name) != identity[name]]:
        shown = ", ".join(f"{name} {there.get(name)} there, {identity[name]} here" for name in differ)
        raise UserError(f"{workdir} holds another sweep: {shown}; use another --workdir")


def keep_compiled() -> None:
    """Keeps compiled programs on this host: cells of the same shapes, and workers that start again, compile once.

    JAX_COMPILATION_CACHE_DIR says where, if it is set. Not in the sweep's directory: programs for a processor may not
    run on another host's.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusionlm" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
