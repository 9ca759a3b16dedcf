"""JSON that is read is of its type, whole, or it is refused with the field, its value and what is allowed."""

import json

import pytest

from diffusionlm import schema
from diffusionlm.errors import UserError


class Inner(schema.Record, frozen=True):
    size: schema.Positive


class Outer(schema.Record, frozen=True):
    name: str
    inner: Inner
    sizes: list[schema.Count] = []


VALID = {"name": "a", "inner": {"size": 1}, "sizes": [0, 2]}


def test_values_of_the_type_are_returned():
    expected = Outer(name="a", inner=Inner(size=1), sizes=[0, 2])
    assert schema.decode(json.dumps(VALID), Outer, "it") == schema.convert(VALID, Outer, "it") == expected


@pytest.mark.parametrize(
    "text, reason",
    [
        (json.dumps(VALID | {"inner": {"size": 0}}), "it: inner.size=0: Expected `int` >= 1"),
        (json.dumps(VALID | {"sizes": [0, "\x1b[2J"]}), r"it: sizes[1]='\x1b[2J': Expected `int`, got `str`"),
        (json.dumps(VALID | {"nam": 1}), "it: Object contains unknown field `nam`; did you mean 'name'?"),
        (json.dumps({"name": "a"}), "it: Object missing required field `inner`"),
        (json.dumps(VALID | {"name": ["x" * 999]}), "it: name=['" + "x" * 58 + "...: Expected `str`, got `array`"),
        ('{"name": "a", "inner": {"size": 1, "size": 2}}', "it: the field 'size' comes twice in one object"),
        ('{"name": "a", "inner": {"size": 1}, "sizes": [-0]}', "it: -0 is no integer"),
        ('{"name": "a", "inner": {"size": NaN}}', "it: JSON is malformed"),
        ("", "it: Input data was truncated"),
        ("[" * 100_000, "it: "),
    ],
)
def test_a_refusal_is_one_line_with_the_field_and_its_value(text, reason):
    with pytest.raises(UserError) as caught:
        schema.decode(text, Outer, "it")
    message = str(caught.value)
    assert message.startswith(reason) and "\n" not in message and "\x1b" not in message and len(message) < 200


def test_bytes_that_are_not_utf_8_are_refused():
    with pytest.raises(UserError, match="^it: "):
        schema.decode(b'{"name": "\xff", "inner": {"size": 1}}', Outer, "it")
