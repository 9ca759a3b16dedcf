"""What the measurements share: turns, spreads, and what a number depends on besides the code."""

import contextlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from diffusionlm.errors import UserError
from diffusionlm.options import parse


def in_turns(contenders: Mapping[Any, Callable[[], float]], repetitions: int) -> dict[Any, list[float]]:
    """Seconds of each contender in each turn; they go round, each turn beginning with another one.

    Args:
      contenders: each runs once and returns its seconds; what it returns at first, with compilation, is dropped.
      repetitions: turns.
    """
    for run in contenders.values():
        run()
    names = list(contenders)
    measured = {name: [0.0] * repetitions for name in names}
    for turn in range(repetitions):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            measured[name][turn] = contenders[name]()
    return measured


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the least and the most in parentheses."""
    middle, least, most = map(form.format, (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


def read_texts(path: str | Path, option: str) -> list[str]:
    """The texts of a .jsonl file; `option` is how the command line calls it."""
    if not Path(path).is_file():
        raise UserError(f"{option}={str(path)!r} is no file; name a .jsonl file with one {{'text': ...}} a line")
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines() if line.strip()]


def environment() -> dict[str, Any]:
    """Return the versions and the processor that a measurement depends on."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": [device.device_kind for device in jax.devices()],
        "processor": processor,
        "cores": os.cpu_count(),
    }


def run(function: Callable[..., int], argv: Sequence[str], name: str) -> int:
    """Runs a measurement with the words of a command line; returns its exit code, 2 for a user's mistake."""
    try:
        return parse(function, argv, name)()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def console() -> Console:
    """The terminal; wide enough for the tables where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=160)
