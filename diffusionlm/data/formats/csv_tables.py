"""Tables of comma- or tab-separated values: a header row, then a document a row."""

import csv
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
from etils import epath

from diffusionlm.data.fields import Columns
from diffusionlm.data.formats.reading import Reader, Reading, Span, lacks_column
from diffusionlm.data.items import Item
from diffusionlm.errors import UserError
from diffusionlm.untrusted import printable, require_content

CELL_CHARACTERS = 1 << 28  # the most of a cell; an unclosed quote would take the rest of the file


class _Row(NamedTuple):
    """A row of cells, or why it cannot be read."""

    line: int  # of the file, from 1, at which it begins
    cells: Sequence[str]
    problem: str = ""


def read(path: epath.Path, span: Span, columns: Columns | None) -> Iterator[Item]:
    """Yield the rows as JSON objects, with an empty item for each blank line.

    Raises:
      UserError: there is no header, it names a column twice, or it lacks one that is asked for.
    """
    with Reading(path) as reading, path.open("rb") as file:
        require_content(file, path)
        reader = Reader(path, file)
        rows = _rows(reader, "\t" if ".tsv" in path.suffixes[-2:] else ",")
        header = _header(path, rows, columns)
        position, name = 0, str(path)
        for row in rows:
            reading.location = f"{name}:{row.line}"
            before, position = position, reader.position
            yield _item(str(reading.location), header, row)._replace(progress=position - before)


def _item(location: str, header: Sequence[str], row: _Row) -> Item:
    problem, payload = row.problem, b""
    if not problem and row.cells and len(row.cells) != len(header):
        problem = f"{len(row.cells)} cells, and the header has {len(header)}"
    elif not problem and row.cells:
        try:
            payload = msgspec.json.encode(dict(zip(header, row.cells, strict=True)))
        except UnicodeEncodeError:
            problem = "invalid UTF-8"
    return Item(location, payload, True, 0, problem)


def _header(path: epath.Path, rows: Iterator[_Row], columns: Columns | None) -> Sequence[str]:
    first = next((row for row in rows if row.cells or row.problem), None)
    if first is None:
        raise UserError(f"{printable(path)} is empty; its first row must name the columns")
    if first.problem:
        raise UserError(f"{printable(path)}:{first.line}: {first.problem}; the first row must name the columns")
    header = [printable(name) for name in first.cells]
    if twice := [name for i, name in enumerate(header) if name in header[:i]]:
        raise UserError(f"{printable(path)} names the column {twice[0]!r} twice; rename one")
    for name in (*columns.texts, *columns.others) if columns else ():
        if name not in header:
            raise lacks_column(path, name, header)
    return header


def _rows(reader: Reader, delimiter: str) -> Iterator[_Row]:
    table = csv.reader(_decoded(reader), delimiter=delimiter, strict=True)
    while True:
        line = table.line_num + 1
        limit = csv.field_size_limit(CELL_CHARACTERS)  # of the whole process
        try:
            row = _Row(line, next(table))
        except StopIteration:
            return
        except csv.Error as error:
            row = _Row(line, (), _reason(error))
        finally:
            csv.field_size_limit(limit)
        yield row


def _reason(error: csv.Error) -> str:
    reason = printable(error)
    if "unexpected end of data" in reason:
        return "a quote that opens here is never closed"
    if "field larger" in reason:
        return f"a cell of more than {CELL_CHARACTERS:,} characters, or a quote that is never closed"
    if "new-line character" in reason:
        return "a carriage return that ends no line; write the file with \\n or \\r\\n at the ends of lines"
    return reason


def _decoded(reader: Reader) -> Iterator[str]:
    """Yield the lines as text, in which what is not UTF-8 stands as lone surrogates."""
    first = reader.line().removeprefix(b"\xef\xbb\xbf")
    while first:
        yield first.decode("utf-8", "surrogateescape")
        first = reader.line()
