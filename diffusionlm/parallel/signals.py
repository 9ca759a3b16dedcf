"""Handle the signals that ask a run to save and stop, and those that nothing else would hear.

Python handles a signal when its main thread returns from what it does. Compiling, initialising devices and waiting for
them may take minutes, and what hangs never returns.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

GRACE_SECONDS = 5.0  # for the main thread to hear a signal; then the process ends without it
RELEASE_SECONDS = 2.0  # for it to give back its leases
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest(threading.Event):
    """An event that is set when a run is to save and stop."""

    starting = False  # True while the run has nothing to save: a signal may end the process at once


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
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
        self.event = StopRequest()
        self.replaced: dict[int, signal._HANDLER] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        _heard()
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


_heard_at = -1.0  # when the main thread last handled a signal


def _heard() -> None:
    global _heard_at
    _heard_at = time.monotonic()


def never_deaf() -> None:
    """End this process at a signal that its main thread does not hear, from now on; for programs, not for notebooks.

    A signal that is not handled within `GRACE_SECONDS` ends the process. A run that may have steps to save is given
    until the next signal. One that is only starting has as long to come to its first step.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # gets the number of each signal, whatever Python does
    threading.Thread(target=_listen, args=(reader,), name="signals", daemon=True).start()


def _interrupt(number: int, frame: FrameType | None) -> None:
    _heard()
    raise KeyboardInterrupt


def _listen(reader: int) -> None:
    unheard = -1.0  # when a run with steps to save was last given time
    while numbers := os.read(reader, 1):
        if numbers[0] not in SIGNALS:
            continue
        arrived = time.monotonic()
        if unheard > _heard_at:
            _end(numbers[0], "interrupted in work that cannot be stopped")
        time.sleep(GRACE_SECONDS)
        handler = signal.getsignal(numbers[0])
        request = handler.event if isinstance(handler, _StopHandler) else None
        if request and request.starting:
            _end(numbers[0], "stopped before the first step")
        if _heard_at >= arrived:
            continue
        if request is None:
            _end(numbers[0], "interrupted")
        unheard = arrived
        _say("waiting for the devices, to save; the next signal stops at once, without the steps since the last save")


def _end(number: int, reason: str) -> None:
    """End the process without unwinding its main thread, which does not answer."""
    if lease := sys.modules.get("diffusionlm.lease"):  # which takes long to import, and without which there are none
        lease.release_all(RELEASE_SECONDS)
    _say(reason)
    os._exit(128 + number)


def _say(text: str) -> None:
    with suppress(OSError):  # a closed stderr must not keep the process alive
        os.write(2, f"\ndiffusionlm: {text}\n".encode())
