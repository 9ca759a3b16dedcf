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
        handler.event.starting = False
        for number, outer in handler.replaced.items():
            signal.signal(number, outer)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise `KeyboardInterrupt`, so that what ends a process also removes its temporary files.

    Outside the main thread, where Python allows no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    replaced = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, replaced)


class _StopHandler:
    """A signal handler that sets its event, and calls the handler that it replaced if that is one of its kind."""

    def __init__(self) -> None:
        self.event = StopRequest()
        self.replaced: dict[int, signal._HANDLER] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        _heard(self.event)
        first = not self.event.is_set()
        if not first and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.event.set()
        outer = self.replaced.get(number)
        if isinstance(outer, _StopHandler):
            outer(number, frame)
            _heard(self.event)  # the innermost is the one under way
        elif first and sys.stderr is not None:
            with suppress(OSError, ValueError, AttributeError):  # a closed stderr must not keep the run from saving
                action = b"stopping" if self.event.starting else b"saving after this step, then stopping"
                # Not `print`, which this handler may have interrupted.
                os.write(sys.stderr.fileno(), b"\n" + action + b"; Ctrl-C again stops at once\n")


_handled = 0  # signals that the main thread has handled
_hearer: StopRequest | None = None  # what the last of them set


def _heard(request: StopRequest | None = None) -> None:
    global _handled, _hearer
    _handled, _hearer = _handled + 1, request


def never_deaf() -> None:
    """End this process at a signal that its main thread does not hear, from now on; for programs, not for notebooks.

    A signal that is not handled within `GRACE_SECONDS` ends the process. A run that may have steps to save is given
    until the next signal. One that is only starting has as long to come to its first step.
    """
    if callable(signal.getsignal(signal.SIGINT)):  # not ignored, as it is by background jobs of a shell
        signal.signal(signal.SIGINT, _interrupt)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # gets the number of each signal, whatever Python does
    threading.Thread(target=_listen, args=(reader,), name="signals", daemon=True).start()


def _interrupt(number: int, frame: FrameType | None) -> None:
    _heard()
    if _is_importing(frame):  # where libraries turn an exception into another one, or crash
        _end(number, "interrupted")
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


def _listen(reader: int) -> None:
    # Times would not do: this thread may get its turn long after the main thread has handled the signal.
    judged = 0  # of the signals handled, those that were counted when a signal was last judged
    given_time = False  # True once a run with steps to save was given until the next signal
    while received := os.read(reader, 64):
        if not (numbers := [number for number in received if number in SIGNALS]):
            continue
        number = numbers[-1]
        if given_time and _handled == judged:
            _end(number, "interrupted in work that cannot be stopped")
        time.sleep(GRACE_SECONDS)
        _drain(reader)  # Python handles several signals of a kind once, so they are judged together
        handler = signal.getsignal(number)
        request = handler.event if isinstance(handler, _StopHandler) else None
        if _handled != judged:  # by a run that may have ended since, and another may have begun
            request = _hearer
        if request and request.starting:
            _end(number, "stopped before the first step")
        given_time, judged, before = False, _handled, judged
        if judged != before:
            continue
        if request is None:
            _end(number, "interrupted")
        given_time = True
        _say("waiting for the devices, to save; the next signal stops at once, without the steps since the last save")


def _drain(reader: int) -> None:
    os.set_blocking(reader, False)
    with suppress(BlockingIOError):
        while os.read(reader, 64):
            pass
    os.set_blocking(reader, True)


def _end(number: int, reason: str) -> None:
    """End the process without unwinding its main thread, which does not answer."""
    lease = sys.modules.get("diffusionlm.ownership.lease")  # it takes long to import, and without it there are none
    if release_all := getattr(lease, "release_all", None):  # which is missing while it is being imported
        release_all(RELEASE_SECONDS)
    _say(reason)
    os._exit(128 + number)


def _say(text: str) -> None:
    with suppress(OSError):  # a closed stderr must not keep the process alive
        os.write(2, f"\ndiffusionlm: {text}\n".encode())
