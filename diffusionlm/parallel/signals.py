"""Handle the signals that ask a run to save and stop."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or a first Ctrl-C sets, so that a run can save before it ends.

    A second Ctrl-C raises `KeyboardInterrupt`. Contexts nest: a signal sets the events of all of them, and an inner
    context begins with its event set if that of an outer one is set, so that a sweep stops together with its current
    run. Outside the main thread, where Python allows no handlers, signals do not set the event.
    """
    handler = _StopHandler()
    if threading.current_thread() is not threading.main_thread():
        yield handler.event
        return
    handler.replaced = {number: signal.signal(number, handler) for number in SIGNALS}
    if any(outer.event.is_set() for outer in handler.replaced.values() if isinstance(outer, _StopHandler)):
        handler.event.set()
    try:
        yield handler.event
    finally:
        for number, outer in handler.replaced.items():
            signal.signal(number, outer)


class _StopHandler:
    """A signal handler that sets its event, and calls the handler that it replaced if that is one of its kind."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.replaced: dict[int, signal._HANDLER] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        first = not self.event.is_set()
        if not first and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.event.set()
        outer = self.replaced.get(number)
        if isinstance(outer, _StopHandler):
            outer(number, frame)
        elif first and sys.stderr is not None:
            with suppress(OSError, ValueError, AttributeError):  # a closed stderr must not keep the run from saving
                # Not `print`, which this handler may have interrupted.
                os.write(sys.stderr.fileno(), b"\nsaving after this step, then stopping; Ctrl-C again stops at once\n")
