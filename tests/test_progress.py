"""Progress: a live line in a terminal, and elsewhere a few plain lines with a true ETA."""

import io
import sys
from types import SimpleNamespace

import pytest

from diffusionlm import progress


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that stands still until it is moved."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.fixture
def stderr(monkeypatch):
    """Return a function that replaces stderr, by a terminal or not, and returns the stream."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def make(terminal):
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return make


def test_without_a_terminal_it_prints_an_occasional_line_with_the_remaining_time(stderr, clock):
    output = stderr(terminal=False)
    with progress.Progress("train demo", 110, completed=10) as bar:
        clock.seconds += 40  # the compilation, which the ETA does not count
        for completed in range(11, 31):
            clock.seconds += 4
            bar.update(completed, f"loss {completed}.0")
    # 4 seconds a step: the first line after more than 30, with nothing to go by yet, then after 8 steps, each time.
    assert output.getvalue().splitlines() == [
        "train demo  11/110  loss 11.0",
        "train demo  19/110  loss 19.0  ETA 364s",
        "train demo  27/110  loss 27.0  ETA 332s",
    ]


def test_without_a_terminal_the_end_is_printed(stderr, clock):
    output = stderr(terminal=False)
    with progress.Progress("train demo", 3) as bar:
        for completed in (1, 2, 3):
            clock.seconds += 1
            bar.update(completed, "loss 1.0")
        bar.note("evaluating batch 1")
    assert output.getvalue() == "train demo  3/3  loss 1.0  ETA 0s\n"


def test_a_long_line_is_not_broken(stderr, clock):
    output = stderr(terminal=False)
    with progress.Progress("t" * 150, 1) as bar:
        bar.update(1, "n" * 150)
    assert len(output.getvalue().splitlines()) == 1


def test_in_a_terminal_a_live_line_shows_count_and_note_and_goes_away(stderr):
    output = stderr(terminal=True)
    with progress.Progress("train", 5) as bar:
        bar.update(2, "loss 3.0")
        bar.note("evaluating")
    written = output.getvalue()
    assert "train" in written and "2/5" in written and "evaluating" in written
    assert "ETA" not in written  # the plain line's word
    assert written.endswith("\x1b[2K")  # the line is erased


def test_quiet_is_quiet(stderr, clock):
    for terminal in (False, True):
        output = stderr(terminal)
        with progress.Progress("train", 1, quiet=True) as bar:
            clock.seconds += 100
            bar.update(1, "loss 3.0")
        assert output.getvalue() == ""
