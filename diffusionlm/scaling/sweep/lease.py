"""Leases, which say which worker has which cell, in a directory that all workers share, on a disk or in a bucket.

A lease is one small object, and each change to it takes effect only if the object is still the one that was read, so of
several workers that want a cell exactly one gets it. The holder renews its lease regularly. A worker that has seen the
same lease for longer than it lasts, by the worker's own clock, takes it over: clocks of different machines are never
compared.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from typing import Literal

import tensorstore as ts
from etils import epath

from diffusionlm.errors import UserError
from diffusionlm.scaling.sweep.conditional_writes import open_store, store_errors, write

log = logging.getLogger(__name__)

LEASE_SECONDS = 120.0  # how long a lease lasts without being renewed
RENEWALS = 4  # renewals in that time
MAX_DEATHS = 4  # workers in a row that may die without progress before the cell counts as failed
# CLOCK_BOOTTIME, where it exists, also counts the time for which the machine sleeps.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def clock() -> float:
    """Return the time by which this machine judges leases, in seconds."""
    return time.clock_gettime(_CLOCK)


class LeaseLost(OSError):
    """Another worker has the cell. This is an `OSError` because nothing more can be written about the cell."""


@dataclass(frozen=True)
class LeaseRecord:
    """The content of a lease."""

    state: Literal["running", "failed", "done"]
    holder: str  # host and process, for people to read
    token: str  # unique to the claim
    seconds: float  # how long the lease lasts without being renewed
    time: float  # the holder's clock when the lease was written, for people to read
    starts: int = 1  # claims of this cell so far
    step: int = 0  # the furthest step that the cell is known to have reached
    deaths: int = 0  # workers in a row that died without getting past this step
    reason: str = ""  # why the cell failed


class Leases:
    """The leases of a sweep, as one worker sees them."""

    def __init__(self, directory: epath.PathLike, clock: Callable[[], float] = clock):
        self._kv = open_store(epath.Path(directory))
        self._clock = clock
        self._seen: dict[str, tuple[bytes, float]] = {}  # cell -> generation of the lease, and since when it is seen

    def records(self, cells: Collection[str]) -> dict[str, LeaseRecord]:
        """Return the leases of those of these cells that have one."""
        with store_errors():
            existing = {key.decode(errors="replace") for key in self._kv.list().result()}
            reads = {cell: self._kv.read(cell) for cell in cells if cell in existing}
            contents = {cell: read.result() for cell, read in reads.items()}
        return {cell: record for cell, content in contents.items() if (record := _record(cell, content))}

    def claim(
        self, cell: str, seconds: float = LEASE_SECONDS, *, step: int = 0, retry_failed: bool = False
    ) -> "Lease | None":
        """Claim a cell that is free, or whose lease has expired.

        A cell whose workers died several times without any progress is marked as failed instead.

        Args:
          cell: the id of the cell.
          seconds: how long the lease lasts without being renewed.
          step: the step that the cell has reached.
          retry_failed: treat a failed cell as free.

        Returns:
          The lease, or None if another worker has the cell or was faster.
        """
        record, generation = self._read(cell)
        starts = deaths = 0
        if record:
            if record.state == "done" or (record.state == "failed" and not retry_failed):
                return None
            if record.state == "running" and not self._expired(cell, record, generation):
                return None
            starts = record.starts
            if record.state == "running" and step <= record.step:
                # Heartbeats lag, so the step at which workers die varies a little: compare with the furthest one.
                deaths, step = record.deaths + 1, record.step
        holder = f"{socket.gethostname()}:{os.getpid()}"
        claim = LeaseRecord("running", holder, uuid.uuid4().hex, seconds, time.time(), starts + 1, step, deaths)
        if deaths >= MAX_DEATHS:
            reason = f"its workers died {deaths} times in a row without getting past step {step}, leaving no reason"
            self._write(cell, replace(claim, state="failed", reason=reason), generation)
            return None
        claimed_at = self._clock()
        written = self._write(cell, claim, generation)
        return Lease(self, cell, claim, written, claimed_at) if written else None

    def last_seen(self, cell: str) -> bytes:
        """Return the generation of the lease that `claim` saw last; it changes whenever the lease does."""
        return self._seen.get(cell, (b"", 0.0))[0]

    def _expired(self, cell: str, record: LeaseRecord, generation: bytes) -> bool:
        """Return True if this worker has seen the lease unchanged for longer than it lasts."""
        now = self._clock()
        previous, since = self._seen.get(cell, (b"", now))
        if previous != generation:
            since = now
            self._seen[cell] = (generation, since)
        return now - since > record.seconds

    def _read(self, cell: str) -> tuple[LeaseRecord | None, bytes]:
        with store_errors():
            content = self._kv.read(cell).result()
        return _record(cell, content), content.stamp.generation

    def _write(self, cell: str, record: LeaseRecord | None, generation: bytes) -> bytes | None:
        """Replace (None: delete) a lease that still has this generation; return the new one, or None if it has not."""
        text = None if record is None else json.dumps(asdict(record)).encode()
        return write(self._kv, cell, text, generation)


class Lease:
    """A cell that belongs to this worker; inside a `with` block the lease is renewed in the background."""

    def __init__(self, leases: Leases, cell: str, record: LeaseRecord, generation: bytes, claimed_at: float):
        self._leases, self.cell, self._record, self._generation = leases, cell, record, generation
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._renewed_at = claimed_at  # before the write, whose answer may take long
        self.lost = False  # taken over, or given up by one of the methods below
        self._thread = threading.Thread(target=self._keep_renewing, name=f"lease of {cell}", daemon=True)

    @property
    def starts(self) -> int:
        """The number of claims of this cell so far, this one included."""
        return self._record.starts

    def check(self) -> None:
        """Raise `LeaseLost` if another worker has the cell; reads the store only when renewals are overdue.

        Renewals are overdue after this process, or its machine, was asleep for a while.
        """
        if self.lost or self._leases._clock() - self._renewed_at > self._record.seconds / 2:
            self.confirm()

    def confirm(self) -> None:
        """Renew the lease, or raise `LeaseLost` if another worker has the cell."""
        self._replace(replace(self._record, time=time.time()))

    def release(self) -> None:
        """Give the cell back, for any worker to resume."""
        self._replace(None, last=True)

    def done(self) -> None:
        """Record that the cell is finished."""
        self._replace(replace(self._record, state="done", time=time.time()), last=True)

    def fail(self, reason: str) -> None:
        """Record that the cell failed, and why."""
        self._replace(replace(self._record, state="failed", reason=reason, time=time.time()), last=True)

    def _replace(self, record: LeaseRecord | None, *, last: bool = False) -> None:
        with self._lock:
            if self.lost:
                raise LeaseLost(f"cell {self.cell} was taken over by another worker")
            self.lost = last  # so that a later renewal in the background does not bring the lease back
            now = self._leases._clock()
            written = self._leases._write(self.cell, record, self._generation)
            if written is None:  # another worker has it, or the answer to an earlier write got lost
                current, generation = self._leases._read(self.cell)
                if current and current.token == self._record.token:
                    written = self._leases._write(self.cell, record, generation)
            if written is None:
                self.lost = True
                raise LeaseLost(f"cell {self.cell} was taken over by another worker")
            self._generation, self._renewed_at = written, now

    def _keep_renewing(self) -> None:
        while not self._closed.wait(self._record.seconds / RENEWALS):
            try:
                self.confirm()
            except LeaseLost:
                return
            except OSError as error:  # a network may fail for a moment; whoever writes next asks again
                log.warning("cannot renew the lease of %s: %s", self.cell, error)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()


def _record(cell: str, content: ts.KvStore.ReadResult) -> LeaseRecord | None:
    if content.state == "missing":
        return None
    try:
        return LeaseRecord(**json.loads(content.value))
    except (ValueError, TypeError) as error:
        raise UserError(f"the lease of cell {cell} is damaged ({error}); delete it, and start again") from error
