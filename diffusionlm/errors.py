"""The exception for mistakes that a user can fix, the names of files in errors, and suggestions for mistyped names."""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """A user's mistake, described in one line: what, the offending value, what is allowed, and the fix.

    `diffusionlm.cli.main` prints it to stderr and exits with code 2; from Python it is an ordinary `ValueError`.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the known names if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


@contextlib.contextmanager
def naming(file: str | os.PathLike) -> Iterator[None]:
    """Put the name of a file or stream into the `OSError` of a read or write in this block, which has none by itself.

    `diffusionlm.cli.main` prints every such error as one line; from Python it is the ordinary `OSError`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(file)
        raise
