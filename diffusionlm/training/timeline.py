"""The account of a run's time (`timeline.jsonl`), and the goodput that follows from it.

timeline.jsonl only ever grows: it is the history of a run, including work that a kill or a roll-back undid. Each
line is an object with "event", "time" (seconds since 1970) and "step":

    start        a process began, and continues from this step
    spent        "seconds": {kind: seconds since the line before}
    skip         a batch was left out: "batch", "loss", "grad_norm"
    rollback     the run returned to this step, for what "batch" gave: "loss", "grad_norm", "lr_factor", "from_step"
    stop, done   the process ended of its own accord
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, Literal, get_args

import msgspec
from etils import epath

from diffusionlm import schema
from diffusionlm.storage import JsonLines, read_json_lines
from diffusionlm.training import heartbeat

log = logging.getLogger(__name__)

FILE = "timeline.jsonl"
Kind = Literal["start", "restore", "compile", "data", "train", "evaluate", "save", "lost", "between"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPENT_SECONDS = 60.0  # between two lines "spent": what a killed process leaves uncounted, at most
CLOSE_SECONDS = 5.0  # for which the end of a run waits for work that may hang


class Event(msgspec.Struct):
    """The fields of a line that are read again."""

    event: str
    step: schema.Count
    time: float
    seconds: dict[Kind, schema.NonNegative] | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.event == "spent" and self.seconds is msgspec.UNSET:
            raise ValueError('a line "spent" lacks `seconds`')


class Total:
    """Adds up the lines of a timeline: `seconds` of the run by kind.

    "train" is the time of steps: the only productive kind. Steps that were undone turn it to "lost". Between two
    processes no devices are held, which is "between".
    """

    def __init__(self, lines: Iterable[dict[str, Any]] = ()):
        self.seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._steps: list[tuple[int, int, float]] = []  # (from, to, seconds) of "train"
        self._step = 0
        self._time: float | None = None
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Add one line."""
        event, step = line["event"], line["step"]
        if event == "start" and self._time is not None:
            self.seconds["between"] += max(line["time"] - self._time, 0.0)
        if event in ("start", "rollback"):
            self._return_to(step)
        if event == "spent":
            for kind, spent in line["seconds"].items():
                self.seconds[kind] += spent
            self._steps.append((self._step, step, line["seconds"].get("train", 0.0)))
        self._step, self._time = step, line["time"]

    def _return_to(self, step: int) -> None:
        kept = []
        for first, last, spent in self._steps:
            share = 1.0 if last <= step else max(step - first, 0) / (last - first or 1)
            self.seconds["train"] -= spent * (1 - share)
            self.seconds["lost"] += spent * (1 - share)
            kept += [(first, min(last, step), spent * share)] if share else []
        self._steps = kept


class Timeline:
    """Measures the time of this process by kind, and adds it to the total of the run.

    Time belongs to the innermost `measure` around it, and without one to "start" until `open`, then to "train".
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time):
        self._clock, self._now = clock, now
        self._kinds = ["start"]
        self._spent: dict[str, float] = {}
        self._mark, self._began = clock(), now()
        self._written = self._mark
        self._total = Total()
        self._lines: JsonLines | None = None
        self._heartbeat: heartbeat.Heartbeat | None = None
        self._watch = Watch(clock)
        self._step = 0

    def open(self, workdir: epath.Path, step: int, *, write: bool, check: Callable[[], None] = lambda: None) -> None:
        """Begin to take steps, after the restored `step`.

        Args:
          workdir: the run directory.
          step: the restored step.
          write: True for the one process of a run that writes.
          check: called before each write, and may raise.
        """
        self._step = step
        if write:
            self._lines = JsonLines(workdir / FILE, check=check, line_type=Event)
            self._heartbeat = heartbeat.Heartbeat(workdir / heartbeat.FILE, self._clock, self._now, check)
            self._total = Total(self._lines.kept)
        self._write({"event": "start", "time": self._began, "step": step})
        self._charge()
        self._kinds = ["train"]
        self.flush()

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Count the time inside as `kind`."""
        self._charge()
        self._kinds.append(kind)
        if self._heartbeat:
            self._heartbeat.beat(self._step, kind)
        try:
            yield
        finally:
            self._charge()
            self._kinds.pop()

    def dispatched(self, wait: Callable[[], Any]) -> None:
        """Note that the devices have work; `wait`, called on another thread, returns when it is done."""
        self._watch.follow(wait)

    @property
    def dry_since(self) -> float | None:
        """The clock when the devices ran out of work; None while they have some."""
        return self._watch.ended

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the part of the time inside, a wait for data, for which the devices had no work as "data"."""
        self._charge()
        yield
        if (dry := self.dry_since) is not None:
            self._charge(until=max(dry, self._mark))
            self._charge("data")

    def reach(self, step: int) -> None:
        """Note that the run is at `step`, and beat the heart."""
        self._step = step
        if self._heartbeat:
            self._heartbeat.beat(step, self._kinds[-1])
        if self._clock() - self._written >= SPENT_SECONDS:
            self.flush()

    def note(self, event: str, step: int, **values: Any) -> None:
        """Write a line about an event at `step`."""
        self.flush()
        self._step = step
        self._write({"event": event, "time": self._now(), "step": step, **values})

    def flush(self) -> None:
        """Write the seconds spent since the last time."""
        self._charge()
        spent, self._spent, self._written = self._spent, {}, self._clock()
        self._write({"event": "spent", "time": self._now(), "step": self._step, "seconds": spent})
        if self._lines:
            self._lines.flush()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the run so far, by kind."""
        self._charge()
        return {kind: spent + self._spent.get(kind, 0.0) for kind, spent in self._total.seconds.items()}

    @property
    def held(self) -> float:
        """Seconds for which processes of the run have held the devices."""
        return sum(spent for kind, spent in self.seconds.items() if kind != "between")

    @property
    def goodput(self) -> float:
        """The productive share of `held`: steps that still count, without their waits for data."""
        return self.seconds["train"] / max(self.held, 1e-9)

    @property
    def stepping(self) -> float:
        """Seconds of steps, including waits for data and steps that were undone."""
        return sum(self.seconds[kind] for kind in ("train", "data", "lost"))

    def _charge(self, kind: str | None = None, until: float | None = None) -> None:
        """Count the time since the last call as `kind`, by default that of the innermost `measure`."""
        now, kind = self._clock() if until is None else until, kind or self._kinds[-1]
        self._spent[kind] = self._spent.get(kind, 0.0) + now - self._mark
        self._mark = now

    def _write(self, line: dict[str, Any]) -> None:
        self._total.add(line)
        if self._lines:
            self._lines.write(line)

    def __enter__(self) -> "Timeline":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._watch.close()
        try:
            self.flush()
        except OSError as error:
            if failure is None:
                raise
            log.warning("cannot write %s: %s", FILE, error)  # what ended the run is raised instead


class Watch:
    """Notes when work ends that is done elsewhere: a thread waits for it, and swallows its exceptions."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        self._ended: Future | None = None  # the end of the newest work
        self._thread: threading.Thread | None = None

    def follow(self, wait: Callable[[], Any]) -> None:
        """Watch the work that `wait` waits for instead of what came before."""
        if self._thread is None:  # a daemon: work that hangs must not keep the process alive
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()
        self._ended = Future()
        self._work.put((wait, self._ended))

    @property
    def ended(self) -> float | None:
        """The clock at the end of the newest work, minus infinity if there was none; None while it lasts."""
        if self._ended is None:
            return -math.inf
        return self._ended.result() if self._ended.done() else None

    def close(self) -> None:
        """End the thread, waiting `CLOSE_SECONDS` at most for work that may hang."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while work := self._work.get():
            wait, ended = work
            with suppress(Exception):  # the loop meets it too
                wait()
            ended.set_result(self._clock())
            del work, wait  # with the arrays that they hold


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Return the lines of WORKDIR/timeline.jsonl."""
    return read_json_lines(epath.Path(workdir) / FILE, Event)
