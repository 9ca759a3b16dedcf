"""TODO: one sentence."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or a first Ctrl-C sets, so that a run saves before it ends; a second Ctrl-C interrupts.

    One inside of another sets both, and begins as the other stands: a sweep stops together with the run that it is at.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield stopped
        return

    def stop(signum: int, frame: Any) -> None:
        if stopped.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        first = not stopped.is_set()
        stopped.set()
        if hasattr(before[signum], "event"):
            before[signum](signum, frame)
        elif first and sys.stderr is not None:
            with suppress(OSError, ValueError, AttributeError):  # nobody reads it, and the run saves all the same
                # Not print, which this may have interrupted.
                os.write(sys.stderr.fileno(), b"\nstopping after this step, once it is saved; Ctrl-C again: at once\n")

    stop.event = stopped
    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    if any(handler.event.is_set() for handler in before.values() if hasattr(handler, "event")):
        stopped.set()
    try:
        yield stopped
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
