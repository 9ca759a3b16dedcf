"""The fence around a run directory: nothing is written there unless this run owns it."""

import contextlib
import os
from collections.abc import Iterator
from typing import Protocol

import jax
from etils import epath

from diffusionlm.errors import UserError
from diffusionlm.ownership import claims
from diffusionlm.ownership.lease import LeaseLost
from diffusionlm.parallel import processes
from diffusionlm.storage import in_bucket, require_directory


class Fence(Protocol):
    """Stands between a run and its directory, which other processes may take over."""

    def check(self) -> None:
        """Raise `OSError` if the run is known to be another process's by now; called before every line is written."""

    def confirm(self) -> None:
        """Ask, and raise `OSError` if the run is another process's; called before every checkpoint and DONE.json."""


class Fences:
    """Several fences, of which the first is the one to say who has the run."""

    def __init__(self, *fences: Fence):
        self._fences = fences

    def check(self) -> None:
        """Check all of them."""
        for fence in self._fences:
            try:
                fence.check()
            except LeaseLost:
                self.confirm()  # an earlier one may not know yet
                raise

    def confirm(self) -> None:
        """Confirm all of them."""
        for fence in self._fences:
            fence.confirm()


@contextlib.contextmanager
def owned_run(workdir: epath.Path, fence: Fence | None) -> Iterator[Fence]:
    """Own a run directory while the context lasts; several processes of a run are one owner.

    Every process calls this; the first one holds the lease, and the fence is its own alone.

    Args:
      workdir: the run directory.
      fence: what else must hold; the processes that it keeps apart, those of a sweep, succeed each other at once.

    Raises:
      UserError: another run has the directory, or it cannot be written; on all processes if on one.
    """
    with processes.on_first_process(lambda: _lease(workdir, "sweep" if fence else "")) as lease:
        fences: list[Fence] = [each for each in (fence, lease) if each is not None]
        yield Fences(*(fences if jax.process_index() == 0 else ()))


@contextlib.contextmanager
def _lease(workdir: epath.Path, group: str) -> Iterator[Fence | None]:
    with contextlib.ExitStack() as stack:
        require_directory(workdir, "workdir")
        try:
            if not in_bucket(workdir) and not _exists(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                stack.callback(_remove_empty, workdir)
            place = workdir / claims.FILE
            owned = claims.owned(place, f"the run directory {workdir}", "use another --workdir", group=group)
            lease = stack.enter_context(owned)
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory {workdir}: {error.strerror or error}; choose another --workdir"
            ) from error
        yield lease


def _exists(workdir: epath.Path) -> bool:
    """Return True if there is such a path; raise `OSError` if there cannot be one, as for a name that is too long."""
    try:
        os.stat(workdir)
    except FileNotFoundError:
        return False
    return True


def _remove_empty(workdir: epath.Path) -> None:
    """Remove the directory of a run that was refused before anything was written."""
    with contextlib.suppress(OSError):
        os.rmdir(workdir)
