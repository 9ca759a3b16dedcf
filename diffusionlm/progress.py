"""Progress of long work: a live line with ETA in a terminal or a notebook, an occasional plain line elsewhere.

A notebook may show a picture too, such as the curve of a loss.
"""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import rich.progress
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

from diffusionlm.console import Console
from diffusionlm.notebook import Output


class Bars(rich.progress.Progress):
    """Bars in a terminal, where they go away at the end, and in a notebook, where they stay unless told otherwise.

    Those of rich need ipywidgets in a notebook.
    """

    REFRESH_SECONDS = 0.5  # between updates in a notebook

    def __init__(self, *columns: str | ProgressColumn, console: Console, stay: bool = True):
        self._page, self._stay = console, stay
        self._output = Output() if console.is_jupyter and not console.quiet else None
        self._drawn = -float("inf")
        super().__init__(*columns, console=console, disable=not console.is_terminal, transient=True)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Move a bar by some steps."""
        super().advance(task_id, advance)
        self._draw()

    def update(self, task_id: TaskID, **values: Any) -> None:
        """Change a bar; the values are those of `rich.progress.Progress.update`."""
        super().update(task_id, **values)
        self._draw()

    def refresh(self) -> None:
        """Show the bars as they are."""
        super().refresh()
        self._draw()

    def stop(self) -> None:
        """End the display."""
        super().stop()
        if not self._stay and self._output:
            self._output.show_html("", "")
        else:
            self._draw(always=True)

    def _draw(self, always: bool = False) -> None:
        if (
            self._output is None
            or not self.tasks
            or not (always or time.monotonic() - self._drawn > self.REFRESH_SECONDS)
        ):
            return
        self._drawn = time.monotonic()
        text = ", ".join(f"{task.description} {task.completed:g}/{task.total or 0:g}" for task in self.tasks)
        self._output.show_html(self._page.to_html(self.get_renderable()), text)


class Progress:
    """A context manager around one counted task; `update` and `note` are cheap between refreshes.

    Args:
      title: what is done.
      total: the count at the end.
      completed: the count at the beginning.
      quiet: show nothing.
      picture: draws a PNG for notebooks, such as the curve of the note; it raises `ImportError` where it cannot, and a
        notebook shows plain lines instead.
      stay: leave the bar in a notebook at the end.
    """

    QUIET_SECONDS = 30.0  # between plain lines where there is no terminal
    PICTURE_SECONDS = 2.0  # between pictures
    PICTURE_SHARE = 0.05  # of the time, at most, is spent on pictures

    def __init__(
        self,
        title: str,
        total: int,
        completed: int = 0,
        *,
        quiet: bool = False,
        picture: Callable[[], bytes] | None = None,
        stay: bool = True,
    ):
        self._title, self._total = title, total
        self._console = Console(file=sys.stderr, quiet=quiet)
        self._live = self._console.is_terminal or self._console.is_jupyter
        self._picture = picture if self._console.is_jupyter and not quiet else None
        self._canvas, self._next_picture = Output(), 0.0
        self._bar = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=self._console,
            stay=stay,
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
        self._draw()

    def update(self, completed: int, note: str) -> None:
        """Move to `completed` of the total, with a short note such as the loss."""
        self._bar.update(self._task, completed=completed, note=note)
        now = time.monotonic()
        if now >= self._next_picture:
            self._draw()
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

    def _draw(self) -> None:
        """Show the picture, if there is one."""
        if self._picture is None:
            return
        began = time.monotonic()
        try:
            self._canvas.show_png(self._picture(), self._title)
        except Exception:  # whatever a front end or a font cache lacks, a picture is no reason to end the work
            self._picture, self._live = None, False
        now = time.monotonic()
        self._next_picture = now + max(self.PICTURE_SECONDS, (now - began) / self.PICTURE_SHARE)
