"""Documents as a source gives them, raw, and what workers read of them: a text, or the fields of a JSON object."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffusionlm import schema
from diffusionlm.data import fields
from diffusionlm.untrusted import printable, unencodable

MOST_NAMED = fields.MOST_NAMED
lacks_field = fields.lacks


class Item(NamedTuple):
    """One document, raw."""

    place: object  # its str is the location
    payload: bytes
    is_json: bool  # a JSON object, not the text itself
    progress: int  # bytes of the source that this item used up
    problem: str = ""  # why it cannot be read, if its reader found that

    @property
    def location(self) -> str:
        """The place as messages name it: file:line, file, or the example's name."""
        return str(self.place)


def text_of(item: Item, text_field: str) -> str:
    """Return the text of a document that is evaluated, "" for a blank line of jsonl.

    Raises:
      ValueError: the item is malformed; the message is the reason.
    """
    return read_text(item, text_field, option="field")[0]


def read_text(item: Item, text_field: str, option: str = "text_field") -> tuple[str, Sequence[str]]:
    """Return the text of a document, and the names of the fields beside it that hold something.

    Args:
      item: the document.
      text_field: the field of a JSON object that holds the text, with dots for one of a nested object, or a template.
      option: the option that chooses this field, for the message.

    Raises:
      ValueError: the item is malformed; the message is the reason.
    """
    if not item.is_json:
        return _decode(item), ()
    record = record_of(item)
    if record is None:
        return "", ()
    text, used = "", set()
    for part in fields.template(text_field):
        text += part.text
        if part.field:
            text += checked_text(f"field {part.field!r}", _value(part.field, record, option))
            used.add(fields.column(record, part.field))
    return text, [name for name, value in record.items() if name not in used and not is_empty(value)]


def _value(name: str, record: Mapping[str, Any], option: str) -> Any:
    """Return the value of a field of the text; `ValueError` says which others there are, and how one is chosen."""
    try:
        return fields.value(record, name)
    except KeyError as error:
        close = difflib.get_close_matches(name, map(printable, record), n=1)
        choice = f"--{option} {close[0] if close else 'NAME'}"
        reason = f"{error.args[0]} (if another one holds the text, choose it with {choice})"
        raise ValueError(reason) from None


def record_of(item: Item) -> dict[str, Any] | None:
    """Return the JSON object of an item, None for a blank line.

    Raises:
      ValueError: the item is malformed; the message is the reason.
    """
    if not (text := _decode(item)).strip():
        return None
    record = parse_json(text)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, not an object")
    return record


def parse_json(text: str) -> Any:
    """Return the value of a JSON text in which no object has two fields of one name: readers differ in which they take.

    Raises:
      ValueError: it is no such text; the message is the reason.
    """
    try:
        return json.loads(text, object_pairs_hook=schema.unique_fields)
    except json.JSONDecodeError as error:  # its own message counts lines from here
        raise ValueError(f"invalid JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid JSON: {error}") from error


def checked_text(name: str, value: Any) -> str:
    """Return `value` if it is text that UTF-8 can encode.

    Raises:
      ValueError: it is not; the message says so of `name`.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, not a string")
    if (reason := unencodable(value)) is not None:
        raise ValueError(f"{name} has {reason}")
    return value


def is_empty(value: Any) -> bool:
    """Return True for the value of a field that holds nothing: null, or a text, list or object without content."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _decode(item: Item) -> str:
    if item.problem:
        raise ValueError(item.problem)
    try:
        return item.payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start}") from error
