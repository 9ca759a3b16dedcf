"""Leases of cells, which say which worker has which cell, in a directory that all workers share (see `lease`).

Of several workers that want a cell exactly one gets it. The lease of a worker that died expires: at once for a worker
on the same machine, else once it has been seen unchanged for longer than it lasts.
"""

import time
import uuid
from collections.abc import Callable, Collection
from typing import Annotated, Literal

import msgspec
from etils import epath

from diffusionlm.ownership import lease
from diffusionlm.ownership.conditional_writes import open_store, require_file, store_errors
from diffusionlm.ownership.lease import LEASE_SECONDS, Slot, Term, clock
from diffusionlm.ownership.process_identity import has_ended, this_process

MAX_DEATHS = 4  # workers in a row that may die without progress before the cell counts as failed
Count = Annotated[int, msgspec.Meta(ge=0)]


class LeaseRecord(Term, frozen=True, kw_only=True):
    """The content of a lease."""

    state: Literal["running", "failed", "done"]
    starts: Count = 1  # claims of this cell so far
    step: Count = 0  # the furthest step that the cell is known to have reached
    deaths: Count = 0  # workers in a row that died without getting past this step
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
            for cell in existing.intersection(cells):
                require_file(self._kv, cell)
            reads = {cell: self._kv.read(cell) for cell in cells if cell in existing}
            contents = {cell: read.result() for cell, read in reads.items()}
        return {cell: record for cell, content in contents.items() if (record := self._slot(cell).parse(content))}

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
        slot = self._slot(cell)
        record, generation = slot.read()
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
        process = this_process()
        claim = LeaseRecord(
            state="running",
            holder=f"{process.host}:{process.pid}",
            process=process,
            token=uuid.uuid4().hex,
            seconds=seconds,
            time=time.time(),
            starts=starts + 1,
            step=step,
            deaths=deaths,
        )
        if deaths >= MAX_DEATHS:
            reason = f"its workers died {deaths} times in a row without getting past step {step}, leaving no reason"
            slot.write(msgspec.structs.replace(claim, state="failed", reason=reason), generation)
            return None
        claimed_at = self._clock()
        written = slot.write(claim, generation)
        return Lease(cell, slot, claim, written, claimed_at, self._clock) if written else None

    def last_seen(self, cell: str) -> bytes:
        """Return the generation of the lease that `claim` saw last; it changes whenever the lease does."""
        return self._seen.get(cell, (b"", 0.0))[0]

    def _expired(self, cell: str, record: LeaseRecord, generation: bytes) -> bool:
        """Return True if its worker is known to have died, or this worker has seen it unchanged for all its time."""
        now = self._clock()
        previous, since = self._seen.get(cell, (b"", now))
        if previous != generation:
            since = now
            self._seen[cell] = (generation, since)
        return now - since > record.seconds or (record.process is not None and has_ended(record.process))

    def _slot(self, cell: str) -> Slot[LeaseRecord]:
        return Slot(self._kv, cell, LeaseRecord, f"cell {cell}")


class Lease(lease.Lease[LeaseRecord]):
    """A cell that belongs to this worker; inside a `with` block the lease is renewed in the background."""

    def __init__(
        self,
        cell: str,
        slot: Slot[LeaseRecord],
        record: LeaseRecord,
        generation: bytes,
        claimed_at: float,
        clock: Callable[[], float],
    ):
        super().__init__(slot, record, generation, claimed_at, clock)
        self.cell = cell
        self.starts = record.starts  # claims of this cell so far, this one included

    def done(self) -> None:
        """Record that the cell is finished."""
        self.replace(state="done", last=True)

    def fail(self, reason: str) -> None:
        """Record that the cell failed, and why."""
        self.replace(state="failed", reason=reason, last=True)
