"""JSON values with one thing changed, for tests of what is believed of a file."""

import copy
from typing import Any, NamedTuple

from hypothesis import strategies as st

Path = tuple[str | int, ...]

# Values of every JSON type, with the ends of the ranges of machine integers, and text that a terminal would obey.
ANY = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 10**6, 10**9, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63), 10**30]),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.sampled_from(["", "0", "1", "same", "true", "é", "\x1b[2J", "../x", "[/b]", "a" * 500]),
    st.sampled_from([[], {}, [1], [[]], {"": 1}, ["x", -1]]),
)


class Mutation(NamedTuple):
    """A changed copy, and where it was changed."""

    values: Any
    path: Path
    kind: str  # value, missing, extra, swapped
    old: Any
    new: Any


def paths(values: Any, prefix: Path = ()) -> list[Path]:
    """Return the path of every value inside `values`, containers included."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path for key, value in items for path in [(*prefix, key), *paths(value, (*prefix, key))]]


def at(values: Any, path: Path) -> Any:
    for key in path:
        values = values[key]
    return values


@st.composite
def mutations(draw, valid: Any, exclude: tuple[str, ...] = ()):
    """A copy of `valid` in which one value is replaced, removed, added, or exchanged with another.

    Args:
      draw: of hypothesis.
      valid: a JSON object.
      exclude: first keys, whose values are free.
    """
    values = copy.deepcopy(valid)
    places = [path for path in paths(valid) if path[0] not in exclude]
    path = draw(st.sampled_from(places))
    parent, key, old = at(values, path[:-1]), path[-1], at(valid, path)
    kind = draw(st.sampled_from(["value", "value", "value", "missing", "extra", "swapped"]))
    new = None
    if kind == "missing":
        del parent[key]
    elif kind == "extra" and isinstance(parent, dict):
        new = draw(ANY)
        parent[f"{key}_"] = new
    elif kind == "swapped":
        other = draw(st.sampled_from(places))
        new = at(valid, other)
        if other[: len(path)] != path and path[: len(other)] != other:
            parent[key] = copy.deepcopy(new)
            at(values, other[:-1])[other[-1]] = copy.deepcopy(old)
    else:
        kind, new = "value", draw(ANY)
        parent[key] = new
    return Mutation(values, path, kind, old, new)
