"""The exceptions for mistakes of users and for lost processes, the names of files in errors, and suggestions."""

import contextlib
import difflib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """A user's mistake, described in one line: what, the offending value, what is allowed, and the fix.

    `diffusionlm.cli.main` prints it to stderr and exits with code 2; from Python it is an ordinary `ValueError`.
    """

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows instead of the frames of this package, which say nothing to a user."""
        return [f"UserError: {self}"]


class StorageError(UserError):
    """A failure of storage or of machines, which may be over when the same command is given again."""


class LostProcess(RuntimeError):
    """Another process of this run died, or hangs: the reason is in its log, not here.

    `diffusionlm.cli.main` prints it in one line, and exits with code 1.
    """

    def __init__(self, attempt: str, error: BaseException):
        """Say what this process attempted, such as "complete a checkpoint", and what it met."""
        reason = " ".join(str(error).split())[:200]
        super().__init__(
            f"cannot {attempt}: another process of this run died or hangs ({reason}); see the logs of the others for "
            "the reason, and restart all processes to resume from the newest checkpoint"
        )


def shows_lost_process(error: BaseException | None) -> bool:
    """Return True if an error, or one that caused it, is what the other processes of a run see when one dies.

    Ask only in a run of several processes.
    """
    if error is None:
        return False
    # Orbax raises it where it waited for the others; that of the operating system has a number.
    waited = isinstance(error, TimeoutError) and error.errno is None
    # JAX's collectives and its coordination service raise nothing more special.
    signs = "[Bb]arrier|heartbeat|coordination|Gloo|NCCL|UNAVAILABLE|preempted|Connection (reset|closed|refused)"
    lost = isinstance(error, RuntimeError) and re.search(signs, str(error))
    return waited or bool(lost) or shows_lost_process(error.__cause__)


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


def missing_package(user: str, package: str, extra: str) -> UserError:
    """Return an error that says which package a feature lacks, and how to install it with one of our extras."""
    return UserError(f"{user} needs the package {package}; in a checkout of diffusionlm, pip install -e '.[{extra}]'")


def require_package(module: str, user: str, package: str, extra: str) -> None:
    """Raise `UserError` unless a module of an optional package is there, without importing it; before work is done."""
    if importlib.util.find_spec(module) is None:
        raise missing_package(user, package, extra)
