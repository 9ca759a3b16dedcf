"""Atomic file writes and crash-safe JSON lines, on disks and in buckets."""

import json
import math
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from diffusionlm.errors import UserError


def run_path(path: epath.PathLike) -> epath.Path:
    """Return a path on a disk or in a bucket.

    Raises:
      UserError: the client of such buckets is not installed.
    """
    path = epath.Path(path)
    try:
        path.exists()
    except ImportError as error:
        needed = " ".join(str(error).split())
        raise UserError(
            f"cannot reach {path}: {needed}; in a checkout of diffusionlm, pip install -e '.[gcs]'"
        ) from error
    except OSError:  # the path's user will report it
        pass
    return path


def in_bucket(path: epath.PathLike) -> bool:
    """Return True for an object store: objects appear whole, and can be neither renamed atomically nor appended to."""
    return "://" in str(path)


def write_atomically(path: epath.Path, content: str | bytes) -> None:
    """Write a file that readers see whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        path.write_bytes(data)
        return
    # On a shared disk, processes of two machines may have the same number.
    temporary = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def dump_numbers(values: Any, indent: int | None = None) -> str:
    """Return JSON with null for every number that is not finite: JSON has no NaN and no infinity."""

    def strict(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(_map_values(strict, values), indent=indent, allow_nan=False)


def load_numbers(text: str) -> Any:
    """Read JSON in which null stands for a number that is not finite, as `dump_numbers` writes it: null becomes NaN."""
    return _map_values(lambda value: math.nan if value is None else value, json.loads(text))


def _map_values(function: Callable[[Any], Any], values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _map_values(function, value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_map_values(function, value) for value in values]
    return function(values)


def read_json_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line, without a last line that a kill cut short; none if there is no file.

    A number that is not finite, which `JsonLines` writes as null, is NaN.
    """
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [load_numbers(line) for line in lines[:-1]]  # what follows the last newline is empty or cut short


class JsonLines:
    """Appends objects to a file, one a line; each is on disk when `write` returns.

    A number that is not finite is written as null. In a bucket the whole object is rewritten, at most every
    `REWRITE_SECONDS`, and at `flush`.

    Args:
      path: the file; the lines that it holds are continued.
      keep: returns True for the existing lines to keep.
      check: called before anything is written; it may raise.
    """

    REWRITE_SECONDS = 60.0

    def __init__(
        self,
        path: epath.Path,
        keep: Callable[[dict[str, Any]], bool] = lambda line: True,
        check: Callable[[], None] = lambda: None,
    ):
        check()
        self._path, self._check = path, check
        self.kept = [line for line in read_json_lines(path) if keep(line)]
        self._bucket = in_bucket(path)
        texts = [dump_numbers(line) + "\n" for line in self.kept]
        write_atomically(path, "".join(texts))
        self._texts = texts if self._bucket else []
        self._written = time.monotonic()

    def write(self, line: dict[str, Any]) -> None:
        """Append an object."""
        self._check()
        text = dump_numbers(line) + "\n"
        if not self._bucket:
            with self._path.open("a") as file:
                file.write(text)
            return
        self._texts.append(text)
        if time.monotonic() - self._written > self.REWRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all lines to a bucket's object."""
        if self._bucket:
            self._check()
            write_atomically(self._path, "".join(self._texts))
            self._written = time.monotonic()
