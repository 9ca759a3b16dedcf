"""Sandboxes that work here, and pieces of the programs that try them."""

import contextlib
import os
import time
from pathlib import Path

import pytest

from diffusionlm.evaluation.sandbox import backends, run
from diffusionlm.evaluation.sandbox.backends import Limits
from diffusionlm.evaluation.sandbox.run import Sandbox

PATIENT = Limits(seconds=60, clock=300)
SHORT, HASTY = Limits(seconds=1, clock=300), Limits(seconds=60, clock=3)
CTYPES = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


def attempt(code, *errors):
    """A program that says "escaped" if `code` gets to its end, and "held" for one of these errors."""
    body = "".join(f"    {line}\n" for line in code.splitlines())
    return (
        f"try:\n{body}    print('escaped')\nexcept ({', '.join(errors or ['OSError'])}) as e:\n    print('held', e)\n"
    )


def call(code):
    """A program that says "escaped" if an expression with `libc` is not negative, and "held" otherwise."""
    return CTYPES + f"print('escaped' if ({code}) >= 0 else 'held')"


FORK_BOMB = attempt("import os\nwhile True:\n    os.fork()")
MEMORY_BOMB = attempt("x = []\nwhile True:\n    x.append(bytearray(1 << 26))", "MemoryError")
HUGE_FILE = attempt("f = open('f', 'wb')\nwhile True:\n    f.write(bytes(1 << 20))")


def usable_python():
    """An interpreter that the sandboxes can show: bubblewrap runs as nobody where the tests run as root."""
    own = backends.layout().python
    if os.geteuid() == 0 and os.path.exists("/usr/bin/python3") and own.startswith("/root/"):
        return "/usr/bin/python3"
    return own


def open_sandbox(name, limits=PATIENT):
    place = Sandbox(name, backends.layout(usable_python() if name == "bubblewrap" else None), limits)
    if (reason := run.why_not(Sandbox(name, place.layout))) is not None:
        pytest.skip(f"{name} does not work here: {reason}")
    return place


def running(word):
    """The processes of the machine with a word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


DAEMON = """\
import os, sys
if not os.fork():
    os.setsid()
    if not os.fork():
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(100)", WORD])
"""


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
