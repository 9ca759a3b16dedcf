"""A profiler trace of some steps of a run."""

from contextlib import ExitStack

import jax
from etils import epath

from diffusionlm.tree_types import PyTree


class Profiler:
    """A context manager that traces `steps` steps from step `start` on into `directory`; start -1: none."""

    def __init__(self, directory: epath.Path, start: int, steps: int):
        self._directory, self._start, self._stop = directory, start, start + steps
        self._tracing = ExitStack()

    def before(self, step: int, state: PyTree) -> None:
        """Start or stop the trace if it is time to, before `step` is dispatched on `state`."""
        if step in (self._start, self._stop):
            jax.block_until_ready(state)  # or steps dispatched before would be in the trace, and its last ones not
        if step == self._start:
            self._tracing.close()  # a step that is taken again, after a roll-back
            self._tracing.enter_context(jax.profiler.trace(str(self._directory)))
        elif step == self._stop:
            self.close()  # nothing to close in a run that resumed inside the window

    def close(self) -> None:
        """Write the trace, if one is being made."""
        self._tracing.close()

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
