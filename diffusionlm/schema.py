"""Check JSON that is read against a type, whole: every field, its type and its range."""

import json
import re
from typing import Annotated, Any, TypeVar

import msgspec
from etils import epath

from diffusionlm import untrusted
from diffusionlm.errors import UserError, suggest

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]

_SHOWN = 60  # characters of a refused value in a message


class Record(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """The base of types of JSON objects; a field that the type does not have is refused.

    Annotate fields with `Annotated[int, msgspec.Meta(ge=0)]` for ranges; defaults make fields optional.
    """


def decode(data: bytes | str, type_: type[T], source: Any) -> T:
    """Return JSON text as a value of `type_`.

    Args:
      data: JSON in UTF-8.
      type_: a `Record`, a dict of them, or any type that msgspec knows.
      source: where it is from; messages begin with it.

    Raises:
      UserError: it is not JSON, an object names a field twice, lacks a field or has an unknown one, or a value is of
        another type or out of range.
    """
    try:
        value = msgspec.json.decode(data, type=type_)
        json.loads(data, object_pairs_hook=unique_fields, parse_int=_integer)  # of what msgspec takes, refuse some more
    except (ValueError, RecursionError) as error:  # msgspec's errors and broken UTF-8 are ValueErrors
        raise _refusal(source, error, type_, _parsed(data)) from error
    return value


def convert(values: Any, type_: type[T], source: Any) -> T:
    """Return values in JSON types as a value of `type_` (see `decode`)."""
    try:
        return msgspec.convert(values, type=type_)
    except (ValueError, RecursionError) as error:  # a lone surrogate is a ValueError
        raise _refusal(source, error, type_, values) from error


def read_json(path: epath.PathLike, type_: type[T], limit: int = untrusted.MAX_JSON_BYTES) -> T:
    """Return the JSON of a file as a value of `type_`.

    Raises:
      UserError: it is not a regular file, is larger than `limit` bytes, or `decode` refuses it.
      OSError: it cannot be read.
    """
    return decode(untrusted.read_bytes(path, limit), type_, path)


def unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a JSON object, an `object_pairs_hook` of `json`; raise `ValueError` if one comes twice."""
    values = dict(pairs)  # msgspec takes the last of two fields of one name
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} comes twice in one object")
    return values


def _integer(text: str) -> None:
    if text == "-0":
        raise ValueError("-0 is no integer")


def _parsed(data: bytes | str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _refusal(source: Any, error: Exception, type_: Any, values: Any) -> UserError:
    """Return an error with the field and its value: msgspec says "Expected `int`, got `str` - at `$.model.d_model`"."""
    message, _, path = str(error).partition(" - at `$")
    path = path.removesuffix("`").removeprefix(".")
    if unknown := re.search(r"unknown field `(.*)`", message):
        if not path and (fields := getattr(type_, "__struct_fields__", ())):
            message += suggest(unknown[1], fields)
    elif path and "[...]" not in path:
        value = _value_at(values, path)
        path += f"={value if len(value) <= _SHOWN else value[:_SHOWN] + '...'}"
    where = f"{path}: " if path else ""
    return UserError(f"{untrusted.printable(source)}: {untrusted.printable(where + message)}")


def _value_at(values: Any, path: str) -> str:
    try:
        for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
            values = values[int(index) if index else name]
    except (LookupError, TypeError):
        return "?"
    return repr(values)
