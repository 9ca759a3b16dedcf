"""The `diffusionlm` command, which is also `python -m diffusionlm`; all it imports at first takes a millisecond."""

import os
import signal
import sys
from types import FrameType

_INTERRUPTED = 128 + signal.SIGINT


def entry_point() -> None:
    """Run the command. A Ctrl-C before its work begins, or after it has ended, ends the process in one line."""
    _leave_when_interrupted()
    from diffusionlm.cli import main  # takes most of a second

    try:
        main.entry_point()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    finally:
        _leave_when_interrupted()  # what runs at the end of the interpreter would show a traceback


def _leave_when_interrupted() -> None:
    if callable(signal.getsignal(signal.SIGINT)):  # not ignored, as it is by background jobs of a shell
        signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    """Say so and end the process; an exception would surface in the middle of some import."""
    try:
        os.write(2, b"\ndiffusionlm: interrupted\n")
    except OSError:  # there is nowhere to say it
        pass
    os._exit(_INTERRUPTED)


if __name__ == "__main__":
    entry_point()
