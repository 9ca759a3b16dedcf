"""Atomic file writes and crash-safe JSON lines, on disks and in buckets."""

import contextlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

from diffusionlm import schema
from diffusionlm.errors import UserError, naming
from diffusionlm.untrusted import kind_of, printable, read_text

BUCKETS = ("gs://", "s3://")
MAX_PATH_BYTES, MAX_PARTS = 4096, 500  # Linux takes no longer paths; Python makes directories by recursion
MAX_LINES_BYTES = 4 << 30  # of a file of JSON lines: ten million steps


def run_path(path: epath.PathLike) -> epath.Path:
    """Return a path on a disk or in a bucket.

    Raises:
      UserError: no file can have that name, the scheme is unknown, or the client of such buckets is not installed.
    """
    if (scheme := _scheme(path)) and scheme not in BUCKETS:
        raise UserError(
            f"{printable(path)}: unknown scheme {scheme}; give a path on a disk, or in a bucket ({', '.join(BUCKETS)})"
        )
    path = epath.Path(path)
    try:
        path.exists()
    except ImportError as error:
        needed = " ".join(str(error).split())
        raise UserError(
            f"cannot reach {printable(path)}: {needed}; in a checkout of diffusionlm, pip install -e '.[gcs]'"
        ) from error
    except OSError:  # the path's user will report it
        pass
    return path


def disk_path(path: epath.PathLike) -> Path:
    """Return a path on a disk, for files that are not read from or written to buckets.

    Raises:
      UserError: no file can have that name, or it is an address.
    """
    if scheme := _scheme(path):
        raise UserError(
            f"{printable(path)} is not on a disk, and {scheme} is not supported here; give a path on a disk"
        )
    return Path(path)


def require_directory(path: epath.PathLike, option: str) -> None:
    """Refuse a path on a disk at which no directory is or can be made, because it or a part of it is another file.

    Args:
      path: an existing directory, or one to make.
      option: what the user calls it, such as "output"; the message begins with it.

    Raises:
      UserError: it is below or at a file, a device, a pipe or a socket.
    """
    if in_bucket(path):
        return
    for place in (Path(path), *Path(path).parents):
        if os.path.isdir(place):
            return
        if os.path.exists(place):
            which = "it" if place == Path(path) else printable(place)
            raise UserError(
                f"{option}={printable(path)} must be a directory, and {which} is {kind_of(place)}; name another"
            )


def _scheme(path: epath.PathLike) -> str:
    """Return the scheme of an address, such as "gs://", or "" for a path.

    Raises:
      UserError: no file can have that name.
    """
    text = os.fspath(path)
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:
        size = 0
    if not size or "\0" in text:
        raise UserError(f"{printable(repr(text))} is no path: it is empty, or has a character that no file name has")
    if size > MAX_PATH_BYTES or text.count("/") > MAX_PARTS:
        raise UserError(
            f"{printable(text[:60])}... is no path: it has {size:,} bytes, in {text.count('/') + 1:,} parts"
        )
    match = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text)
    return match[0] if match else ""


def in_bucket(path: epath.PathLike) -> bool:
    """Return True for an object store: objects appear whole, and can be neither renamed atomically nor appended to."""
    return "://" in str(path)


def write_atomically(path: epath.PathLike, content: str | bytes) -> None:
    """Write a file that readers see whole or not at all."""
    data = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        epath.Path(path).write_bytes(data)
        return
    # Nobody else can know the name, and a file or link that is there is never opened.
    temporary = os.path.join(os.path.dirname(path), f".diffusionlm-{uuid.uuid4().hex}.tmp")
    try:
        with naming(path):
            with open(temporary, "xb", opener=_without_links) as file:
                file.write(data)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


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


def read_json_lines(
    path: epath.Path, line_type: Any = dict[str, Any], parse: Callable[[str], Any] = load_numbers
) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line, without a last line that a kill cut short; none if there is no file.

    Args:
      path: the file.
      line_type: the type of a line (see `schema.decode`), which has fields of a JSON object.
      parse: reads a line: `load_numbers`, which makes null NaN, or `json.loads` where null means something else.

    Raises:
      UserError: a line is not JSON, or of another type.
    """
    if not path.exists():
        return []
    lines = read_text(path, MAX_LINES_BYTES).split("\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty or cut short
        schema.decode(line, line_type, f"{path}, line {number}")
    return [parse(line) for line in lines[:-1]]


class JsonLines:
    """Appends objects to a file, one a line; each is on disk when `write` returns.

    A number that is not finite is written as null. In a bucket the whole object is rewritten, at most every
    `REWRITE_SECONDS`, and at `flush`.

    Args:
      path: the file; the lines that it holds are continued.
      keep: returns True for the existing lines to keep.
      check: called before anything is written; it may raise.
      line_type: of the lines that the file holds (see `read_json_lines`).
      parse: of the lines that the file holds (see `read_json_lines`).
    """

    REWRITE_SECONDS = 60.0

    def __init__(
        self,
        path: epath.Path,
        keep: Callable[[dict[str, Any]], bool] = lambda line: True,
        check: Callable[[], None] = lambda: None,
        line_type: Any = dict[str, Any],
        parse: Callable[[str], Any] = load_numbers,
    ):
        check()
        self._path, self._check = path, check
        self.kept = [line for line in read_json_lines(path, line_type, parse) if keep(line)]
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
            with naming(self._path), open(self._path, "a", encoding="utf-8", opener=_without_links) as file:
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
