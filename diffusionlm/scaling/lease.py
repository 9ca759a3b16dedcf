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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import tensorstore as ts
from etils import epath

from diffusionlm.errors import UserError
from diffusionlm.files import in_bucket

log = logging.getLogger(__name__)

SECONDS = 120.0  # that a lease lasts without being renewed
RENEWALS = 4  # in that time


class LeaseLost(OSError):
    """The cell belongs to another worker by now. An OSError: nothing more can be written about it."""


@dataclass(frozen=True)
class Record:
    """What a lease says."""

    state: Literal["running", "failed"]
    holder: str  # host and process, for people
    token: str  # of the claim
    seconds: float  # that it lasts without being renewed
    time: float  # of the holder's clock when it was written, for people
    starts: int = 1  # claims of this cell so far
    reason: str = ""  # why it failed


class Board:
    """The leases of a sweep, as one worker sees them."""

    def __init__(self, directory: epath.PathLike, clock: Callable[[], float] = time.monotonic):
        self._kv = open_store(epath.Path(directory))
        self._clock = clock
        self._seen: dict[str, tuple[bytes, float]] = {}  # cell -> the lease as it was last seen, and since when

    def records(self) -> dict[str, Record]:
        """Every lease there is, by cell."""
        reads = {key.decode(): self._kv.read(key) for key in self._kv.list().result()}
        found = {cell: _record(cell, read.result()) for cell, read in reads.items()}
        return {cell: record for cell, record in found.items() if record}

    def claim(self, cell: str, seconds: float = SECONDS, *, failed: bool = False) -> "Lease | None":
        """The lease of a cell that is free, or whose holder has not been heard of for as long as its lease lasts.

        Args:
          cell: its id.
          seconds: how long the lease lasts without being renewed.
          failed: whether one that has failed is free.

        Returns:
          None where another worker has it, or was faster.
        """
        record, generation = self._read(cell)
        if record and not (failed if record.state == "failed" else self._overdue(cell, record, generation)):
            return None
        mine = Record(
            "running", _holder(), uuid.uuid4().hex, seconds, time.time(), 1 + (record.starts if record else 0)
        )
        written = self._write(cell, mine, generation)
        return Lease(self, cell, mine, written) if written else None

    def _overdue(self, cell: str, record: Record, generation: bytes) -> bool:
        """Whether this lease has been seen here, unchanged, for as long as it lasts."""
        now = self._clock()
        before, since = self._seen.get(cell, (b"", now))
        if before != generation:
            since = now
            self._seen[cell] = (generation, since)
        return now - since > record.seconds

    def _read(self, cell: str) -> tuple[Record | None, bytes]:
        found = self._kv.read(cell).result()
        return _record(cell, found), found.stamp.generation

    def _write(self, cell: str, record: Record | None, generation: bytes) -> bytes | None:
        """Replaces (None: deletes) a lease that is still of that generation; its new one, or None if it is not."""
        text = None if record is None else json.dumps(asdict(record)).encode()
        return self._kv.write(cell, text, if_equal=generation).result().generation or None


class Lease:
    """A cell that is this worker's, renewed in the background for as long as the `with` block lasts."""

    def __init__(self, board: Board, cell: str, record: Record, generation: bytes):
        self._board, self.cell, self._record, self._generation = board, cell, record, generation
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._renewed = time.monotonic()
        self.lost = False  # or given back
        self._thread = threading.Thread(target=self._keep, name=f"lease of {cell}", daemon=True)

    @property
    def starts(self) -> int:
        """Claims of this cell so far, with this one."""
        return self._record.starts

    def check(self) -> None:
        """Raises `LeaseLost` if another worker may have the cell by now; asks only when renewals are overdue.

        So it is after this process has been stopped for a while and goes on.
        """
        if self.lost or time.monotonic() - self._renewed > self._record.seconds / 2:
            self.confirm()

    def confirm(self) -> None:
        """Renews the lease; raises `LeaseLost` if another worker has the cell by now."""
        self._replace(replace(self._record, time=time.time()))

    def release(self) -> None:
        """Gives the cell back."""
        self._replace(None, last=True)

    def fail(self, reason: str) -> None:
        """Notes that the cell cannot be run, and why."""
        self._replace(replace(self._record, state="failed", reason=reason, time=time.time()), last=True)

    def _replace(self, record: Record | None, *, last: bool = False) -> None:
        with self._lock:
            if self.lost:
                raise LeaseLost(f"cell {self.cell} was taken over by another worker")
            self.lost = last  # a renewal in the background that comes after it must not bring it back
            began = time.monotonic()
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
            except Exception as error:  # of a network, for a moment; who writes asks again
                log.warning("cannot renew the lease of %s: %s", self.cell, error)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _record(cell: str, found: ts.KvStore.ReadResult) -> Record | None:
    if found.state == "missing":
        return None
    try:
        return Record(**json.loads(found.value))
    except (ValueError, TypeError) as error:
        raise UserError(f"the lease of cell {cell} is damaged ({error}); delete it, and start again") from error


def open_store(directory: epath.Path) -> ts.KvStore:
    """The directory as a key-value store with conditional writes.

    Raises:
      UserError: it cannot be opened.
    """
    if in_bucket(directory):
        spec: object = f"{str(directory).rstrip('/')}/"
    else:
        spec = {"driver": "file", "path": f"{os.path.abspath(directory)}/"}
    try:
        return ts.KvStore.open(spec).result()
    except ValueError as error:
        raise UserError(f"cannot keep leases in {directory}: {' '.join(str(error).split())}") from error


def _holder() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
