"""Progress of long work: a live line with ETA in a terminal, an occasional plain line elsewhere."""

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from diffusionlm.console import Console


class Progress:
    """A context manager around one counted task; `update` and `note` are cheap between refreshes."""

    QUIET_SECONDS = 30.0  # between plain lines where there is no terminal

    def __init__(self, title: str, total: int, completed: int = 0, *, quiet: bool = False):
        self._title, self._total = title, total
        self._console = Console(file=sys.stderr, quiet=quiet)
        self._live = self._console.is_terminal or self._console.is_jupyter
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, completed=completed, note="")
        self._printed = time.monotonic()
        self._first: tuple[int, float] | None = None  # count and time at the first update, after compilation

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, completed: int, note: str) -> None:
        """Move to `completed` of the total, with a short note such as the loss."""
        self._bar.update(self._task, completed=completed, note=note)
        now = time.monotonic()
        self._first = self._first or (completed, now)
        if not self._live and (now - self._printed > self.QUIET_SECONDS or completed == self._total):
            self._printed = now
            counted, seconds = completed - self._first[0], now - self._first[1]
            eta = f"  ETA {(self._total - completed) * seconds / counted:.0f}s" if counted > 0 else ""
            self._console.print(
                f"{self._title}  {completed}/{self._total}  {note}{eta}", soft_wrap=True, highlight=False
            )

    def say(self, line: str) -> None:
        """Print a line that stays, above the live one."""
        self._console.print(line, soft_wrap=True, highlight=False)

    def note(self, note: str) -> None:
        """Replace the note, for work between two counts."""
        self._bar.update(self._task, note=note)
