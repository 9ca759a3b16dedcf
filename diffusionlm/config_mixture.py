"""The mixture of a run as text: prepared datasets with their shares of the rows, and when these shares change.

    slimpajama=0.7,starcoder=0.3
    data/web=1;200000:data/web=0.2,data/code=0.8

A phase is a list of PATH=WEIGHT; every phase but the first begins with the number of its first batch. This module
imports no JAX.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from diffusionlm.errors import UserError

UNITS = 1_000_000  # of which a weight is a whole number: six decimal places
_WEIGHT = re.compile(r"(?:0|1|[01]?\.\d{1,6}|[01]\.)0*")
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
_EXAMPLE = "such as slimpajama=0.7,starcoder=0.3"


class Phase(NamedTuple):
    """Batches with the same shares."""

    start: int  # the first batch
    units: tuple[int, ...]  # of each source; its share is this over their sum

    @property
    def weights(self) -> tuple[float, ...]:
        """The share of each source, which sum to 1."""
        return tuple(unit / sum(self.units) for unit in self.units)


@dataclass(frozen=True)
class MixtureSpec:
    """A mixture as it was asked for: the sources of all phases in the order in which they are first named."""

    paths: tuple[str, ...]  # directories of prepared datasets
    phases: tuple[Phase, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the sources, in metrics and in the fingerprint: the last parts of their paths."""
        return tuple(_label(path) for path in self.paths)

    def phase_of(self, batch: int) -> Phase:
        """Return the phase of a batch."""
        return [phase for phase in self.phases if phase.start <= batch][-1]

    @property
    def canonical(self) -> str:
        """The mixture without the places of its datasets; empty for a single one, which is no mixture."""
        if len(self.paths) == 1:
            return ""
        shown = []
        for phase in self.phases:
            weights = zip(self.labels, phase.units, strict=True)
            listed = ",".join(f"{name}={_decimal(unit)}" for name, unit in weights if unit or not phase.start)
            shown.append(f"{phase.start}:{listed}" if phase.start else listed)
        return ";".join(shown)


@functools.lru_cache(maxsize=64)
def parse(text: str) -> MixtureSpec:
    """Read a mixture.

    Raises:
      UserError: it is not one; a name comes twice, a weight is no share, the weights of a phase do not sum to 1, or the
        phases are not in order.
    """
    shown = f"data.mixture={text!r}"
    starts, phases = [], []
    for number, part in enumerate(text.split(";")):
        found = re.match(r"\s*(\d{1,9}):(.*)", part, re.DOTALL)
        start, listed = (int(found[1]), found[2]) if found else (0, part)
        if bool(found) != bool(number) or (starts and start <= starts[-1]):
            raise UserError(
                f"{shown}: each phase after the first begins with its first batch, and they are in order, such as "
                f"a=1;200000:a=0.2,b=0.8; {part.strip()[:60]!r} does not fit"
            )
        starts.append(start)
        phases.append(_entries(shown, listed))
    paths = tuple(dict.fromkeys(path for phase in phases for path in phase))
    _require_labels(shown, paths)
    units = [tuple(phase.get(path, 0) for path in paths) for phase in phases]
    return MixtureSpec(paths, tuple(Phase(*phase) for phase in zip(starts, units, strict=True)))


def labels(text: str) -> tuple[str, ...]:
    """Return the names of the sources that a run mixes; none for a run on one dataset."""
    names = parse(text).labels if text else ()
    return names if len(names) > 1 else ()


def canonical(text: str) -> str:
    """Return a mixture without the places of its datasets, which may move; what is no mixture stays as it is."""
    try:
        return parse(text).canonical if text else ""
    except UserError:
        return text


def of_size(sources: int) -> str:
    """Return a mixture that stands for all of so many sources; empty for less than two."""
    return ",".join(f"{source}={int(not source)}" for source in range(sources)) if sources > 1 else ""


def agree(one: Sequence[Phase], other: Sequence[Phase], batches: int) -> bool:
    """Return True if two mixtures take the first batches from the same sources, by their places in the mixtures."""

    def shares(phases: Sequence[Phase]) -> list[tuple[int, dict[int, Fraction]]]:
        return [
            (phase.start, {i: Fraction(unit, sum(phase.units)) for i, unit in enumerate(phase.units) if unit})
            for phase in phases
            if phase.start < batches
        ]

    return shares(one) == shares(other)


def _entries(shown: str, listed: str) -> dict[str, int]:
    """Return the units of each path in the text of one phase."""
    units: dict[str, int] = {}
    for entry in listed.split(","):
        path, equals, weight = (word.strip() for word in entry.rpartition("="))
        path = path.rstrip("/")
        if not equals or not path:
            raise UserError(f"{shown}: {entry.strip()[:60]!r} must be PATH=WEIGHT, {_EXAMPLE}")
        if path in units:
            raise UserError(f"{shown} names {path!r} twice in one phase; give each source one weight")
        if not _WEIGHT.fullmatch(weight) or Fraction(weight) > 1:
            raise UserError(
                f"{shown}: the weight of {path!r}, {weight[:30]!r}, must be a share in [0, 1] with at most six decimal "
                f"places, {_EXAMPLE}"
            )
        units[path] = int(Fraction(weight) * UNITS)
    total = sum(units.values())
    if abs(total - UNITS) > 1:
        sums = ", ".join(f"{path}={_decimal(unit)}" for path, unit in units.items())
        fix = "give one of them a positive weight"
        if total:
            fixed = zip(units, _in_proportion(tuple(units.values())), strict=True)
            fix = "in these proportions that is " + ",".join(f"{path}={_decimal(unit)}" for path, unit in fixed)
        raise UserError(f"{shown}: the weights {sums} sum to {_decimal(total)}, not to 1; {fix}")
    return units


def _require_labels(shown: str, paths: tuple[str, ...]) -> None:
    """Refuse two sources with one name, and names that make poor names of metrics."""
    known: dict[str, str] = {}
    for path in paths:
        label = _label(path)
        if not _LABEL.fullmatch(label):
            raise UserError(
                f"{shown}: {label[:60]!r}, the last part of {path[:60]!r}, names a source in metrics, and may have "
                "letters, digits and ._+- alone; rename the directory"
            )
        if label in known:
            raise UserError(
                f"{shown}: {known[label]!r} and {path!r} are both named {label!r}; the last parts of the paths name "
                "the sources, so rename one directory"
            )
        known[label] = path


def _in_proportion(weights: tuple[int, ...]) -> list[int]:
    """Return weights in the same proportions that sum to `UNITS`, by largest remainders."""
    exact = [Fraction(weight * UNITS, sum(weights)) for weight in weights]
    units = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: units[i] - exact[i])
    for i in by_remainder[: UNITS - sum(units)]:
        units[i] += 1
    return units


def _label(path: str) -> str:
    return path.rpartition("/")[2]


def _decimal(units: int) -> str:
    """Return a weight as it is written, without zeros at its end."""
    whole, part = divmod(units, UNITS)
    return f"{whole}.{part:06d}".rstrip("0").rstrip(".")
