"""Helpers of all verbs: the program's name, error and JSON output, short counts."""

import errno
import inspect
import sys
from collections.abc import Callable
from typing import Any

from diffusionlm.storage import dump_numbers

PROGRAM = "diffusionlm"
# Refusals of the file system that a user can fix: no space, no permission, a file where a directory should be.
FILE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)


def fail(message: str, code: int) -> int:
    """Print an error as one line on stderr, and return the exit code."""
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def print_json(values: Any, indent: int | None = 2) -> None:
    """Print a value as JSON on stdout, with null for numbers that are not finite."""
    print(dump_numbers(values, indent=indent))


def summary(function: Callable) -> str:
    """Return the first line of a function's docstring."""
    return (inspect.getdoc(function) or "").split("\n")[0]


def short_count(count: float) -> str:
    """Return a count in four characters or so: 950, 1.1M, 15G."""
    for unit in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"
