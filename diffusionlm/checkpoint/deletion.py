"""Delete checkpoints so that a kill at any moment leaves nothing that looks like a checkpoint.

On a disk a directory is renamed first, which is atomic. In a bucket, where it is not, an object in it says so first.
"""

import concurrent.futures
import logging
import re
import uuid
from collections.abc import Sequence

import jax
from etils import epath

from diffusionlm.storage import in_bucket

log = logging.getLogger(__name__)

_MARKER = "deleted.txt"
_RENAMED = re.compile(r"\d+\.deleted-[0-9a-f]{8}")


class Deleter:
    """Deletes the checkpoints of a run that are to be kept no longer, in the background, on the first process.

    Args:
      directory: of the checkpoints.
      keep: how many of the newest stay.
      keep_every: multiples of it stay too; 0: no others.
    """

    def __init__(self, directory: epath.Path, keep: int, keep_every: int):
        self._directory, self._keep, self._keep_every = directory, keep, keep_every
        self._running: concurrent.futures.Future[None] | None = None

    def start(self, steps: Sequence[int]) -> list[int]:
        """Start to delete some of `steps`, which are on disk, after those before; return the steps that stay."""
        self.finish()
        dropped = [step for step in sorted(steps)[: -self._keep] if not self._keep_every or step % self._keep_every]
        if dropped and jax.process_index() == 0:
            pool = concurrent.futures.ThreadPoolExecutor(1, "delete-checkpoints")
            self._running = pool.submit(self._delete, dropped)
            pool.shutdown(wait=False)
        return [step for step in steps if step not in dropped]

    def finish(self) -> None:
        """Wait until they are deleted."""
        running, self._running = self._running, None
        if running:
            running.result()

    def _delete(self, steps: Sequence[int]) -> None:
        for step in steps:
            try:
                delete(self._directory / str(step))
            except OSError as error:  # it costs space, and a run should not end for it, least of all on one process
                log.warning("cannot delete the checkpoint %s, which stays: %s", self._directory / str(step), error)


def delete(step: epath.Path) -> None:
    """Delete the directory of a checkpoint.

    Raises:
      OSError: it cannot be deleted.
    """
    if in_bucket(step):
        (step / _MARKER).write_text("this checkpoint is being deleted\n")
    else:
        step = step.rename(step.parent / f"{step.name}.deleted-{uuid.uuid4().hex[:8]}")
    _remove(step)


def remove_leftovers(steps: epath.Path) -> list[str]:
    """Finish deletions in a directory of checkpoints that a kill cut short; return the names of their steps.

    Raises:
      OSError: they cannot be deleted.
    """
    if not steps.is_dir():
        return []
    leftovers = [path for path in steps.iterdir() if path.is_dir() and _is_leftover(path)]
    for path in leftovers:
        _remove(path)
    return sorted((path.name.split(".")[0] for path in leftovers), key=int)


def _is_leftover(path: epath.Path) -> bool:
    if in_bucket(path):
        return path.name.isdigit() and (path / _MARKER).exists()
    return bool(_RENAMED.fullmatch(path.name))


def _remove(directory: epath.Path) -> None:
    for child in directory.iterdir():
        if child.name != _MARKER:  # it goes last
            child.rmtree() if child.is_dir() else child.unlink()
    directory.rmtree()
