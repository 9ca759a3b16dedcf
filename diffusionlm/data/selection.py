"""Which documents of a source are taken, and which fields their texts are made of."""

import contextlib
import hashlib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffusionlm.data import fields
from diffusionlm.data.items import Item, read_text, record_of
from diffusionlm.errors import UserError
from diffusionlm.scalars import real, whole
from diffusionlm.untrusted import printable

SAMPLE_SALT = b"diffusionlm sample\0"  # so that what is sampled and what is held out do not depend on each other
OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(rf"(?P<field>[^=!<>]+?)\s*(?P<operator>{'|'.join(OPERATORS)})\s*(?P<value>.*)", re.DOTALL)


class Selected(NamedTuple):
    """The text of an item, as far as it is taken."""

    text: str  # "": it is empty, or left out
    unread: Sequence[str] = ()  # fields of its record beside the text that hold something
    left_out: str = ""  # the option that leaves it out, such as "min_chars=10"


class Condition(NamedTuple):
    """A condition on a field, such as lang=en or score>=3."""

    field: str
    operator: str  # one of `OPERATORS`
    value: str

    def __str__(self) -> str:
        return f"{self.field}{self.operator}{self.value}"

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Return True if the field of a record is as the condition says; a null equals nothing.

        Numbers are compared as numbers, and so is everything by < and >; other values by their text.

        Raises:
          ValueError: there is no such field, or its value cannot be compared.
        """
        try:
            value = fields.value(record, self.field)
        except KeyError as error:
            raise ValueError(f"{error.args[0]}, which where={str(self)!r} compares") from None
        if value is None:
            return self.operator == "!="
        if isinstance(value, list | dict):
            raise ValueError(
                f"field {self.field!r} is {type(value).__name__}, which where={str(self)!r} cannot compare"
            )
        compare, number = OPERATORS[self.operator], _number(value)
        if self.operator in ("=", "!="):
            if isinstance(value, bool | str):
                return compare(str(value).lower() if isinstance(value, bool) else value, self.value)
            return compare(*(math.nan if side is None else side for side in (number, _number(self.value))))
        if number is None:
            raise ValueError(
                f"field {self.field!r} is {printable(repr(value))[:80]}, no number as where={str(self)!r} asks"
            )
        return compare(number, _number(self.value))


def parse_condition(text: str) -> Condition:
    """Return the condition that an option describes.

    Raises:
      UserError: it is none, or compares with what is no number.
    """
    match = _CONDITION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise UserError(
            f"where={printable(repr(text))} is no condition; write field=value, field!=value or field>=number"
        )
    condition = Condition(match["field"].strip(), match["operator"].replace("==", "="), match["value"])
    if condition.operator not in ("=", "!=") and _number(condition.value) is None:
        raise UserError(
            f"where={printable(repr(text))} compares with {condition.value!r}, which is no number; give one"
        )
    return condition


@dataclass(frozen=True)
class Selection:
    """The text of a document, and the conditions under which it is taken."""

    text_field: str = "text"  # or a template, see `fields.template`
    where: tuple[Condition, ...] = ()  # all of them
    min_chars: int | None = None
    max_chars: int | None = None
    sample: float | None = None  # fraction of the texts, by a hash

    @classmethod
    def of(
        cls,
        text_field: str = "text",
        where: Sequence[str] = (),
        min_chars: int | None = None,
        max_chars: int | None = None,
        sample: float | None = None,
    ) -> "Selection":
        """Check the options of `prepare` of these names, which describes them.

        Raises:
          UserError: one is not usable.
        """
        fields.template(text_field)
        if isinstance(where, str):
            raise UserError(f"where={where!r} must be a list of conditions; write [{where!r}]")
        conditions = tuple(sorted({parse_condition(text) for text in where}))
        least = None if min_chars is None else whole("min_chars", min_chars, 1)
        most = None if max_chars is None else whole("max_chars", max_chars, 1)
        if least is not None and most is not None and least > most:
            raise UserError(f"min_chars={least} is more than max_chars={most}, so that no document is left; swap them")
        if sample is not None and not 0 < (sample := real("sample", sample)) <= 1:
            raise UserError(f"sample={sample} must lie in (0, 1]; it is the fraction of the documents to take")
        return cls(text_field, conditions, least, most, sample)

    @property
    def columns(self) -> fields.Columns:
        """The fields that are read."""
        texts = fields.names(self.text_field)
        return fields.Columns(texts, tuple(dict.fromkeys(condition.field for condition in self.where)))

    def identity(self) -> dict[str, Any]:
        """Return what leaves documents out, in JSON types, without the field of the text; empty if nothing does."""
        given = {
            "where": [str(condition) for condition in self.where],
            "min_chars": self.min_chars,
            "max_chars": self.max_chars,
            "sample": self.sample,
        }
        return {name: value for name, value in given.items() if value not in (None, [])}

    def read(self, item: Item) -> Selected:
        """Return the text of an item, and why it is left out, if it is.

        Raises:
          ValueError: the item is malformed; the message is the reason.
        """
        if self.where and not item.is_json:
            raise ValueError(f"a text, which has no field, and where={str(self.where[0])!r} compares one")
        if self.where and (record := record_of(item)) is not None:
            for condition in self.where:
                if not condition.holds(record):
                    return Selected("", left_out=f"where={condition}")
        text, unread = read_text(item, self.text_field)
        compared = {condition.field.partition(".")[0] for condition in self.where} if self.where else ()
        unread = [name for name in unread if name not in compared]
        return Selected("", unread, reason) if text and (reason := self._leaves_out(text)) else Selected(text, unread)

    def _leaves_out(self, text: str) -> str:
        if self.min_chars is not None and len(text) < self.min_chars:
            return f"min_chars={self.min_chars}"
        if self.max_chars is not None and len(text) > self.max_chars:
            return f"max_chars={self.max_chars}"
        return f"sample={self.sample}" if self.sample is not None and not is_sampled(text, self.sample) else ""


def is_held_out(text: str, fraction: float) -> bool:
    """Return True if a document belongs to validation, by its text alone: equal documents fall into one split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < fraction * 2**64


def is_sampled(text: str, fraction: float) -> bool:
    """Return True if a text belongs to the sample, by its content alone: of equal texts, all or none do."""
    return int.from_bytes(hashlib.sha256(SAMPLE_SALT + text.encode()).digest()[:8]) < fraction * 2**64


def _number(value: Any) -> int | float | None:
    """Return a value as a number, exactly if it is a whole one; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)
        try:
            value = float(value)
        except ValueError:
            return None
    return None if math.isnan(value) else value
