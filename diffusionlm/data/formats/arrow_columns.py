"""Columns of Arrow tables, as Parquet files and datasets of Hugging Face have them, into items."""

import datetime
import decimal
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
from etils import epath

from diffusionlm.data.fields import Columns
from diffusionlm.data.formats.reading import lacks_column, load_package
from diffusionlm.errors import UserError
from diffusionlm.untrusted import printable


class Wanted(NamedTuple):
    """The columns of a table that are read."""

    names: list[str]  # of columns
    leaves: list[str] | None  # of those, with dots between the levels; None: all


def choose(path: epath.Path, schema: Any, columns: Columns | None) -> Wanted:
    """Return which columns of a file are read.

    Raises:
      UserError: one is missing, twice there, or no text where text is asked for.
    """
    if twice := [name for i, name in enumerate(schema.names) if name in schema.names[:i]]:
        raise UserError(f"{printable(path)} names the column {printable(twice[0])!r} twice; rename one")
    if columns is None:
        return Wanted(list(schema.names), None)
    names, leaves = [], []
    for name in (*columns.texts, *columns.others):
        column, type_ = _find(path, schema, name)
        if name in columns.texts and not _holds_text(type_):
            raise UserError(
                f"{printable(path)}: column {printable(name)!r} is {printable(type_)}, not text; choose the column of "
                "the text with --text_field NAME"
            )
        names.append(column)
        leaves.append(name)
    return Wanted(list(dict.fromkeys(names)), list(dict.fromkeys(leaves)))


def _find(path: epath.Path, schema: Any, name: str) -> tuple[str, Any]:
    """Return the column that holds a field, and the type of the field."""
    if name in schema.names:
        return name, schema.field(name).type
    head, *rest = name.split(".")
    if not rest or head not in schema.names:
        raise lacks_column(path, name, schema.names)
    type_, reached = schema.field(head).type, head
    for part in rest:
        fields = [field.name for field in type_] if str(type_).startswith("struct") else []
        if part not in fields:
            shown = ", ".join(repr(printable(field)) for field in fields)
            has = f"the fields {shown}" if fields else f"no fields: it is {printable(type_)}"
            raise UserError(
                f"{printable(path)}: column {printable(reached)!r} has {has}, not {printable(part)!r}; choose "
                f"another field than {printable(name)!r}"
            )
        type_, reached = type_.field(part).type, f"{reached}.{part}"
    return head, type_


def _holds_text(type_: Any) -> bool:
    """Return True for the types of text; also for bytes, which many writers call texts, and for nulls alone."""
    name = str(type_)
    if name.startswith("dictionary<values="):
        name = name.removeprefix("dictionary<values=").partition(",")[0]
    return name in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")


def require_valid(column: Any) -> None:
    """Check what a column of a mapped file says of its own memory: reading a wrong offset would end the process.

    Raises:
      ArrowInvalid: it is damaged. Texts that are not UTF-8 are left to `payloads`, which names them.
    """
    try:
        column.validate(full=True)
    except ValueError as error:
        if not (_holds_text(column.type) and "UTF8" in str(error)):  # offsets are checked before
            raise


def payloads(batch: Any, names: list[str]) -> Iterator[tuple[bytes, str]]:
    """Yield each row of a record batch as JSON of these columns, or b"" and why it cannot be read."""
    only_texts = all(_holds_text(batch.schema.field(name).type) for name in names)
    encode = _encode_texts if only_texts else _encode
    try:
        rows = batch.select(names).to_pylist()
    except ValueError:  # a text that is not UTF-8; of which row, it does not say
        rows = None
    for i in range(batch.num_rows):
        try:
            row = rows[i] if rows is not None else {name: batch.column(name)[i].as_py() for name in names}
            yield encode(row), ""
        except UnicodeError:
            wrong = " and ".join(repr(printable(name)) for name in _undecodable(batch, names, i))
            yield b"", f"invalid UTF-8 in {wrong}"
        except ValueError as error:  # a date beyond those of Python
            yield b"", printable(error)


def _undecodable(batch: Any, names: list[str], i: int) -> Iterator[str]:
    for name in names:
        try:
            _encode(batch.column(name)[i].as_py())
        except ValueError:
            yield name


def _encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=_plain).encode()


def _encode_texts(row: dict[str, Any]) -> bytes:
    """Return a row of texts and nulls as JSON, in a third of the time."""
    if any(isinstance(value, bytes) for value in row.values()):
        return _encode(row)
    return msgspec.json.encode(row)


def _plain(value: Any) -> Any:
    """Return a value in JSON types."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, decimal.Decimal):
        return float(value)
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def arrow_errors(path: epath.Path) -> tuple[type[Exception], ...]:
    """Return the exceptions of pyarrow that say that a file is damaged; names of columns may not be UTF-8."""
    return (load_package("pyarrow", path, "pyarrow").lib.ArrowException, UnicodeDecodeError)
