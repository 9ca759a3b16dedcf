"""A small file that shows that a run is alive, and what it is doing."""

import json
import logging
from collections.abc import Callable

from etils import epath

from diffusionlm import schema
from diffusionlm.storage import write_atomically

log = logging.getLogger(__name__)

FILE = "heartbeat"
BEAT_SECONDS = 10.0  # between two writes, unless the work changes


class Beat(schema.Record, frozen=True):
    """The content of the file."""

    step: schema.Count
    time: float = 0.0
    doing: str = ""


def read(path: epath.PathLike) -> Beat:
    """Return the last beat of a run.

    Raises:
      UserError: the file is damaged.
    """
    return schema.read_json(path, Beat, 1 << 16)


class Heartbeat:
    """A file (see `Beat`) that is replaced every `BEAT_SECONDS`."""

    def __init__(
        self,
        path: epath.Path,
        clock: Callable[[], float],
        now: Callable[[], float],
        check: Callable[[], None] = lambda: None,
    ):
        """Prepare to write `path`; `clock` measures intervals, `now` is the time of day, `check` may refuse a write."""
        self._path, self._clock, self._now, self._check = path, clock, now, check
        self._last, self._doing = -BEAT_SECONDS, ""

    def beat(self, step: int, doing: str) -> None:
        """Write the file if a beat is due, or if work other than training begins."""
        if self._clock() - self._last < BEAT_SECONDS and doing in (self._doing, "train"):
            return
        self._last, self._doing = self._clock(), doing
        try:
            self._check()
            write_atomically(self._path, json.dumps({"step": step, "time": self._now(), "doing": doing}) + "\n")
        except OSError as error:  # a bucket that is briefly unreachable is not a reason to stop
            log.warning("cannot write %s: %s", self._path, error)
