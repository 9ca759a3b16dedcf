"""The formats of files of documents: one table, by the ends of their names.

A format reads spans of a file: `read` yields the raw items of one, and `cut` says which spans there are. A reader holds
one document, one batch of rows or one JSON list at a time.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from etils import epath

from diffusionlm.data.fields import Columns
from diffusionlm.data.formats import arrow_files, csv_tables, lines, parquet, tar_archives
from diffusionlm.data.formats.reading import PACKINGS, WHOLE, Span
from diffusionlm.data.items import Item
from diffusionlm.errors import UserError, require_package
from diffusionlm.untrusted import printable


def _whole(path: epath.Path, size: int, piece_bytes: int) -> list[Span]:
    return [WHOLE]


class Format(NamedTuple):
    """A kind of file."""

    endings: tuple[str, ...]
    document: str  # what one is, for the documentation
    read: Callable[[epath.Path, Span, Columns | None], Iterator[Item]]
    cut: Callable[[epath.Path, int, int], Sequence[Span]] = _whole  # of a file of so many bytes, at so many
    packed: bool = True  # may also end in one of `PACKINGS`
    records: bool = True  # documents are JSON objects, with fields
    package: str = ""  # that it needs


TEXT = Format((".txt", ".md"), "the file", lines.read_text, records=False)
LINES = Format((".jsonl",), "a line, which is a JSON object", lines.read_lines, lines.cut_lines)
JSON = Format((".json",), "a JSON object of a list, or a line", lines.read_json, lines.cut_json)
CSV = Format((".csv", ".tsv"), "a row; the first row names the columns", csv_tables.read)
PARQUET = Format((".parquet",), "a row", parquet.read, parquet.cut, packed=False, package="pyarrow")
ARROW = Format((".arrow",), "a row", arrow_files.read, arrow_files.cut, packed=False, package="pyarrow")
TAR = Format((".tar",), "a member .txt, .md or .json, or two of one name", tar_archives.read)
FORMATS = (TEXT, LINES, JSON, CSV, PARQUET, ARROW, TAR)

# In a directory, files of the first of these groups that it has are read: a README.md describes the .parquet files
# beside it, and a .csv or .json file the texts.
GROUPS = ((PARQUET, ARROW, TAR), (TEXT, LINES), (CSV,), (JSON,))
GROUPS_OF_RECORDS = ((PARQUET, ARROW, TAR), (LINES, JSON), (CSV,))  # for dialogues

# Kinds that are known and not read; another name would not help.
OTHER_ENDINGS = (".xlsx", ".xls", ".feather", ".orc", ".avro", ".h5", ".zip", ".bz2", ".xz", ".7z", ".pdf", ".html")


def of(path: epath.Path) -> Format | None:
    """Return the format of a file, None if there is none of its name."""
    return next((format for format in FORMATS if path.name.endswith(endings(format))), None)


@functools.cache
def endings(*formats: Format) -> tuple[str, ...]:
    """Return the ends of the names of files of these formats, packed ones after the others."""
    plain = tuple(ending for format in formats for ending in format.endings)
    packed = tuple(ending for format in formats if format.packed for ending in format.endings)
    return plain + tuple(ending + packing for packing in PACKINGS for ending in packed)


def require_packages(paths: Sequence[epath.Path]) -> None:
    """Raise `UserError` if files need a package that is not installed."""
    needed: dict[str, epath.Path] = {}
    for path in paths:
        if path.suffix == ".zst":
            needed.setdefault("zstandard", path)
        if (format := of(path)) and format.package:
            needed.setdefault(format.package, path)
    for package, path in needed.items():
        require_package(package, repr(printable(path)), package, "corpora")


def read(path: epath.Path, span: Span, columns: Columns | None) -> Iterator[Item]:
    """Yield the items of a span of a file, of a name that `of` knows.

    Args:
      path: the file.
      span: one of `cut`, or `WHOLE`.
      columns: the fields that are asked for; others may be left out. None: all.

    Raises:
      UserError: the file cannot be read as what its name says.
    """
    yield from _known(path).read(path, span, columns)


def cut(path: epath.Path, size: int, piece_bytes: int) -> Sequence[Span]:
    """Return spans of a file, which together give what `WHOLE` gives, in order.

    Args:
      path: the file.
      size: its bytes.
      piece_bytes: about so many bytes of the file are in a span, where its format allows.

    Raises:
      UserError: as in `read`.
    """
    return _known(path).cut(path, size, piece_bytes)


def _known(path: epath.Path) -> Format:
    if (format := of(path)) is None:
        raise UserError(f"{printable(path)!r} is of an unknown kind; its name must end as that of a file of documents")
    return format
