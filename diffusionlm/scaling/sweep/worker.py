"""Runs the cells of a sweep: any number of workers share its directory, each on its own devices.

    DIR/sweep.json          which sweep, and the dataset that all cells are trained on
    DIR/leases/CELL         who has the cell (see `lease`), that it is done, or why it failed
    DIR/cells/CELL/         the run directory of the cell; DONE.json ends it
    DIR/data/               the dataset, where the sweep prepares its own
    DIR/report/             what `diffusionlm sweep report` writes

A worker takes one cell after another until all are done. It stops at a signal, saving what it has, and the next one
goes on there. On a slice of several hosts every host calls `run`; the first one holds the lease.
"""

import dataclasses
import gc
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from etils import epath
from rich.console import Console

from diffusionlm import config_io
from diffusionlm.config import Config
from diffusionlm.data.pipeline import open_dataset
from diffusionlm.data.tokenizers.kinds import ByteTokenizer
from diffusionlm.errors import UserError
from diffusionlm.parallel import processes as runtime
from diffusionlm.parallel import signals
from diffusionlm.scaling.sweep.lease import SECONDS, Board, Lease, LeaseLost, write_once
from diffusionlm.scaling.sweep.recipe import Cell, Sweep, check_operational
from diffusionlm.scaling.sweep.results import as_identity
from diffusionlm.scaling.sweep.status import heartbeat_step
from diffusionlm.storage import in_bucket, run_path
from diffusionlm.training import dataset as datasets
from diffusionlm.training import loop as trainer
from diffusionlm.training.programs import structure

log = logging.getLogger(__name__)

POLL_SECONDS = 5.0  # between looks at cells that others have
MOST_SECONDS = 86400.0  # that a lease may last
MOST_FAILURES = 3  # of cells in a row, after which it may be the worker that is at fault


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
    settings: Mapping[str, Any] | None = None,
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
      settings: dotted operational fields of every cell, such as {"data.path": "data/mix", "mesh.fsdp": 4}.
      everything: also the cells of less use.
      retry_failed: begin cells again that have failed.
      wait: stay for the cells of other workers, to go on with those whose worker dies; if not, return when no cell is
        free and the workers that have the others have shown that they are alive.
      lease_seconds: after so long without a sign of life, a worker's cell is another's to go on with.

    Raises:
      UserError: the directory is of another sweep, the data or this worker's mesh do not fit, nothing can be written,
        or several cells in a row have failed.
    """
    if not 0 < lease_seconds <= MOST_SECONDS:
        raise UserError(
            f"lease_seconds={lease_seconds} must be positive, and at most {MOST_SECONDS:g} (a day); {SECONDS:g} is the "
            "default"
        )
    if not sweep.name:
        raise UserError("the sweep has no name; register it, or give it one: Sweep(..., name='mine')")
    check_operational(settings or {})
    cells = [_changed(cell, settings or {}) for cell in sweep.select(everything)]
    runtime.initialize()
    runtime.check_joined()
    # What is wrong with this worker is said before it claims a cell: no cell fails for it.
    for cfg in {(c.config.mesh, c.config.data.batch_size, c.config.run.microbatches): c.config for c in cells}.values():
        trainer.fitting_mesh(cfg)
    keep_compiled()
    workdir = runtime.everywhere(lambda: run_path(workdir))
    try:
        cells = _with_data(sweep, cells, workdir)
        runtime.everywhere(lambda: require_own_cells(sweep, workdir))
        runtime.require_shared(workdir)
        return _Worker(workdir, cells, lease_seconds, retry_failed, wait).run()
    except OSError as error:
        raise UserError(f"cannot go on with the sweep in {workdir}: {error}") from error


class _Worker:
    """One worker: what it knows of the sweep, and the cell that it is at."""

    def __init__(self, workdir: epath.Path, cells: Sequence[Cell], seconds: float, retry_failed: bool, wait: bool):
        self._workdir, self._cells = workdir, {cell.id: cell for cell in cells}
        self._seconds, self._wait = seconds, wait
        self._first = jax.process_index() == 0
        self._console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, quiet=not self._first)
        self._ran: list[str] = []
        self._failures = 0  # in a row
        self._last: Config | None = None  # the structure of the last cell
        self._spent = [0.0, 0.0]  # FLOPs of the cells that this worker finished, and seconds of work on them
        self._watched: dict[str, bytes] = {}  # cell -> its lease, when nothing was left but to wait for it
        self._board = runtime.everywhere(lambda: Board(workdir / "leases") if self._first else None)
        # Each failed cell gets one more try of this worker.
        self._retry = set(self._cells_in("failed")) if retry_failed else set()

    def run(self) -> Finished:
        stopped, waiting = False, False
        with signals.stop_signals() as signal:
            while not stopped:
                cell, lease, others = self._next()
                if cell is None and not others:
                    break
                if cell is None:
                    if not waiting:
                        what = "those" if self._wait else "a sign of life in those"
                        self._say(f"no cell is free; waiting for {what} that other workers have")
                    waiting = True
                    signal.wait(POLL_SECONDS)
                    stopped = runtime.any_process(signal.is_set())[0]
                    continue
                waiting = False
                with lease or nullcontext():
                    stopped = runtime.any_process(signal.is_set())[0]
                    if stopped and lease:
                        lease.release()
                    stopped = stopped or self._run(cell, lease)
                # What the last run left in reference cycles holds memory of the devices.
                gc.collect()
        return Finished(self._cells_in("done"), self._cells_in("failed"), tuple(self._ran), stopped)

    def _cells_in(self, state: str) -> tuple[str, ...]:
        """The cells that are done, or have failed, as the first process sees it."""

        def look() -> list[str]:
            records = self._board.records(self._cells) if self._first else {}
            return [name for name in self._cells if name in records and records[name].state == state]

        return tuple(json.loads(runtime.gather(json.dumps(runtime.everywhere(look)))[0]))

    def _next(self) -> tuple[Cell | None, Lease | None, int]:
        """A cell that is this worker's now, if any is free, and how many of others' are to be waited for."""
        lease, others = runtime.everywhere(lambda: self._claim() if self._first else (None, 0))
        said = json.dumps([lease and lease.cell, others])
        name, others = json.loads(runtime.gather(said)[0])
        return self._cells[name] if name else None, lease, others

    def _claim(self) -> tuple[Lease | None, int]:
        records = self._board.records(self._cells)
        ended = {name for name, record in records.items() if record.state != "running"} - self._retry
        left = [cell for name, cell in self._cells.items() if name not in ended]
        # Cheap ones first; at one budget, those whose program this process has.
        for cell in sorted(left, key=lambda cell: (cell.budget, structure(cell.config) != self._last)):
            directory, retry = self._directory(cell), cell.id in self._retry
            lease = self._board.claim(cell.id, self._seconds, step=heartbeat_step(directory), failed=retry)
            if lease:
                self._retry.discard(cell.id)
                if not (directory / "DONE.json").exists():
                    self._watched.clear()
                    return lease, 0
                lease.done()  # its worker died between the last two writes
        if not self._wait:  # only for those that may be of dead workers: a lease that has changed is of one that lives
            first = {cell.id: self._watched.setdefault(cell.id, self._board.seen(cell.id)) for cell in left}
            left = [cell for cell in left if self._board.seen(cell.id) == first[cell.id]]
        return None, len(left)

    def _run(self, cell: Cell, lease: Lease | None) -> bool:
        """Trains a cell to its end and says what became of it; True if it was stopped on the way."""
        self._last = structure(cell.config)
        again = f", for the {_ordinal(lease.starts)} time" if lease and lease.starts > 1 else ""
        self._say(f"{cell.id}: begins{again}")
        try:
            run = trainer.train(cell.config, self._directory(cell), fence=lease)
        except Exception as error:
            if jax.process_count() > 1 and not isinstance(error, UserError | trainer.DivergenceError):
                raise  # of this process alone: the others learn of it by its end, as in any run
            self._give_up(cell, lease, error)
            return False
        except BaseException:
            if lease:
                lease.release()
            raise
        try:
            if lease:
                lease.done() if run.done else lease.release()
        except LeaseLost:
            log.warning("%s was taken over at its very end; what is written there is as good as the other's", cell.id)
        if not run.done:
            self._say(f"{cell.id}: stopped and saved at step {run.step}")
            return True
        self._ran.append(cell.id)
        self._failures = 0
        self._spent[0] += cell.flops
        self._spent[1] += sum(run.result["seconds_by_kind"][kind] for kind in ("train", "data", "evaluate"))
        loss, outlook = run.result["eval"]["nelbo_nats_per_token"], self._outlook()
        self._say(f"{cell.id}: {loss:.4f} nats per token; {outlook}")
        return False

    def _give_up(self, cell: Cell, lease: Lease | None, error: Exception) -> None:
        """Deals with a run that raised: the cell is another's by now, has failed, or it is the worker that is ill."""
        if runtime.any_process(lease is not None and lease.lost)[0]:
            self._say(f"{cell.id}: another worker has taken it over; leaving it")
            return
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:2000]
        of_files = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
        self._failures += not of_files
        self._say(f"{cell.id}: {'' if of_files else 'failed: '}{reason}")
        log.debug("cell %s", cell.id, exc_info=error)
        if lease:
            lease.release() if of_files else lease.fail(reason)
        if of_files:  # a disk or network, which has nothing to do with the cell
            raise error
        if self._failures >= MOST_FAILURES:
            raise UserError(
                f"{self._failures} cells in a row have failed, the last with {reason}; if it is this machine that is "
                "at fault, mend it, then begin them again with --retry_failed"
            )

    def _directory(self, cell: Cell) -> epath.Path:
        return self._workdir / "cells" / cell.id

    def _outlook(self) -> str:
        """How much is left, and for how long if this worker were alone with it."""
        done = self._cells_in("done")
        left = sum(cell.flops for name, cell in self._cells.items() if name not in done)
        hours = left / self._spent[0] * self._spent[1] / 3600
        rest = f", the rest takes one worker about {hours:.2g} h" if left else ""
        return f"{len(done)} of {len(self._cells)} cells are done{rest}"

    def _say(self, line: str) -> None:
        self._console.print(line)


def _changed(cell: Cell, changes: Mapping[str, Any]) -> Cell:
    return dataclasses.replace(cell, config=config_io.with_fields(cell.config, changes))


def _with_data(sweep: Sweep, cells: list[Cell], workdir: epath.Path) -> list[Cell]:
    """The cells with the dataset's path, which is the same dataset for all workers at all times."""
    first = cells[0].config
    if not first.data.path and (not sweep.source or in_bucket(workdir)):
        why = "cannot prepare its data in a bucket" if sweep.source else "names no data"
        raise UserError(f"sweep {sweep.name!r} {why}: give --data.path, a directory made by {_how_to_prepare(first)}")
    if not first.data.path:
        prepared = dataclasses.replace(first, data=dataclasses.replace(first.data, source=sweep.source))
        datasets.open_or_prepare(prepared, workdir)
        cells = [_changed(cell, {"data.path": str(workdir / "data")}) for cell in cells]
    else:
        runtime.everywhere(lambda: _require_fit(first))
    dataset = datasets.open_or_prepare(cells[0].config, workdir)
    recipe, held_out = cells[0].recipe, dataset.metadata.splits["validation"].records
    if held_out < recipe.eval_records and jax.process_index() == 0:
        log.warning("there are %d held-out records, and the recipe asks for %d", held_out, recipe.eval_records)
    identity = {
        "sweep": sweep.name,
        "dataset": dataset.metadata.sha256,
        "unique_tokens": dataset.metadata.splits["train"].records * first.data.sequence_length,
    }
    runtime.everywhere(lambda: _require_identity(workdir, identity) if jax.process_index() == 0 else None)
    return cells


def _how_to_prepare(cfg: Config) -> str:
    size = cfg.model.vocab_size
    tokens = "--tokenizer byte" if size == ByteTokenizer.vocab_size else f"--vocab_size {size}"
    return f"`diffusionlm data prepare TEXT {tokens} --sequence_length {cfg.data.sequence_length} --output DIR`"


def _require_fit(cfg: Config) -> None:
    """Raises `UserError` unless the dataset is as the cells need it, which are not to be changed for it."""
    there, wanted = open_dataset(cfg.data.path).metadata, (cfg.model.vocab_size, cfg.data.sequence_length)
    if (there.vocab_size, there.sequence_length) != wanted:
        raise UserError(
            f"dataset {cfg.data.path} has {there.vocab_size} tokens and sequences of {there.sequence_length}, and the "
            f"cells need {wanted[0]} and {wanted[1]}: make one by {_how_to_prepare(cfg)}"
        )


def require_own_cells(sweep: Sweep, workdir: epath.Path) -> None:
    """Says which cells in the directory are not of this sweep, as when its recipe was changed; refuses if none is."""
    if jax.process_index() or not (workdir / "cells").exists():
        return
    there = {path.name for path in (workdir / "cells").iterdir()}
    others = there - {cell.id for cell in sweep.select(everything=True)}
    if others and others == there:
        raise UserError(
            f"{workdir} holds {len(there)} cells, and none is of this sweep, whose recipe must have changed since "
            f"(such as {min(there)}); use another --workdir, or delete {workdir}/cells and {workdir}/leases"
        )
    if others:
        log.warning("%d of the %d cells in %s are not of this sweep; they stay there", len(others), len(there), workdir)


def _require_identity(workdir: epath.Path, identity: dict[str, Any]) -> None:
    text = write_once(workdir, "sweep.json", json.dumps(identity, indent=2) + "\n")
    there = as_identity(text, workdir / "sweep.json")
    if differ := [name for name in ("sweep", "dataset") if there[name] != identity[name]]:
        shown = ", ".join(f"{name} {there[name]} there, {identity[name]} here" for name in differ)
        if differ == ["dataset"]:
            raise UserError(f"{workdir} was begun with other data: {shown}; give its --data.path, or another --workdir")
        raise UserError(f"{workdir} holds another sweep: {shown}; use another --workdir")


def keep_compiled() -> None:
    """Keeps compiled programs on this host, for workers that start again and for others beside it.

    JAX_COMPILATION_CACHE_DIR says where, if it is set. Not in the sweep's directory: programs for a processor may not
    run on another host's.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if jax.config.jax_compilation_cache_dir or not os.path.isabs(home):
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(home) / "diffusionlm" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
