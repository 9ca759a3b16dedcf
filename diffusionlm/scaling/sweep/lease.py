"""Which worker has which cell: leases in a directory that all workers share, on a disk or in a bucket.

A lease is one small object, and every change to it is a write that happens only if the object is still the one that was
read (TensorStore's key-value stores do this on file systems and on object stores alike): of several workers that want
a cell, one gets it. The holder rewrites its lease every so often. Who sees the same lease for longer than it lasts, by
their own clock, takes it over; clocks of different machines are never compared.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Literal

import tensorstore as ts
from etils import epath

from diffusionlm.errors import UserError
from diffusionlm.storage import in_bucket

log = logging.getLogger(__name__)

SECONDS = 120.0  # that a lease lasts without being renewed
RENEWALS = 4  # in that time
MOST_DEATHS = 4  # of workers one after another that get a cell no further, before it counts as failed
# It also goes on while the machine sleeps, where there is such a clock.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def clock() -> float:
    """Seconds, by which this machine judges leases."""
    return time.clock_gettime(_CLOCK)


class LeaseLost(OSError):
    """The cell belongs to another worker by now. An OSError: nothing more can be written about it."""


@dataclass(frozen=True)
class Record:
    """What a lease says."""

    state: Literal["running", "failed", "done"]
    holder: str  # host and process, for people
    token: str  # of the claim
    seconds: float  # that it lasts without being renewed
    time: float  # of the holder's clock when it was written, for people
    starts: int = 1  # claims of this cell so far
    step: int = 0  # the furthest that the cell is known to have come
    deaths: int = 0  # of the workers right before, that got no further than this step
    reason: str = ""  # why it failed


class Board:
    """The leases of a sweep, as one worker sees them."""

    def __init__(self, directory: epath.PathLike, clock: Callable[[], float] = clock):
        self._kv = open_store(epath.Path(directory))
        self._clock = clock
        self._seen: dict[str, tuple[bytes, float]] = {}  # cell -> the lease as it was last seen, and since when

    def records(self, cells: Collection[str]) -> dict[str, Record]:
        """What the leases of these cells say; those that have none are not in it."""
        with _store_errors():
            there = {key.decode(errors="replace") for key in self._kv.list().result()}
            reads = {cell: self._kv.read(cell) for cell in cells if cell in there}
            found = {cell: read.result() for cell, read in reads.items()}
        return {cell: record for cell, read in found.items() if (record := _record(cell, read))}

    def claim(self, cell: str, seconds: float = SECONDS, *, step: int = 0, failed: bool = False) -> "Lease | None":
        """The lease of a cell that is free, or whose holder has not been heard of for as long as its lease lasts.

        A cell whose workers died several times without getting it any further is not free, but has failed.

        Args:
          cell: its id.
          seconds: how long the lease lasts without being renewed.
          step: where the cell stands.
          failed: whether one that has failed is free.

        Returns:
          None where another worker has it, or was faster.
        """
        record, generation = self._read(cell)
        starts = deaths = 0
        if record:
            if record.state == "done" or (record.state == "failed" and not failed):
                return None
            if record.state == "running" and not self._overdue(cell, record, generation):
                return None
            starts = record.starts
            if record.state == "running" and step <= record.step:
                # Where they died may vary by some steps, as heartbeats do: none was further than the furthest.
                deaths, step = record.deaths + 1, record.step
        holder = f"{socket.gethostname()}:{os.getpid()}"
        mine = Record("running", holder, uuid.uuid4().hex, seconds, time.time(), starts + 1, step, deaths)
        if deaths >= MOST_DEATHS:
            reason = f"its workers died {deaths} times in a row without getting past step {step}, and could not say why"
            self._write(cell, replace(mine, state="failed", reason=reason), generation)
            return None
        began = self._clock()
        written = self._write(cell, mine, generation)
        return Lease(self, cell, mine, written, began) if written else None

    def seen(self, cell: str) -> bytes:
        """Which lease of this cell `claim` saw last: another value means that it was renewed, or is another's."""
        return self._seen.get(cell, (b"", 0.0))[0]

    def _overdue(self, cell: str, record: Record, generation: bytes) -> bool:
        """Whether this lease has been seen here, unchanged, for as long as it lasts."""
        now = self._clock()
        before, since = self._seen.get(cell, (b"", now))
        if before != generation:
            since = now
            self._seen[cell] = (generation, since)
        return now - since > record.seconds

    def _read(self, cell: str) -> tuple[Record | None, bytes]:
        with _store_errors():
            found = self._kv.read(cell).result()
        return _record(cell, found), found.stamp.generation

    def _write(self, cell: str, record: Record | None, generation: bytes) -> bytes | None:
        """Replaces (None: deletes) a lease that is still of that generation; its new one, or None if it is not."""
        text = None if record is None else json.dumps(asdict(record)).encode()
        with _store_errors():
            return self._kv.write(cell, text, if_equal=generation).result().generation or None


class Lease:
    """A cell that is this worker's, renewed in the background for as long as the `with` block lasts."""

    def __init__(self, board: Board, cell: str, record: Record, generation: bytes, began: float):
        self._board, self.cell, self._record, self._generation = board, cell, record, generation
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._renewed = began  # before the write: its answer may have taken long
        self.lost = False  # or given back
        self._thread = threading.Thread(target=self._keep, name=f"lease of {cell}", daemon=True)

    @property
    def starts(self) -> int:
        """Claims of this cell so far, with this one."""
        return self._record.starts

    def check(self) -> None:
        """Raises `LeaseLost` if another worker may have the cell by now; asks only when renewals are overdue.

        So it is after this process, or its machine, was asleep for a while.
        """
        if self.lost or self._board._clock() - self._renewed > self._record.seconds / 2:
            self.confirm()

    def confirm(self) -> None:
        """Renews the lease; raises `LeaseLost` if another worker has the cell by now."""
        self._replace(replace(self._record, time=time.time()))

    def release(self) -> None:
        """Gives the cell back, for another worker to go on with."""
        self._replace(None, last=True)

    def done(self) -> None:
        """Notes that the cell is finished."""
        self._replace(replace(self._record, state="done", time=time.time()), last=True)

    def fail(self, reason: str) -> None:
        """Notes that the cell cannot be run, and why."""
        self._replace(replace(self._record, state="failed", reason=reason, time=time.time()), last=True)

    def _replace(self, record: Record | None, *, last: bool = False) -> None:
        with self._lock:
            if self.lost:
                raise LeaseLost(f"cell {self.cell} was taken over by another worker")
            self.lost = last  # a renewal in the background that comes after it must not bring it back
            began = self._board._clock()
            written = self._board._write(self.cell, record, self._generation)
            if written is None:  # it is another's, or an answer to a write of ours was lost on its way
                there, generation = self._board._read(self.cell)
                if there and there.token == self._record.token:
                    written = self._board._write(self.cell, record, generation)
            if written is None:
                self.lost = True
                raise LeaseLost(f"cell {self.cell} was taken over by another worker")
            self._generation, self._renewed = written, began

    def _keep(self) -> None:
        while not self._over.wait(self._record.seconds / RENEWALS):
            try:
                self.confirm()
            except LeaseLost:
                return
            except OSError as error:  # of a network, for a moment; who writes asks again
                log.warning("cannot renew the lease of %s: %s", self.cell, error)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def open_store(directory: epath.Path) -> ts.KvStore:
    """The directory as a key-value store with conditional writes.

    Raises:
      OSError: it cannot be opened.
    """
    if in_bucket(directory):
        spec: object = f"{str(directory).rstrip('/')}/"
    else:
        spec = {"driver": "file", "path": f"{os.path.abspath(directory)}/"}
    with _store_errors():
        return ts.KvStore.open(spec).result()


def write_once(directory: epath.Path, name: str, text: str) -> str:
    """Writes a file unless there is one; returns what it holds then, whoever was first."""
    store = open_store(directory)
    with _store_errors():
        found = store.read(name).result()
        if found.state == "missing":
            store.write(name, text.encode(), if_equal=found.stamp.generation).result()
            found = store.read(name).result()
        return found.value.decode(errors="replace")


def _record(cell: str, found: ts.KvStore.ReadResult) -> Record | None:
    if found.state == "missing":
        return None
    try:
        return Record(**json.loads(found.value))
    except (ValueError, TypeError) as error:
        raise UserError(f"the lease of cell {cell} is damaged ({error}); delete it, and start again") from error


@contextmanager
def _store_errors() -> Iterator[None]:
    """What TensorStore says of a disk or network that fails is an OSError here, as it is elsewhere."""
    try:
        yield
    except ValueError as error:
        raise OSError(f"cannot reach the leases: {' '.join(str(error).split())}") from error
