"""Numbers of notebooks: those of numpy are converted where they enter, and truth values are no numbers."""

import dataclasses
import math
import numbers
from typing import Any, TypeGuard

from diffusionlm.errors import UserError


def native(value: Any) -> Any:
    """Return a number or truth value of numpy as Python's; anything else is returned as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()  # not of JAX: inside a compiled function its numbers have no value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def is_whole(value: Any) -> TypeGuard[int]:
    """Return True for a native integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Return True for a native number; True and False are none, and NaN is not either."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def whole(name: str, value: Any, least: int, words: str | None = None) -> int:
    """Return an argument that is to be an integer as Python's.

    Args:
      name: the argument, for the message.
      value: what was given.
      least: the smallest that is allowed.
      words: complete "NAME=0 must ..."; None: that it must be at least `least`.

    Raises:
      UserError: it is no integer, or is smaller.
    """
    number = native(value)
    if not is_whole(number):
        raise UserError(f"{name}={value!r} must be an integer")
    if number < least:
        raise UserError(f"{name}={number} must {words or f'be at least {least}'}")
    return number


def real(name: str, value: Any) -> float:
    """Return an argument that is to be a number as Python's.

    Raises:
      UserError: it is no number, or not a finite one.
    """
    number = native(value)
    if not is_real(number) or not abs(number) < math.inf:
        raise UserError(f"{name}={value!r} must be a finite number")
    return number


@dataclasses.dataclass(frozen=True)
class NativeScalars:
    """A base of settings whose fields hold Python's scalars, whatever they are made from."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (converted := native(value)) is not value:
                object.__setattr__(self, field.name, converted)
