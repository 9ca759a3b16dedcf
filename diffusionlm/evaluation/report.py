"""Tables that compare the results of evaluations, with the errors of their differences."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from diffusionlm import schema, templates
from diffusionlm.errors import UserError
from diffusionlm.evaluation.results import Metric, mean_difference
from diffusionlm.evaluation.session import RECORDS_SUFFIX, Record, read_records
from diffusionlm.storage import run_path
from diffusionlm.untrusted import plain_name


class _Figure(schema.Record, frozen=True):
    value: float | None
    stderr: schema.NonNegative | None


class _File(schema.Record, frozen=True):
    """The file that an evaluation writes with --output; a task may add fields of its own."""

    task: str
    metrics: dict[str, _Figure]
    config: dict[str, Any]
    checkpoint: str
    params_sha256: schema.Sha256
    passed_over: list[str] = []
    forwards: schema.Count | None = None
    seconds: schema.NonNegative | None = None
    records: str | None = None
    examples: list[dict[str, Any]] | None = None
    checks: list[dict[str, Any]] | None = None
    items: dict[str, dict[str, float]] = {}


class Evaluation(NamedTuple):
    """The result of an evaluation, as a file holds it.

    Attributes:
      name: what the tables call it.
      file: its content.
      records: the records of its items, by the hashes of the items; None where there are none.
    """

    name: str
    file: _File
    records: dict[str, Record] | None


class Difference(NamedTuple):
    """Hold the difference of a figure from that of the first result.

    Attributes:
      value: the difference.
      stderr: its standard error; None if it is not known.
      paired: the number of items over which the difference was taken item by item; 0 if the two figures were treated
        as independent.
    """

    value: float
    stderr: float | None
    paired: int


def read(paths: Sequence[epath.PathLike]) -> list[Evaluation]:
    """Return the results of files, in order, with names that tell them apart.

    Raises:
      UserError: a file is missing, no result of an evaluation, or its records are damaged.
    """
    paths = [run_path(path) for path in paths]
    files = [_read_file(path) for path in paths]
    evaluations = []
    for path, file, name in zip(paths, files, _names([str(path) for path in paths]), strict=True):
        records = None
        if file.records is not None:
            records_file = path.with_name(plain_name(file.records, str(path)))
            records = read_records(records_file) if records_file.exists() else None
        evaluations.append(Evaluation(name, file, records))
    return evaluations


def _read_file(path: epath.Path) -> _File:
    """Return the result that a file holds."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give files that `evaluate CHECKPOINT TASK --output FILE` wrote")
    if path.name.endswith(RECORDS_SUFFIX):
        result = f"{str(path).removesuffix(RECORDS_SUFFIX)}.json"
        raise UserError(f"{path} holds the records of an evaluation; give its result, {result}")
    try:
        return schema.read_json(path, _File)
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise UserError(
            f"{path} is no result of an evaluation ({reason}); give the .json that --output wrote"
        ) from error


def _names(paths: Sequence[str]) -> list[str]:
    """Return the shortest endings of paths that differ, without .json."""
    parts = [path.removesuffix(".json").split(os.sep) for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-n:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{paths[0]} is given twice; give each result once")


def difference(name: str, first: Evaluation, other: Evaluation) -> Difference | None:
    """Return how far a metric of `other` is from that of `first`; None where one of them does not have it.

    If the metric is the mean of a field of the records, the difference is taken over the items that both have, whose
    luck they share. Otherwise the figures count as independent.
    """
    a, b = first.file.metrics.get(name), other.file.metrics.get(name)
    if a is None or b is None or a.value is None or b.value is None:
        return None
    pairs = _paired_values(name, first, other)
    if len(pairs) > 1:
        value, stderr = mean_difference([y - x for x, y in pairs])
        return Difference(value, stderr, len(pairs))
    known = a.stderr is not None and b.stderr is not None
    return Difference(b.value - a.value, math.hypot(a.stderr or 0, b.stderr or 0) if known else None, 0)


def _paired_values(name: str, first: Evaluation, other: Evaluation) -> list[tuple[float, float]]:
    """Return a metric's values for the items that both results have; none if it is not a mean over items."""
    a, b = _item_values(name, first), _item_values(name, other)
    return [(value, b[key]) for key, value in a.items() if key in b]


def _item_values(name: str, evaluation: Evaluation) -> dict[str, float]:
    """Return the values whose mean a metric is, by the hashes of their items; none if it is no such mean."""
    records, total = evaluation.records or {}, evaluation.file.metrics[name].value
    values = {key: record[name] for key, record in records.items() if isinstance(record.get(name), int | float)}
    values = evaluation.file.items.get(name) or values
    if not values or total is None:
        return {}
    return values if math.isclose(math.fsum(values.values()) / len(values), total, rel_tol=1e-9) else {}


class Table(NamedTuple):
    """The results of one task."""

    task: str
    header: list[str]
    rows: list[list[str]]
    settings: list[str]  # what differs between the results beside the checkpoint
    seconds: list[str]


def tables(evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return a table for each task, in the order in which the tasks come."""
    tasks = dict.fromkeys(evaluation.file.task for evaluation in evaluations)
    return [_table(task, [e for e in evaluations if e.file.task == task]) for task in tasks]


def _table(task: str, evaluations: Sequence[Evaluation]) -> Table:
    first, *others = evaluations
    header = ["", first.name]
    for other in others:
        header += [other.name, f"{other.name} - {first.name}"]
    rows = []
    for name in dict.fromkeys(name for evaluation in evaluations for name in evaluation.file.metrics):
        row = [name, _figure(first.file.metrics.get(name))]
        for other in others:
            row += [_figure(other.file.metrics.get(name)), _signed(difference(name, first, other))]
        rows.append(row)
    return Table(task, header, rows, _settings(evaluations), [_cost(evaluation) for evaluation in evaluations])


def _figure(figure: _Figure | None) -> str:
    if figure is None or figure.value is None:
        return ""
    return _with_error(Metric(figure.value, figure.stderr), "")


def _with_error(metric: Metric, sign: str) -> str:
    """Return a figure with its error, both with two digits of the error, or the figure with four decimals."""
    value, stderr = metric
    if value == round(value) and not stderr:
        return f"{value:{sign},.0f}"
    if stderr is None or not math.isfinite(stderr):
        return f"{value:{sign}.4f} ± ?"
    if not stderr:
        return f"{value:{sign}.4f}"
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    return f"{value:{sign},.{decimals}f} ± {stderr:.{decimals}f}"


def _signed(change: Difference | None) -> str:
    if change is None:
        return ""
    note = f" ({change.paired:,} pairs)" if change.paired else ""
    return _with_error(Metric(change.value, change.stderr), "+") + note


def _settings(evaluations: Sequence[Evaluation]) -> list[str]:
    """Return in words the options in which the results differ."""
    configs = [evaluation.file.config for evaluation in evaluations]
    names = dict.fromkeys(name for config in configs for name in config)
    different = [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]
    lines = []
    for name in different:
        values = [f"{json.dumps(evaluation.file.config.get(name))} ({evaluation.name})" for evaluation in evaluations]
        lines.append(f"{name}: " + ", ".join(values))
    return lines


def _cost(evaluation: Evaluation) -> str:
    file = evaluation.file
    parts = [f"checkpoint {file.checkpoint} ({file.params_sha256[:12]})"]
    parts += [f"{file.forwards:,} forward passes"] if file.forwards is not None else []
    parts += [f"{file.seconds:,.0f} s"] if file.seconds is not None else []
    return f"{evaluation.name}: " + ", ".join(parts)


def render(evaluations: Sequence[Evaluation], kind: str) -> str:
    """Return the tables as "md", Markdown, or as "html", a page without network or scripts."""
    environment = templates.environment("diffusionlm.evaluation")
    values: Mapping[str, Any] = {"tables": tables(evaluations)}
    if kind == "html":
        return environment.get_template("comparison.html.j2").render(values)
    environment = environment.overlay(autoescape=False)
    environment.filters["cell"] = lambda text: text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
    return environment.get_template("comparison.md.j2").render(values)
