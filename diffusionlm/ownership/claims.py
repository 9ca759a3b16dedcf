"""One owner for each directory that is written: a run's, and the outputs of `prepare`, `import` and `export`.

The owner holds a lease (see `lease`). Another process is told who it is. An owner that died is succeeded at once on its
own machine; elsewhere, the next process waits until the lease has not been renewed for as long as it lasts.
"""

import contextlib
import errno
import glob
import hashlib
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from etils import epath

from diffusionlm.errors import StorageError, UserError
from diffusionlm.ownership.conditional_writes import open_store
from diffusionlm.ownership.lease import LEASE_SECONDS, Lease, LeaseLost, Slot, Term, clock, is_held
from diffusionlm.ownership.process_identity import has_ended, is_local, this_process
from diffusionlm.storage import require_directory
from diffusionlm.untrusted import printable

log = logging.getLogger(__name__)

FILE = "owner.json"  # of a run directory
POLL_SECONDS = 1.0  # between looks at a lease that may expire
# What the operating system says where the file system has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Owner(Term, frozen=True, kw_only=True):
    """The content of the lease of a directory."""

    since: float  # seconds since 1970, by the holder's clock
    group: str = ""  # processes of one group succeed each other at once: something else keeps them apart


class Claimant:
    """One attempt to own something; it may have to wait for the lease of an owner that seems dead."""

    def __init__(
        self,
        place: epath.Path,
        subject: str,
        advice: str,
        *,
        group: str = "",
        wait: bool = False,
        seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = clock,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Prepare to claim.

        Args:
          place: the file of the lease.
          subject: what is to be owned, in messages.
          advice: what to do instead of waiting for its owner, such as "use another --output".
          group: the group of this process; "" for none.
          wait: wait for an owner that is alive, rather than refuse.
          seconds: how long the lease lasts without being renewed.
          clock: measures how long another owner's lease has been seen.
          sleep: waits between two looks.
        """
        self._place, self._subject, self._advice, self._group, self._wait = place, subject, advice, group, wait
        self._seconds, self._clock, self._sleep = seconds, clock, sleep
        self._slot = Slot(open_store(place.parent), place.name, Owner, subject)

    def claim(self) -> Lease[Owner]:
        """Return the lease, once it is this process's.

        Raises:
          UserError: a living process has it, or the lease is damaged.
          OSError: the store cannot be reached.
        """
        first: bytes | None = None  # the generation of the lease of another owner when it was seen first
        since = 0.0
        while True:
            owner, generation = self._slot.read()
            expired = generation == first and owner is not None and self._clock() - since > owner.seconds
            if owner is None or expired or self._is_succeeded(owner):
                if lease := self._write(generation):
                    return lease
                continue  # another process was faster
            if not self._wait and (self._is_alive(owner) or first not in (None, generation)):
                raise UserError(self._refusal(owner))
            if first is None:
                self._announce(owner)
            if generation != first:
                first, since = generation, self._clock()
            self._sleep(POLL_SECONDS)

    def _is_succeeded(self, owner: Owner) -> bool:
        dead = owner.process is not None and has_ended(owner.process)
        # A lease of this very process that nobody holds could not be given back.
        dead = dead or owner.process == this_process() and not is_held(owner.token)
        return dead or bool(self._group) and owner.group == self._group

    def _is_alive(self, owner: Owner) -> bool:
        """Return True if the owner is a living process of this machine."""
        return owner.process is not None and is_local(owner.process) and not has_ended(owner.process)

    def _write(self, generation: bytes) -> Lease[Owner] | None:
        process, now, claimed_at = this_process(), time.time(), self._clock()
        owner = Owner(
            holder=f"{process.host}:{process.pid}",
            process=process,
            token=uuid.uuid4().hex,
            seconds=self._seconds,
            time=now,
            since=now,
            group=self._group,
        )
        written = self._slot.write(owner, generation)
        return Lease(self._slot, owner, written, claimed_at, self._clock) if written else None

    def _announce(self, owner: Owner) -> None:
        end = "it ends" if self._wait else f"that process has been silent for {owner.seconds:.0f} s"
        log.warning("%s is in use by %s; waiting until %s", self._subject, _who(owner), end)

    def _refusal(self, owner: Owner) -> str:
        if self._is_alive(owner) and owner.process:
            end = f"end it (kill {owner.process.pid})"
        else:
            end = f"end it there (if it has died, this command takes over once {owner.seconds:.0f} s have passed)"
        return (
            f"{self._subject} is in use by {_who(owner)}; {end}, or {self._advice}; if that process does something "
            f"else by now, delete {printable(self._place)}"
        )


def _who(owner: Owner) -> str:
    host, _, number = printable(owner.holder).rpartition(":")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.since))
    return f"process {number} on {host} since {since}"


@contextlib.contextmanager
def owned(
    place: epath.PathLike, subject: str, advice: str, *, group: str = "", wait: bool = False
) -> Iterator[Lease[Owner] | None]:
    """Own what the lease in the file `place` is about while the context lasts (see `Claimant`).

    Yields:
      The lease, which is renewed in the background; None, after a warning, where the storage has no means to keep
      processes apart.

    Raises:
      UserError: a living process has it.
      OSError: the lease cannot be written.
    """
    try:
        lease = Claimant(epath.Path(place), subject, advice, group=group, wait=wait).claim()
    except OSError as error:
        if error.errno not in _NO_LOCKS and "unsupported URL scheme" not in str(error):
            raise
        log.warning("nothing keeps a second process out of %s: %s", subject, error)
        yield None
        return
    with lease:
        try:
            yield lease
        finally:
            _release(lease, subject)


def _release(lease: Lease[Owner], subject: str) -> None:
    if lease.lost:  # whoever noticed it has said so
        return
    try:
        lease.release()
    except LeaseLost as error:
        log.warning("%s", error)
    except OSError as error:  # what ended the context matters more, and the lease expires
        log.warning("cannot give back %s: %s", subject, error)


@contextlib.contextmanager
def owned_output(output: Path | epath.Path) -> Iterator[Lease[Owner] | None]:
    """Own a file or directory that is to be made, by a lease beside it (see `owned`)."""
    require_directory(output, "output")
    output.parent.mkdir(parents=True, exist_ok=True)
    place = output.parent / f".{_short(output.name)}.{FILE}"
    with owned(place, f"output={output}", "use another --output") as lease:
        yield lease


def _short(name: str) -> str:
    """Return the name of an output, or a hash of it where what is added to it would make a name too long."""
    return name if len(os.fsencode(name)) <= 200 else hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


@contextlib.contextmanager
def whole_directory(output: Path, key: str = "") -> Iterator[Path]:
    """Yield a directory beside `output` that is renamed to it at the end, or removed after a failure.

    This process owns `output` meanwhile. Directories that a killed process left behind are removed.

    Args:
      output: the directory to make.
      key: 16 hexadecimal digits that name work which can be resumed. What the same work left behind is yielded again,
        and it is removed after a mistake of the user alone. Empty: it begins anew.

    Raises:
      UserError: another process is making `output`.
      OSError: `output` is a link or holds something, or something cannot be written.
    """
    with owned_output(output) as lease:
        _require_place(output)
        prefix = f".{_short(output.name)}.partial-"
        partial = output.with_name(prefix + (key or uuid.uuid4().hex[:8]))
        for abandoned in _abandoned(output.parent, prefix) if lease else ():
            if abandoned != partial:
                if key:
                    log.warning("removing what another command left unfinished of %s", printable(output))
                shutil.rmtree(abandoned, ignore_errors=True)
        partial.mkdir(exist_ok=bool(key))
        try:
            yield partial
            if lease:
                lease.confirm()
            partial.replace(output)
        except BaseException as error:
            # Another process may go on with work that has a key once the lease is lost.
            is_mistake = isinstance(error, UserError) and not isinstance(error, StorageError)
            if not key or (is_mistake and lease and not lease.lost):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _require_place(output: Path) -> None:
    """Raise before the work what would fail after it: no directory can be renamed to `output`."""
    try:
        output.lstat()
    except FileNotFoundError:
        return
    if output.is_symlink():
        raise OSError(errno.EEXIST, "a link is there", str(output))
    if output.is_dir() and any(output.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(output))


def _abandoned(folder: Path, prefix: str) -> list[Path]:
    """Return the directories of earlier processes; of a pipe of that name, rmtree would wait for the writer."""
    return [
        path
        for path in folder.glob(glob.escape(prefix) + "*")
        if re.fullmatch("[0-9a-f]+", path.name.removeprefix(prefix)) and path.is_dir() and not path.is_symlink()
    ]
