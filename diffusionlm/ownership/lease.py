"""Leases, which say who has what, in a directory that several processes share, on a disk or in a bucket.

A lease is one small object, and each change to it takes effect only if the object is still the one that was read, so of
several processes that want it exactly one gets it. The holder renews its lease regularly. Clocks of different machines
are never compared: whoever has seen the same lease for longer than it lasts, by its own clock, may take it over.
"""

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import Annotated, Any, Generic, Self, TypeVar

import msgspec
import tensorstore as ts

from diffusionlm.errors import UserError
from diffusionlm.ownership.conditional_writes import require_file, store_errors, write
from diffusionlm.ownership.process_identity import Process
from diffusionlm.schema import Record, decode
from diffusionlm.untrusted import printable

log = logging.getLogger(__name__)

LEASE_SECONDS = 120.0  # how long a lease lasts without being renewed
MAX_LEASE_SECONDS = 86400.0
RENEWALS = 4  # renewals in the time that a lease lasts
CLOSE_SECONDS = 10.0  # for which the end of a lease waits for a renewal that may hang
# CLOCK_BOOTTIME, where it exists, also counts the time for which the machine sleeps.
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def clock() -> float:
    """Return the time by which this machine judges leases, in seconds."""
    return time.clock_gettime(_CLOCK)


class LeaseLost(OSError):
    """Another process has what was leased. This is an `OSError` because nothing more can be written about it."""


class Term(Record, frozen=True, kw_only=True):
    """The part of a lease's content that all kinds of leases share."""

    holder: str  # host and process, for people to read
    process: Process | None = None  # the same, for programs
    token: str  # unique to the claim
    seconds: Annotated[float, msgspec.Meta(gt=0, le=MAX_LEASE_SECONDS)]  # how long it lasts without being renewed
    time: float  # the holder's clock when the lease was written, for people to read


R = TypeVar("R", bound=Term)


class Slot(Generic[R]):
    """The place of one lease in a store."""

    def __init__(self, store: ts.KvStore, name: str, kind: type[R], subject: str):
        """Name a place: the object `name` of `store`, of type `kind`, for `subject`, such as "cell a", in messages."""
        self._store, self._name, self._kind, self.subject = store, name, kind, subject

    def read(self) -> tuple[R | None, bytes]:
        """Return the lease, None if there is none, and its generation, which changes whenever the lease does.

        Raises:
          UserError: the lease is damaged.
          OSError: the store cannot be read.
        """
        require_file(self._store, self._name)
        with store_errors():
            content = self._store.read(self._name).result()
        return self.parse(content), content.stamp.generation

    def parse(self, content: ts.KvStore.ReadResult) -> R | None:
        """Return the lease in what was read from this place."""
        if content.state == "missing":
            return None
        try:
            return decode(content.value, self._kind, "lease")
        except UserError as error:
            reason, place = str(error).removeprefix("lease: "), printable(f"{self._store.path}{self._name}")
            raise UserError(f"the lease of {self.subject} is damaged ({reason}); delete {place}") from error

    def write(self, record: R | None, generation: bytes) -> bytes | None:
        """Replace (None: delete) a lease that still has this generation; return the new one, or None if it has not."""
        text = None if record is None else msgspec.json.encode(record)
        return write(self._store, self._name, text, generation)


_held: "weakref.WeakSet[Lease[Any]]" = weakref.WeakSet()  # leases that are being renewed


def is_held(token: str) -> bool:
    """Return True if this process renews the lease of the claim with this token."""
    return any(lease.token == token for lease in list(_held))


def release_all(seconds: float) -> None:
    """Give back everything that this process holds, before it ends without unwinding; wait `seconds` at most."""

    def release() -> None:
        for lease in list(_held):
            with contextlib.suppress(OSError):  # it expires
                lease.release()

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    thread.join(seconds)


class Lease(Generic[R]):
    """A lease that this process holds; inside a `with` block the lease is renewed in the background."""

    def __init__(self, slot: Slot[R], record: R, generation: bytes, claimed_at: float, clock: Callable[[], float]):
        self._slot, self._record, self._generation, self._clock = slot, record, generation, clock
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._renewed_at = claimed_at  # before the write, whose answer may take long
        self.lost = False  # taken over, or given up
        self._thread = threading.Thread(target=self._keep_renewing, name=f"lease of {slot.subject}", daemon=True)

    @property
    def token(self) -> str:
        """The token of the claim."""
        return self._record.token

    def check(self) -> None:
        """Raise `LeaseLost` if another process has it; reads the store only when renewals are overdue.

        Renewals are overdue after this process, or its machine, was asleep for a while.
        """
        if self.lost or self._clock() - self._renewed_at > self._record.seconds / 2:
            self.confirm()

    def confirm(self) -> None:
        """Renew the lease, or raise `LeaseLost` if another process has it."""
        self.replace()

    def release(self) -> None:
        """Give it back, for any process to claim."""
        self._replace(None, last=True)

    def replace(self, *, last: bool = False, **changes: Any) -> None:
        """Write the lease with other values of some fields; the `last` time, it is not renewed any more."""
        self._replace(msgspec.structs.replace(self._record, time=time.time(), **changes), last=last)

    def _replace(self, record: R | None, *, last: bool) -> None:
        with self._lock:
            if self.lost:
                raise LeaseLost(f"{self._slot.subject} was taken over by another process")
            self.lost = last  # so that a later renewal in the background does not bring the lease back
            now = self._clock()
            written = self._slot.write(record, self._generation)
            if written is None:  # another process has it, or the answer to an earlier write got lost
                current, generation = self._read()
                if current and current.token == self._record.token:
                    written = self._slot.write(record, generation)
                if written is None:
                    self.lost = True
                    by = f"by {printable(current.holder)}" if current else "by another process, or its lease deleted"
                    raise LeaseLost(f"{self._slot.subject} was taken over {by}")
            self._generation, self._renewed_at = written, now

    def _read(self) -> tuple[R | None, bytes]:
        try:
            return self._slot.read()
        except UserError as error:  # whoever damaged it, nothing may be written any more
            self.lost = True
            raise LeaseLost(str(error)) from error

    def _keep_renewing(self) -> None:
        while not self._closed.wait(self._record.seconds / RENEWALS):
            try:
                self.confirm()
            except LeaseLost:
                return
            except OSError as error:  # a network may fail for a moment; whoever writes next asks again
                log.warning("cannot renew the lease of %s: %s", self._slot.subject, error)

    def __enter__(self) -> Self:
        self._thread.start()
        _held.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        _held.discard(self)
        self._closed.set()
        self._thread.join(CLOSE_SECONDS)
