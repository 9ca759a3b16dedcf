"""Paths that no file has, or at which no file can be read or written, by what is wrong with them."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from diffusionlm.untrusted import printable

# What no option takes for a path, reading or writing: made below an existing directory.
NOWHERE: dict[str, Callable[[Path], str]] = {
    "a NUL": lambda tmp: f"{tmp}/a\0b",
    "a lone surrogate": lambda tmp: f"{tmp}/\ud800",
    "a long name": lambda tmp: f"{tmp}/{'n' * 300}",
    "a long path": lambda tmp: f"{tmp}/{'dir/' * 2000}end",
    "an unknown scheme": lambda tmp: "foo://bucket/x",
    "an unreachable bucket": lambda tmp: "gs://bucket/x",
    "another bucket": lambda tmp: "s3://bucket/x",
    "below a file": lambda tmp: f"{tmp}/file/below",
    "a loop of links": lambda tmp: f"{tmp}/loop",
    "below a loop": lambda tmp: f"{tmp}/loop/below",
}
# What no option takes for something to read.
UNREADABLE = NOWHERE | {
    "a missing file": lambda tmp: f"{tmp}/missing",
    "nothing": lambda tmp: "",
    "an escape sequence and markup": lambda tmp: f"{tmp}/\x1b[2J[/red]",
    "a dangling link": lambda tmp: f"{tmp}/dangling",
    "a pipe": lambda tmp: f"{tmp}/pipe",
    "a device": lambda tmp: "/dev/zero",
    "an empty device": lambda tmp: "/dev/null",
    "an empty directory": lambda tmp: f"{tmp}/empty",
}


def make(directory: Path) -> Path:
    """Make what the paths refer to in a directory, and return it."""
    (directory / "file").write_text("some text\n" * 9)
    (directory / "loop").symlink_to("loop")
    (directory / "dangling").symlink_to("gone")
    os.mkfifo(directory / "pipe")
    (directory / "empty").mkdir()
    return directory


class TookTooLong(BaseException):
    """Ends a block that nothing else should catch."""


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise `TookTooLong` in this thread, the main one, if the block takes longer."""

    def stop(number: int, frame: object) -> None:
        raise TookTooLong(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def assert_shown_as_it_is(text: str) -> None:
    """Check that a terminal obeys nothing in a text."""
    assert text == printable(text, "\n\t")
