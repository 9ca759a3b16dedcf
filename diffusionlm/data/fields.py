"""Fields of records: by name, nested ones by dots, or several of them put into a template."""

import functools
import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusionlm.errors import UserError
from diffusionlm.untrusted import printable

MOST_NAMED = 10  # fields, in messages
_ESCAPES = {"\\n": "\n", "\\t": "\t"}  # as shells pass them on


class Columns(NamedTuple):
    """The fields of records that are asked for; dots reach into nested ones."""

    texts: tuple[str, ...]  # these are to hold text
    others: tuple[str, ...] = ()


class Part(NamedTuple):
    """A part of a template: a text, and the field that follows it; "" if none does."""

    text: str
    field: str


@functools.cache
def template(text_field: str) -> tuple[Part, ...]:
    r"""Return the parts of a template, such as "{title}\n\n{text}"; of the name of a field, that field alone.

    Double braces stand for braces, and backslash n and t for a line break and a tab.

    Raises:
      UserError: a brace is open, or what it encloses is no name of a field.
    """
    if not text_field:
        raise UserError("text_field='' names no field; give its name, such as text")
    if "{" not in text_field and "}" not in text_field:
        return (Part("", text_field),)
    written = text_field
    for escape, character in _ESCAPES.items():
        written = written.replace(escape, character)
    try:
        parts = list(string.Formatter().parse(written))
    except ValueError as error:
        raise UserError(
            f"text_field={printable(text_field)!r} is no template ({error}); write fields as {{title}}, and braces of "
            "the text as {{ and }}"
        ) from error
    for _, field, form, conversion in parts:
        if field == "" or form or conversion:
            raise UserError(
                f"text_field={printable(text_field)!r} is no template: braces enclose the name of a field alone, "
                "such as {title}"
            )
    if not any(field for _, field, _, _ in parts):
        raise UserError(
            f"text_field={printable(text_field)!r} is a template without a field; write one, such as {{text}}"
        )
    return tuple(Part(text, field or "") for text, field, _, _ in parts)


def names(text_field: str) -> tuple[str, ...]:
    """Return the names of the fields that a text is made of."""
    return tuple(dict.fromkeys(part.field for part in template(text_field) if part.field))


def value(record: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field; an exact name comes before one with dots, which reach into nested objects.

    A field of an object that is null is null too.

    Raises:
      KeyError: there is none; the message says which fields there are instead.
    """
    if name in record:
        return record[name]
    head, *rest = name.split(".")
    if not rest or head not in record:
        raise KeyError(lacks(name, record))
    inner, reached = record[head], head
    for part in rest:
        if inner is None:
            return None
        if not isinstance(inner, dict):
            raise KeyError(
                f"field {printable(reached)!r} is {type(inner).__name__}, which has no field {printable(part)!r}"
            )
        if part not in inner:
            raise KeyError(f"{lacks(part, inner)} of field {printable(reached)!r}")
        inner, reached = inner[part], f"{reached}.{part}"
    return inner


def column(record: Mapping[str, Any], name: str) -> str:
    """Return the field of the record itself that holds a field of a name with dots."""
    return name if name in record else name.partition(".")[0]


def lacks(name: str, record: Mapping[str, Any]) -> str:
    """Say which fields a record has instead of the one of that name."""
    others = [printable(other) for other in record]
    shown = ", ".join(map(repr, others[:MOST_NAMED])) + ", ..." * (len(others) > MOST_NAMED)
    return f"no field {name!r} among {shown or 'none'}"
