"""Points of other people's sweeps: a CSV file or a table of columns into results that the fits take.

Everything is checked here, once: columns, types, ranges. A mistake is one line that names the file and the row.
`point_checks` has the warnings about points that can be read but are doubtful.
"""

import csv
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

from etils import epath

from diffusionlm import untrusted
from diffusionlm.errors import UserError, suggest
from diffusionlm.scaling.sweep.results import OBJECTIVES, CellResult
from diffusionlm.storage import run_path

Unit = Literal["nats", "bits"]

REQUIRED = ("objective", "params", "tokens", "loss")
ALIASES = {"budget": "budget_flops"}
UNFLAGGED = "unflagged"
USED = (UNFLAGGED, "synthetic", "no_budget")  # flags of rows that are used unless others are asked for
_TEXTS = ("objective", "source", "corpus", "flag")

LINE, RECORD = "line", "record"  # what a row of a file is called, and one of Python
SHOWN = 40  # characters of a refused value in a message


class Point(NamedTuple):
    """A row: the columns that are read; others are ignored."""

    objective: str
    params: float
    tokens: float
    loss: float | None  # nats per token; None where the run has no finite one
    budget_flops: float | None = None
    flops: float | None = None
    seed: int | None = None
    source: str = ""
    corpus: str = ""
    flag: str = ""


class _Range(NamedTuple):
    """The numbers that a column may have, and the same in words."""

    low: float
    high: float
    words: str


_COUNT = _Range(1, 9e18, "a plain number of at least 1, such as 124000000 or 1.24e8, counted one by one")
_FLOPS = _Range(math.ulp(0.0), 1e60, "a plain number above 0, such as 6e18")
_RANGES = {
    "params": _COUNT,
    "tokens": _COUNT,
    "loss": _Range(math.ulp(0.0), 1e60, "a plain number above 0, such as 3.21"),
    "budget_flops": _FLOPS,
    "flops": _FLOPS,
    "seed": _Range(0, 9e18, "a whole number, 0 or more"),
}


class Row(NamedTuple):
    """A point and where it is: the number of its line in a file, or its index in Python."""

    number: int
    point: Point


class LeftOut(NamedTuple):
    """A run that no fit uses, to be shown beside the others."""

    run: CellResult
    reason: str


@dataclass(frozen=True)
class Points:
    """The points of one source and corpus, which are fitted together."""

    name: str  # of its directory and title
    results: tuple[CellResult, ...]
    left_out: tuple[LeftOut, ...]
    warnings: tuple[str, ...]
    context: Mapping[str, str]  # what the points are, for the page


@dataclass(frozen=True)
class Table:
    """All rows of a file or of a mapping of columns."""

    name: str  # of the file
    unit: str  # what a row is called: LINE or RECORD
    header: tuple[str, ...]  # the comments at the top
    columns: frozenset[str]
    rows: tuple[Row, ...]

    def at(self, numbers: Iterable[int]) -> str:
        """Return the place of rows for a message: "points.csv lines 3 and 7", at most four of them."""
        return _numbered(_place(self.name, self.unit), sorted(numbers))


def is_points(source: object) -> bool:
    """Return True for what `read` takes rather than a sweep: a .csv file, a mapping of columns or a list of records."""
    if isinstance(source, str | os.PathLike):
        return PurePath(os.fspath(source)).suffix.lower() == ".csv"
    return _is_columns(source) or isinstance(source, Sequence)


def read(source: epath.PathLike | Mapping[str, Any] | Sequence[Mapping[str, Any]], unit: Unit = "nats") -> Table:
    """Read points, and check every row.

    Args:
      source: a CSV file whose first lines may be comments that begin with #; a mapping of columns, such as a data frame
        of pandas; or a list of mappings, one for each run. Columns: objective, params, tokens, loss; budget_flops (or
        budget), flops, seed, source, corpus and flag are optional, and others are ignored.
      unit: the unit of the losses per token; bits become nats.

    Raises:
      UserError: a column is missing, a value is of another type or out of its range, or there is no row.
    """
    if unit not in ("nats", "bits"):
        raise UserError(f"unit={unit!r} must be 'nats' or 'bits', per token")
    if isinstance(source, str | os.PathLike):
        name, word = untrusted.printable(os.fspath(source)), LINE
        header, columns, lines = _of_csv(source, name)
    else:
        name, word, header = "the table", RECORD, ()
        columns, lines = _of_columns(source) if _is_columns(source) else _of_records(source)
    _check_columns(columns, name)
    rows = tuple(_row(number, values, f"{_place(name, word)} {number}", unit) for number, values in lines)
    if not rows:
        raise UserError(f"{name} has no row below its columns; give a row for each run")
    return Table(name, word, header, frozenset(columns), rows)


def _is_columns(source: object) -> bool:
    return hasattr(source, "keys") and hasattr(source, "__getitem__")


def _of_csv(path: epath.PathLike, name: str) -> tuple[tuple[str, ...], list[str], Iterator[tuple[int, dict]]]:
    """Return the comments, the columns, and an iterator of (line, values by column)."""
    try:
        text = untrusted.read_text(run_path(path)).removeprefix("\ufeff")
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror or error}") from error
    lines = text.splitlines()
    if not any(lines):
        raise UserError(f"{name} is empty; give a line of columns ({', '.join(REQUIRED)} ...) and a line for each run")
    comments = [i for i, line in enumerate(lines) if line.startswith("#")]
    start = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    if start == len(lines):
        raise UserError(f"{name} has nothing but comments; give a line of columns and a line for each run")
    header = tuple(lines[i].lstrip("# ").rstrip() for i in comments if i < start)
    # A comment further down is an empty line, so that the numbers of lines stay right.
    reader = csv.reader(("" if line.startswith("#") else line for line in lines[start:]), strict=True)
    try:
        columns = [ALIASES.get(cell.strip(), cell.strip()) for cell in next(reader)]
    except csv.Error as error:
        raise UserError(f"{name} line {start + 1} is no line of CSV: {error}") from error
    if len(columns) == 1 and (other := next((mark for mark in ";\t" if mark in columns[0]), None)):
        raise UserError(f"{name} line {start + 1}: columns are separated by {other!r}; separate them by commas")
    return header, columns, _lines(reader, columns, name, start)


def _lines(reader: Any, columns: Sequence[str], name: str, start: int) -> Iterator[tuple[int, dict]]:
    while True:
        number = start + reader.line_num + 1  # a cell in quotes may go on in the next line; its row begins here
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{name} line {number} is no line of CSV: {error}") from error
        if not any(cells):
            continue
        if len(cells) != len(columns):
            raise UserError(f"{name} line {number} has {len(cells)} cells, but there are {len(columns)} columns")
        yield number, {column: cell.strip() for column, cell in zip(columns, cells, strict=True)}


def _of_columns(source: Any) -> tuple[list[str], Iterator[tuple[int, dict]]]:
    names = [str(name) for name in source.keys()]  # a data frame is no mapping
    columns = {ALIASES.get(name, name): _column(name, source[name]) for name in names}
    lengths = {name: len(values) for name, values in columns.items()}
    first = next(iter(lengths), "")
    for name, length in lengths.items():
        if length != lengths[first]:
            raise UserError(
                f"the columns of a table must be of one length, but {first!r} has {lengths[first]} values and {name!r} "
                f"has {length}"
            )
    rows = zip(*columns.values(), strict=True)
    return [ALIASES.get(name, name) for name in names], (
        (number, dict(zip(columns, map(_plain, cells), strict=True))) for number, cells in enumerate(rows)
    )


def _column(name: str, values: Any) -> list[Any]:
    """Return a column as a list; raise `UserError` for one value in its place."""
    try:
        if not isinstance(values, str | bytes):
            return list(values)
    except TypeError:  # also of an array without a dimension
        pass
    raise UserError(f"the column {name!r} of the table is {_shown(values)}; give a list with a value for each run")


def _of_records(source: Any) -> tuple[list[str], Iterator[tuple[int, dict]]]:
    """Return the columns that any record has, and an iterator of (index, values by column)."""
    if not isinstance(source, Sequence) or isinstance(source, str | bytes):
        kind = type(source).__name__
        raise UserError(f"points must be a CSV file, a mapping of columns or a list of mappings, not of type {kind}")
    for number, record in enumerate(source):
        if not isinstance(record, Mapping):
            raise UserError(
                f"record {number} is {_shown(record)}; in a list, each run is a mapping with "
                f"{', '.join(REQUIRED)} and so on"
            )
    names = list(dict.fromkeys(str(name) for record in source for name in record))
    if not names:
        raise UserError(f"the table has no row; give each run a mapping with {', '.join(REQUIRED)} and so on")
    return [ALIASES.get(name, name) for name in names], (
        (number, {ALIASES.get(str(name), str(name)): _plain(value) for name, value in record.items()})
        for number, record in enumerate(source)
    )


def _shown(value: Any) -> str:
    """Return a refused value as text for one line, cut where it is long."""
    text = untrusted.printable(repr(value))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _plain(value: Any) -> Any:
    """Return a value of an array or of a data frame as a plain one, with "" for a missing one."""
    value = value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else value
    missing = value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"
    return "" if missing else value


def _check_columns(columns: Sequence[str], name: str) -> None:
    for column in REQUIRED:
        if column not in columns:
            raise UserError(f"{name} has no column {column!r}{_near(column, columns)}; needed: {', '.join(REQUIRED)}")
    for column in Point._fields:
        if columns.count(column) > 1:
            raise UserError(f"{name} has two columns {column!r}; keep one of them (budget is the same as budget_flops)")


def _near(column: str, columns: Sequence[str]) -> str:
    if spelled := [other for other in columns if other.lower() == column]:
        return f"; did you mean {spelled[0]!r}?"
    others = [other for other in columns if other and other not in Point._fields]  # which are what they say
    close = suggest(column, others) if others else ""
    return close if "did you mean" in close else f"; it has: {', '.join(sorted(filter(None, columns)))}"


def _row(number: int, values: Mapping[str, Any], where: str, unit: Unit) -> Row:
    """Return a row as its point, whose loss is in nats; raise `UserError` for a value that its column cannot have."""
    cells: dict[str, Any] = {column: str(values.get(column, "")) for column in _TEXTS}
    cells["objective"] = _objective(cells["objective"], where)
    for column, allowed in _RANGES.items():
        value = values.get(column, "")
        cells[column] = None if isinstance(value, str) and value == "" else _number(column, value, allowed, where)
    for column in ("params", "tokens"):
        if cells[column] is None:
            raise UserError(f"{where}: {column} is empty; every run needs its {', '.join(REQUIRED[1:])}")
    if unit == "bits" and cells["loss"] is not None:
        cells["loss"] *= math.log(2)
    return Row(number, Point(**cells))


def _number(column: str, value: Any, allowed: _Range, where: str) -> float | int | None:
    """Return a value as a number that its column can have; a loss that is not finite is None."""
    number, whole = _parsed(value), column == "seed"
    if column == "loss" and number is not None and not math.isfinite(number):
        return None
    if number is None or not allowed.low <= number < allowed.high or (whole and not number.is_integer()):
        raise UserError(f"{where}: {column}={_shown(value if number is None else number)} must be {allowed.words}")
    return int(number) if whole else number


def _parsed(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _objective(text: str, where: str) -> str:
    name = text.lower()
    if name not in OBJECTIVES:
        raise UserError(f"{where}: unknown objective {_shown(text)}{suggest(name, OBJECTIVES)}")
    return name


def _place(name: str, word: str) -> str:
    """Return what comes before the number of a row: "points.csv line" or "record"."""
    return word if word == RECORD else f"{name} {word}"


def _numbered(word: str, numbers: Sequence[int]) -> str:
    shown = [str(number) for number in numbers[:4]]
    more = f" and {len(numbers) - 4:,} more" if len(numbers) > 4 else ""
    if len(numbers) == 1:
        return f"{word} {shown[0]}"
    return f"{word}s {', '.join(shown)}{more}" if more else f"{word}s {', '.join(shown[:-1])} and {shown[-1]}"


def result_of(row: Row, table: Table) -> CellResult:
    """Return a point as a result; what is not known of it is NaN or empty."""
    point = row.point
    params, tokens = round(point.params), round(point.tokens)
    return CellResult(
        id=f"{_place(PurePath(table.name).name, table.unit)} {row.number}",
        objective=point.objective,
        preset=_size(params),
        seed=point.seed or 0,
        budget=point.budget_flops or math.nan,
        flops=point.flops or point.budget_flops or 6.0 * params * tokens,
        params=params,
        params_non_embedding=params,
        tokens=tokens,
        unique_tokens=tokens,
        steps=1,
        loss=math.nan if point.loss is None else point.loss,
        loss_stderr=math.nan,
        loss_per_draw=(),
        bits_per_byte=math.nan,
        curve=(),
    )


def _size(params: int) -> str:
    for power, letter in ((9, "G"), (6, "M"), (3, "k")):
        if params >= 10**power:
            return f"{params / 10**power:.3g}{letter}"
    return str(params)


def without_budget(result: CellResult) -> CellResult:
    """Return a result that belongs to no budget."""
    return replace(result, budget=math.nan)
