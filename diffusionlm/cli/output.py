"""Helpers of all verbs: the program's name, error and JSON output, short counts."""

import contextlib
import difflib
import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffusionlm.console import Console, write
from diffusionlm.errors import UserError, naming
from diffusionlm.registry import Registry
from diffusionlm.storage import dump_numbers

if TYPE_CHECKING:
    from diffusionlm.pretrained.model import LoadedModel

PROGRAM = "diffusionlm"
LONGEST = 2000  # characters of an error that are shown: a value in it may be a whole text


def fail(message: str, code: int) -> int:
    """Print an error as one line on stderr, and return the exit code."""
    line = " ".join(message.split())
    with contextlib.suppress(OSError):  # there is nowhere else to say it
        write(f"{PROGRAM}: error: {line if len(line) <= LONGEST else line[:LONGEST] + ' ...'}", error=True)
    return code


def require_name(word: str, registry: Registry, usage: str) -> None:
    """Refuse a directory, or a word that is like no known name, where a registered name comes first.

    A word that is close to a name, and FILE.py:NAME, are left to the registry.

    Args:
      word: the first word after the verb.
      registry: the experiments or the sweeps.
      usage: how the verb is called, with the options that take a directory.

    Raises:
      UserError: it can be no name.
    """
    if registry.knows(word) or ".py" in word:
        return
    kind, known = registry.kind, registry.names()
    if os.path.isdir(word):
        raise UserError(f"{word!r} is a directory, not a registered {kind}; usage: {usage}; known: {', '.join(known)}")
    if not difflib.get_close_matches(word, known):
        raise UserError(f"unknown {kind} {word!r}; usage: {usage}; known: {', '.join(known)}")


def working(text: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a terminal shows, on stderr, what is being done; elsewhere nothing is shown."""
    return Console(stderr=True).busy(text)


def load_model(checkpoint: str) -> "LoadedModel":
    """Load a checkpoint, and show in a terminal that this is being done."""
    from diffusionlm.pretrained.loading import load

    with working("loading the model"):
        return load(checkpoint)


def print_json(values: Any, indent: int | None = 2) -> None:
    """Print a value as JSON on stdout, with null for numbers that are not finite."""
    with naming("standard output"):
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
