"""The exception for mistakes that a user can fix, and suggestions for mistyped names."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake, described in one line: what, the offending value, what is allowed, and the fix.

    `diffusionlm.cli.main` prints it to stderr and exits with code 2; from Python it is an ordinary `ValueError`.
    """


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the known names if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
