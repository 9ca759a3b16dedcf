"""Check JSON that is read against a type, whole: every field, its type and its range."""

from typing import Any, TypeVar

import msgspec
from etils import epath

from diffusionlm import untrusted
from diffusionlm.errors import UserError

T = TypeVar("T")


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
      UserError: it is not JSON, lacks a field, has an unknown one, or a value is of another type or out of range.
    """
    try:
        return msgspec.json.decode(data, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _refusal(source, error) from error


def convert(values: Any, type_: type[T], source: Any) -> T:
    """Return values in JSON types as a value of `type_` (see `decode`)."""
    try:
        return msgspec.convert(values, type=type_)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _refusal(source, error) from error


def read_json(path: epath.PathLike, type_: type[T], limit: int = untrusted.MAX_JSON_BYTES) -> T:
    """Return the JSON of a file as a value of `type_`.

    Raises:
      UserError: it is not a regular file, is larger than `limit` bytes, or `decode` refuses it.
      OSError: it cannot be read.
    """
    return decode(untrusted.read_bytes(path, limit), type_, path)


def _refusal(source: Any, error: Exception) -> UserError:
    # msgspec says "Expected `int`, got `str` - at `$.model.d_model`".
    message = str(error).replace(" - at `$.", ", at `").replace(" - at `$", ", at `")
    return UserError(f"{untrusted.printable(source)}: {untrusted.printable(message)}")
