"""TODO: one sentence."""

from contextlib import ExitStack
from typing import Any

import jax
from etils import epath


class Profiler:
    """A profiler trace, in `directory`, of `steps` steps from step `start` on; -1: none."""

    def __init__(self, directory: epath.Path, start: int, steps: int):
        self._directory, self._start, self._stop = directory, start, start + steps
        self._tracing = ExitStack()

    def before(self, step: int, state: Any) -> None:
        """Called before `step` is dispatched, with what the last one gave."""
        if step in (self._start, self._stop):
            jax.block_until_ready(state)  # or steps dispatched before would be in the trace, and its last ones not
        if step == self._start:
            self._tracing.close()  # a step that is taken again, after a roll-back
            self._tracing.enter_context(jax.profiler.trace(str(self._directory)))
        elif step == self._stop:
            self.close()  # nothing to close in a run that resumed inside the window

    def close(self) -> None:
        self._tracing.close()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
