"""Texts, lines of JSON and JSON lists."""

import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from diffusionlm.data.fields import Columns
from diffusionlm.data.formats.reading import WHOLE, Line, Reader, Reading, Span, packing
from diffusionlm.data.items import Item, parse_json
from diffusionlm.errors import UserError
from diffusionlm.untrusted import printable, require_content


def read_text(path: epath.Path, span: Span, columns: Columns | None) -> Iterator[Item]:
    """Yield the one document of a text file."""
    with Reading(path), path.open("rb") as file:
        require_content(file, path)
        reader = Reader(path, file)
        content = reader.rest()
        yield Item(str(path), content, False, reader.position)


def read_lines(path: epath.Path, span: Span, columns: Columns | None) -> Iterator[Item]:
    """Yield the lines of a file that begin in a span of bytes."""
    with Reading(path) as reading, path.open("rb") as file:
        yield from _lines(path, _open(path, file, span), span, reading)


def read_json(path: epath.Path, span: Span, columns: Columns | None) -> Iterator[Item]:
    """Yield the members of a JSON list, or the lines of a file that begin in a span of bytes."""
    with Reading(path) as reading, path.open("rb") as file:
        reader = _open(path, file, span)
        blank, first = (0, b"") if span.start else _first_line(reader)
        if _begins_list(first):
            content = first + reader.rest()
            yield from _list_items(str(path), content, reader.position)
            return
        yield from _lines(path, reader, span, reading, blank, first)


def cut_lines(path: epath.Path, size: int, piece_bytes: int) -> list[Span]:
    """Return spans of `piece_bytes` of a file that is not packed."""
    if packing(path) or size <= piece_bytes:
        return [WHOLE]
    bounds = [*range(0, size, piece_bytes), size]
    return [Span(start, stop, stop - start) for start, stop in zip(bounds, bounds[1:], strict=False)]


def cut_json(path: epath.Path, size: int, piece_bytes: int) -> list[Span]:
    """Return spans of a file of lines; a list is one piece."""
    if packing(path) or size <= piece_bytes:
        return [WHOLE]
    with Reading(path), path.open("rb") as file:
        reader = _open(path, file, WHOLE)
        _, first = _first_line(reader)
    # The first span tells how many blank lines come before.
    late = reader.position - len(first) >= piece_bytes
    return [WHOLE] if late or _begins_list(first) else cut_lines(path, size, piece_bytes)


def _open(path: epath.Path, file: Any, span: Span) -> Reader:
    """Return a reader at the first line that begins in a span."""
    if not span.start:
        require_content(file, path)
        return Reader(path, file)
    file.seek(span.start - 1)  # its last byte ends a line, or not
    reader = Reader(path, file, span.start - 1)
    reader.skip_line(span.stop)
    return reader


def _lines(
    path: epath.Path, reader: Reader, span: Span, reading: Reading, blank: int = 0, first: bytes = b""
) -> Iterator[Item]:
    """Yield the lines from `first` on, which was read already and follows so many blank ones."""
    start, position = (reader.position, reader.position) if span.start else (0, 0)
    number, name = blank, str(path)
    while first or span.stop is None or reader.position < span.stop:
        if not (line := first or reader.line()):
            return
        first, number = b"", number + 1
        reading.location = Line(name, start, number) if span.start else f"{name}:{number}"
        before, position = position, reader.position
        yield Item(reading.location, line, True, position - before)


def _first_line(reader: Reader) -> tuple[int, bytes]:
    """Return the first line that is not blank, b"" if there is none, and the number of those before it."""
    number = 0
    while (first := reader.line()) and not _bare(first):
        number += 1
    return number, first


def _bare(line: bytes) -> bytes:
    return line.removeprefix(b"\xef\xbb\xbf").strip()


def _begins_list(line: bytes) -> bool:
    """Return True unless a line holds an object of its own: it begins a list, or an object over several lines."""
    return bool(line) and not (_bare(line).startswith(b"{") and _bare(line).endswith(b"}"))


def _list_items(location: str, content: bytes, size: int) -> Iterator[Item]:
    """Yield the members of a JSON list, which has `size` bytes in its file, each as a line of jsonl."""
    try:
        members = parse_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{printable(location)}: {error}") from error
    if not isinstance(members, list):
        kind = "one JSON object over several lines" if isinstance(members, dict) else "a JSON value"
        raise UserError(f"{printable(location)} holds {kind}; it must hold a list of objects, or one object a line")
    for i, member in enumerate(members):
        yield Item(f"{location}[{i}]", json.dumps(member).encode(), True, size // len(members))
