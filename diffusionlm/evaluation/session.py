"""One evaluation: the model, and a record of every item that is finished, which a repeated command takes up."""

import functools
import hashlib
import json
import math
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from etils import epath

from diffusionlm import schema
from diffusionlm.checkpoint import store
from diffusionlm.errors import UserError
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.progress import Progress
from diffusionlm.storage import JsonLines, dump_numbers, read_json_lines, run_path
from diffusionlm.version import __version__

RECORDS_SUFFIX = ".items.jsonl"  # of a file of records, in the place of the .json of the result beside it
Record = dict[str, Any]  # what is kept of one item, in JSON types


class _Header(schema.Record, frozen=True, kw_only=False):
    """The first line of a file of records: what was asked of which parameters."""

    task: str
    version: str  # of this package: another one may ask, grade or count differently
    params_sha256: schema.Sha256
    options: dict[str, Any]


class _Line(schema.Record, frozen=True, kw_only=False):
    """A finished item."""

    sha256: schema.Sha256  # see `_keys`
    seconds: schema.NonNegative  # its share of the time of its batch
    record: dict[str, Any]


class Session:
    """The model under evaluation, and the records of its items.

    A task hands its items to `evaluate`, which computes the missing records batch by batch, shows progress and, after
    `open_records`, writes each record as soon as it exists.

    Attributes:
      model: the model under evaluation.
      seconds: the time that all records took to compute, in this process and in those before it.
    """

    def __init__(self, model: LoadedModel):
        self.model, self.seconds = model, 0.0
        self._path: epath.Path | None = None  # of the records
        self._header: _Header | None = None
        self._lines: JsonLines | None = None  # of the file, which is not made before there is a record
        self._finished: dict[str, _Line] = {}
        self._show: Callable[[float], None] = lambda share: None

    def open_records(self, path: epath.PathLike, task: str, options: Mapping[str, Any], *, resume: bool) -> None:
        """Keep the records in a file of JSON lines, and take up those that it holds.

        Args:
          path: the file.
          task: the name of the task.
          options: its options in JSON types; they must be those of the records in the file.
          resume: take up the records of the file; without it, the file must not exist. The first record makes it.

        Raises:
          UserError: the file exists and `resume` is False, it is of another evaluation, or it is damaged.
        """
        path = run_path(path)
        lines = read_json_lines(path, parse=json.loads)
        if lines and not resume:
            raise UserError(
                f"{path} holds the records of an evaluation; continue it with --resume, give another --output, or "
                "delete this file"
            )
        digest = store.params_sha256(self.model.location.path)
        header = _Header(task, __version__, digest, json.loads(dump_numbers(options)))
        self._path, self._header = path, header
        if lines:
            recorded, finished = _read_lines(path, lines)
            _require_same(path, recorded, header)
            self._finished = {line.sha256: line for line in finished}

    def evaluate(
        self,
        title: str,
        items: Sequence[Any],
        compute: Callable[[list[int]], Sequence[Record]],
        batch_size: int,
        order: Sequence[int] | None = None,
        renew: Callable[[int, Record], Record | None] | None = None,
    ) -> list[Record]:
        """Return the record of every item, in their order.

        Args:
          title: what is done; it is shown with the progress, and tells the steps of a task apart.
          items: in JSON types; a record is taken up for an equal item.
          compute: returns the records of the items with these indices. The record of an item must not depend on the
            others, so that it does not matter where an evaluation was interrupted.
          batch_size: the most items that `compute` is given at a time.
          order: the order in which the items are computed, such as by length; None: theirs.
          renew: given an index and that item's record in the file, returns a record to replace it, or None to keep it;
            for records that depend on something besides the item, such as on how busy the machine was.
        """
        if not items:
            return []
        keys = _keys(title, items)
        finished = {i: self._finished[key] for i, key in enumerate(keys) if key in self._finished}
        records = {i: line.record for i, line in finished.items()}
        self.seconds += math.fsum(line.seconds for line in finished.values())
        missing = [i for i in (range(len(items)) if order is None else order) if i not in records]
        with Progress(title, len(items), len(items) - len(missing)) as progress:
            for i, record in list(records.items()):
                start = time.perf_counter()
                if renew is not None and (renewed := renew(i, record)) is not None:
                    records[i] = renewed
                    seconds = time.perf_counter() - start
                    self.seconds += seconds
                    self._write(_Line(keys[i], finished[i].seconds + seconds, renewed))
            for k in range(0, len(missing), batch_size):
                batch = missing[k : k + batch_size]
                done = len(items) - len(missing) + k
                self._show = functools.partial(_show, progress, done, len(batch))
                start = time.perf_counter()
                computed = compute(batch)
                seconds = (time.perf_counter() - start) / len(batch)
                for i, record in zip(batch, computed, strict=True):
                    records[i] = record
                    self.seconds += seconds
                    self._write(_Line(keys[i], seconds, record))
                progress.update(done + len(batch), "")
        return [records[i] for i in range(len(items))]

    def show(self, share: float) -> None:
        """Show that this share of the batch that is computed is done; for batches that take minutes."""
        self._show(share)

    def _write(self, line: "_Line") -> None:
        if self._path is None:
            return
        if self._lines is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = JsonLines(self._path, parse=json.loads)
            if not self._lines.kept:
                self._lines.write(msgspec.to_builtins(self._header))
        self._lines.write(msgspec.to_builtins(line))

    def checkpoint_json(self) -> dict[str, Any]:
        """Return the checkpoint, newer steps that were passed over, and the hash of its parameters."""
        location = self.model.location
        return location.to_json() | {"params_sha256": store.params_sha256(location.path)}

    def close(self) -> None:
        """Write what a bucket's object does not hold yet."""
        if self._lines is not None:
            self._lines.flush()


def read_records(path: epath.Path) -> dict[str, Record]:
    """Return the records of a file by the hashes of their items.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    lines = read_json_lines(path, parse=json.loads)
    if not lines:
        raise UserError(f"{path} is not there or empty; it has the records of the result beside it")
    return {line.sha256: line.record for line in _read_lines(path, lines)[1]}


def _show(progress: Progress, done: int, size: int, share: float) -> None:
    """Move the bar to a share of the batch of `size` items that follows those done."""
    if share < 1:  # the end of a batch is shown when its records are written
        progress.update(done + int(share * size), f"{share:.0%} of a batch of {size}")


def _keys(title: str, items: Sequence[Any]) -> list[str]:
    """Return a hash for each item, of what is done and the item; equal items are counted."""
    texts = [json.dumps(item) for item in items]
    counts, keys = Counter[str](), []
    for text in texts:
        keys.append(hashlib.sha256(json.dumps([title, text, counts[text]]).encode()).hexdigest())
        counts[text] += 1
    return keys


def _read_lines(path: epath.Path, lines: Sequence[dict[str, Any]]) -> tuple[_Header, list[_Line]]:
    """Return the parsed lines of a file of records, of which there is at least one."""
    first, *others = lines
    header = schema.convert(first, _Header, f"{path}, line 1")
    return header, [schema.convert(line, _Line, f"{path}, line {number}") for number, line in enumerate(others, 2)]


def _require_same(path: epath.Path, recorded: _Header, asked: _Header) -> None:
    """Raise `UserError` unless a file of records is of the evaluation that is asked for."""
    start = f"{path} holds the records of another evaluation: "
    fix = "; give another --output, or delete this file"
    if recorded.task != asked.task:
        raise UserError(f"{start}of the task {recorded.task!r}, not {asked.task!r}{fix}")
    if recorded.version != asked.version:
        raise UserError(f"{start}of diffusionlm {recorded.version}, and this is {asked.version}{fix}")
    if recorded.params_sha256 != asked.params_sha256:
        raise UserError(f"{start}of a checkpoint with other parameters{fix}")
    if changes := _changes(recorded.options, asked.options):
        before, now = (", ".join(f"{name}={json.dumps(pair[k])}" for name, pair in changes.items()) for k in (0, 1))
        again = " and ".join(_again(name, value, name in recorded.options) for name, (value, _) in changes.items())
        raise UserError(
            f"{path} holds an evaluation with {before}, and this command has {now}; {again}, or give another --output"
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return both values of each option that differs, those of settings by the names that they have as options."""
    changes: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*before, *now}):
        first, second = before.get(name), now.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            changes |= _changes(first, second)
        elif first != second:
            changes[name] = (first, second)
    return changes


def _again(name: str, value: Any, may_be_flag: bool) -> str:
    """Say how an option gets the value that it had in the records; truth values of settings are no flags."""
    if value is None or (value is False and may_be_flag):
        return f"leave out --{name}"
    return f"set --{name}" if value is True and may_be_flag else f"set --{name} {shlex.quote(str(value))}"
