"""The records of a benchmark's files, checked field by field."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from diffusionlm import schema
from diffusionlm.data import items
from diffusionlm.data.text_files import Files, expand
from diffusionlm.errors import UserError
from diffusionlm.untrusted import unencodable

T = TypeVar("T")

MOST_BYTES = 8 << 20  # of a record: the longest of the known benchmarks has 50 kB


class Fields(msgspec.Struct, frozen=True, kw_only=True):
    """The base of types of records: fields that the task does not read may be there."""


def read_records(data: str, type_: type[T], limit: int | None) -> list[T]:
    """Return the first records of .jsonl and .json files, which may be packed as .gz.

    Args:
      data: a file, a directory or a pattern.
      type_: what each record must hold.
      limit: the most to read; None: all.

    Raises:
      UserError: there is no such file, it unpacks to more than its kind does, a record is malformed or of more than
        `MOST_BYTES`, lacks a field or has one of another type, or there is none.
    """
    records: list[T] = []
    for item in Files(expand(data, dialogues=False)):
        if len(records) == limit:
            break
        if not item.is_json:
            raise UserError(f"{item.location} is a text, and this task reads records; give a .jsonl or .json file")
        if (record := record_of(item)) is not None:
            _require_fields(record, type_, item.location)
            records.append(schema.convert(record, type_, item.location))
            _require_encodable(records[-1], item.location)
    if not records:
        raise UserError(f"data={data!r} holds no record; there is nothing to evaluate on")
    return records


def record_of(item: items.Item) -> dict[str, Any] | None:
    """Return the JSON object of an item, None for a blank line.

    Raises:
      UserError: it is malformed, or of more than `MOST_BYTES`.
    """
    if len(item.payload) > MOST_BYTES:
        raise UserError(
            f"{item.location} has {len(item.payload):,} bytes, more than the {MOST_BYTES:,} that a record may have"
        )
    try:
        return items.record_of(item)
    except ValueError as error:
        raise UserError(f"{item.location}: {error}") from error


def _require_fields(record: Mapping[str, Any], type_: type, location: str) -> None:
    """Raise `UserError` if a record lacks a field of its type."""
    names = [field.name for field in msgspec.structs.fields(type_) if field.required]
    if missing := [name for name in names if name not in record]:
        *others, last = map(repr, names)
        read = f"{', '.join(others)} and {last}" if others else last
        raise UserError(f"{location}: {items.lacks_field(missing[0], record)}; the task reads {read}")


def _require_encodable(record: Any, location: str) -> None:
    """Raise `UserError` if a text of a record is none that UTF-8 can write, as those with half a surrogate pair."""
    for name, value in msgspec.to_builtins(record).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (reason := unencodable(text)) is not None:
                raise UserError(f"{location}: field {name!r} has {reason}")
