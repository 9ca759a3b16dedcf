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
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from etils import epath

from diffusionlm import schema, untrusted
from diffusionlm.errors import UserError, suggest
from diffusionlm.scaling.sweep.results import OBJECTIVES, CellResult
from diffusionlm.storage import run_path

Unit = Literal["nats", "bits"]

REQUIRED = ("objective", "params", "tokens", "loss")
ALIASES = {"budget": "budget_flops"}
UNFLAGGED = "unflagged"
USED = (UNFLAGGED, "synthetic", "no_budget")  # flags of rows that are used unless others are asked for
_TEXTS = ("objective", "source", "corpus", "flag")

_Real = Annotated[float, msgspec.Meta(gt=0, lt=1e60)]
_Number = Annotated[float, msgspec.Meta(ge=1, lt=9e18)]


class Point(schema.Record, frozen=True):
    """A row: the schema of the columns; others are ignored."""

    objective: str
    params: _Number
    tokens: _Number
    loss: _Real | None  # nats per token; None where the run has no finite one
    budget_flops: _Real | None = None
    flops: _Real | None = None
    seed: schema.Count | None = None
    source: str = ""
    corpus: str = ""
    flag: str = ""


class Row(NamedTuple):
    """A point and where it is: the number of its line in a file, or of its row in a table."""

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
    unit: str  # what a row is called: line or row
    header: tuple[str, ...]  # the comments at the top
    columns: frozenset[str]
    rows: tuple[Row, ...]

    def at(self, numbers: Iterable[int]) -> str:
        """Return the place of rows for a message: "points.csv lines 3 and 7", at most four of them."""
        return self.name + " " + _numbered(self.unit, sorted(numbers))


def is_points(source: object) -> bool:
    """Return True for what `read` takes rather than a sweep: a .csv file or a mapping of columns."""
    if isinstance(source, str | os.PathLike):
        return PurePath(os.fspath(source)).suffix.lower() == ".csv"
    return _is_columns(source)


def read(source: epath.PathLike | Mapping[str, Any], unit: Unit = "nats") -> Table:
    """Read points, and check every row.

    Args:
      source: a CSV file whose first lines may be comments that begin with #, or a mapping of columns, such as a data
        frame of pandas. Columns: objective, params, tokens, loss; budget_flops (or budget), flops, seed, source,
        corpus and flag are optional, and others are ignored.
      unit: the unit of the losses per token; bits become nats.

    Raises:
      UserError: a column is missing, a value is of another type or out of its range, or there is no row.
    """
    if unit not in ("nats", "bits"):
        raise UserError(f"unit={unit!r} must be 'nats' or 'bits', per token")
    if isinstance(source, str | os.PathLike):
        name, word = untrusted.printable(os.fspath(source)), "line"
        header, columns, lines = _of_csv(source, name)
    elif _is_columns(source):
        name, word, header = "the table", "row", ()
        columns, lines = _of_columns(source)
    else:
        raise UserError(f"points must be a CSV file or a mapping of columns, not {type(source).__name__}")
    _check_columns(columns, name)
    rows = tuple(_row(number, values, f"{name} {word} {number}", unit) for number, values in lines)
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
    columns = {ALIASES.get(name, name): list(source[name]) for name in names}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"the columns of a table must be of one length, not {lengths}")
    rows = zip(*columns.values(), strict=True)
    return [ALIASES.get(name, name) for name in names], (
        (number, dict(zip(columns, map(_plain, cells), strict=True))) for number, cells in enumerate(rows)
    )


def _plain(value: Any) -> Any:
    """Return a value of an array or of a data frame as a plain one, with "" for a missing one."""
    value = value.item() if hasattr(value, "item") else value
    missing = value is None or (isinstance(value, float) and math.isnan(value)) or type(value).__name__ == "NAType"
    return "" if missing else value


def _check_columns(columns: Sequence[str], name: str) -> None:
    for column in REQUIRED:
        if column not in columns:
            raise UserError(f"{name} has no column {column!r}{_near(column, columns)}; needed: {', '.join(REQUIRED)}")
    for column in Point.__struct_fields__:
        if columns.count(column) > 1:
            raise UserError(f"{name} has two columns {column!r}; keep one of them (budget is the same as budget_flops)")


def _near(column: str, columns: Sequence[str]) -> str:
    if spelled := [other for other in columns if other.lower() == column]:
        return f"; did you mean {spelled[0]!r}?"
    return suggest(column, filter(None, columns)).replace("; known:", "; it has:")


def _row(number: int, values: Mapping[str, Any], where: str, unit: Unit) -> Row:
    """Return a row as its point, whose loss is in nats; raise `UserError` for what the schema refuses."""
    plain: dict[str, Any] = {}
    for column in Point.__struct_fields__:
        value = values.get(column, "")
        if column in _TEXTS:
            plain[column] = str(value)
        elif value != "":
            plain[column] = _number(value, whole=column == "seed")
    plain["objective"] = _objective(plain["objective"], where)
    for column in ("params", "tokens"):
        if column not in plain:
            raise UserError(f"{where}: {column} is empty; every run needs its {', '.join(REQUIRED[1:])}")
    loss = plain.get("loss")
    finite = isinstance(loss, str) or (loss is not None and math.isfinite(loss))
    point = schema.convert(plain | {"loss": loss if finite else None}, Point, where)
    if unit == "bits" and point.loss is not None:
        point = msgspec.structs.replace(point, loss=point.loss * math.log(2))
    return Row(number, point)


def _number(value: Any, *, whole: bool) -> Any:
    """Return text as the number that it spells, or as it is, for the schema to refuse."""
    if isinstance(value, bool):
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return value if isinstance(value, str) else str(value)
    return int(number) if whole and number.is_integer() else number


def _objective(text: str, where: str) -> str:
    name = text.lower()
    if name not in OBJECTIVES:
        raise UserError(f"{where}: unknown objective {untrusted.printable(repr(text))}{suggest(name, OBJECTIVES)}")
    return name


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
        id=f"{PurePath(table.name).name} {table.unit} {row.number}",
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
