"""Field types that check a config's values, and the markers for operational (non-scientific) and for later fields.

A field's type says what it may hold (`d_model: Positive = 256`), and `check_fields` refuses every other value. A field
may add advice: `t_min: Annotated[OpenFraction, Hint("the papers use 0.001")]`.
"""

import dataclasses
import functools
import reprlib
import struct
import sys
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

from diffusionlm.errors import UserError
from diffusionlm.scalars import NativeScalars

LARGEST = sys.float_info.max
# Networks and losses compute in float32: what is beyond it is infinite there, and what is smaller than it is 0.
LARGEST_32, SMALLEST_32 = (2 - 2**-23) * 2.0**127, 2.0**-126


class Must(NamedTuple):
    """A condition on the values of a field."""

    words: str  # completes "run.steps=0 must ..."
    holds: Callable[[Any], bool]


class Hint(NamedTuple):
    """Advice to somebody whose value does not meet a field's condition."""

    words: str  # completes "... must lie in (0, 1); ..."


# Counts are 32-bit integers on devices.
_INT32 = Must("be below 2**31", lambda n: n < 1 << 31)
Positive = Annotated[int, Must("be at least 1", lambda n: n >= 1), _INT32]
AtLeastTwo = Annotated[int, Must("be at least 2", lambda n: n >= 2), _INT32]
NonNegative = Annotated[int, Must("not be negative", lambda n: n >= 0), _INT32]
AtLeastMinusOne = Annotated[int, Must("be at least -1", lambda n: n >= -1), _INT32]
# Batches that are left out count on beyond the steps.
Steps = Annotated[int, Must("be at least 1 and at most 2**30", lambda n: 1 <= n <= 1 << 30)]
Seed = Annotated[int, Must("be at least 0 and below 2**32", lambda n: 0 <= n < 1 << 32)]
PositiveReal = Annotated[float, Must("be positive", lambda x: x > 0)]
AtLeastOneReal = Annotated[float, Must("be at least 1", lambda x: x >= 1)]
NonNegativeReal = Annotated[float, Must("not be negative", lambda x: x >= 0)]
Fraction = Annotated[float, Must("be a fraction in [0, 1]", lambda x: 0 <= x <= 1)]
OpenFraction = Annotated[float, Must("lie in (0, 1)", lambda x: 0 < x < 1)]
DecayRate = Annotated[float, Must("lie in [0, 1)", lambda x: 0 <= x < 1)]
Factor = Annotated[float, Must("lie in (0, 1]", lambda x: 0 < x <= 1)]


def at_least(limit: float) -> Must:
    """Return the condition that a value is no smaller than a limit, but for rounding to float32."""
    return Must(f"be at least {limit:g}", lambda x: x >= limit * (1 - 2**-23))


def at_most(limit: float) -> Must:
    """Return the condition that a value is no larger than a limit, but for rounding to float32."""
    return Must(f"be at most {limit:g}" if isinstance(limit, float) else f"be at most {limit}", lambda x: x <= limit)


def op(default: Any) -> Any:
    """Return a dataclass field that is operational: not part of the scientific identity of a run."""
    return dataclasses.field(default=default, metadata={"operational": True})


def later(default: Any) -> Any:
    """Return a scientific dataclass field that stays out of fingerprints at its default.

    It was added when runs had fingerprints already, and its default is what these runs did. A nested dataclass passes
    this on to its fields.
    """
    return dataclasses.field(default=default, metadata={"later": True})


def later_defaults(cls: type, prefix: str = "", nested: bool = False) -> dict[str, Any]:
    """Return dotted name -> default of every field that was made with `later`.

    Args:
      cls: a dataclass.
      prefix: put before the names.
      nested: true for a dataclass all of whose fields count.
    """
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        hint, added = field_types(cls)[field.name], nested or "later" in field.metadata
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            defaults |= later_defaults(hint, f"{prefix}{field.name}.", added)
        elif added:
            defaults[prefix + field.name] = field.default
    return defaults


@dataclasses.dataclass(frozen=True)
class Canonical(NativeScalars):
    """A base of configs that writes equal values alike: in a float field 10000 becomes 10000.0, and -0.0 becomes 0.0.

    Fingerprints hash what is written, so equal configs have equal fingerprints.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, hint in field_types(type(self)).items():
            value = getattr(self, name)
            if float in _kinds(hint) and type(value) in (int, float) and abs(value) <= LARGEST:
                object.__setattr__(self, name, float(value) + 0.0)


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the type of every field of a dataclass, with the conditions of `Annotated` types."""
    return typing.get_type_hints(cls, include_extras=True)


def check_fields(config: Any, prefix: str = "") -> None:
    """Refuse values that their field's type does not allow, in nested configs too.

    Args:
      config: an instance of a dataclass.
      prefix: put before the names of fields in messages, such as "model.".

    Raises:
      UserError: a value of another type, one that is not among a field's choices, a number that is not finite, or one
        that does not meet its field's condition.
    """
    for name, hint in field_types(type(config)).items():
        value = getattr(config, name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, hint):
                raise UserError(f"{prefix}{name}={reprlib.repr(value)} must be a {hint.__name__}")
            check_fields(value, f"{prefix}{name}.")
        else:
            _check(f"{prefix}{name}", value, hint)


def _check(name: str, value: Any, hint: Any) -> None:
    kinds = _kinds(hint)
    if typing.get_origin(kinds[0]) is Literal:
        choices = typing.get_args(kinds[0])
        if value not in choices:
            raise UserError(f"{name}={reprlib.repr(value)} must be one of {', '.join(choices)}")
        return
    accepted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise UserError(f"{name}={reprlib.repr(value)} must be of type {names}")
    number = value if float in kinds and value is not None else None
    if number is not None and not abs(number) <= LARGEST:  # nor NaN
        raise UserError(f"{name}={value} must be a finite number")
    if number and not SMALLEST_32 <= abs(number) <= LARGEST_32:
        raise UserError(f"{name}={value} must be 0, or between {SMALLEST_32:.3g} and {LARGEST_32:.3g} as float32 is")
    notes = getattr(hint, "__metadata__", ())
    advice = "".join(f"; {note.words}" for note in notes if isinstance(note, Hint))
    for condition in notes:
        if not isinstance(condition, Must):
            continue
        if not condition.holds(value):
            raise UserError(f"{name}={value} must {condition.words}{advice}")
        if number is not None and not condition.holds(rounded := _to_float32(number)):
            raise UserError(f"{name}={value} must {condition.words} in float32 too, where it is {rounded:g}{advice}")


def _to_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type, without conditions: (int, NoneType) for `int | None`."""
    bare = hint.__origin__ if typing.get_origin(hint) is Annotated else hint
    is_union = typing.get_origin(bare) in (types.UnionType, typing.Union)
    return typing.get_args(bare) if is_union else (bare,)
