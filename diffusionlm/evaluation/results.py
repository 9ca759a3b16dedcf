"""Hold what a task returns: figures with their standard errors, and how they were made."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """A figure with its standard error, which is None if the data are too few for one."""

    value: float
    stderr: float | None = 0.0


@dataclass(frozen=True)
class Result:
    """The outcome of a task.

    Attributes:
      metrics: figures and counts by name.
      config: the settings that gave them, in JSON types.
      examples: what the model wrote, if it was asked for.
      forwards: forward passes of the network for all items, each for one sequence; None where they are not counted.
      seconds: the time that the items took, in all processes that computed some.
      checks: what was checked, each {"name", "verdict", "value", "tolerance", "explanation"} with a verdict of "pass",
        "fail" or "not applicable"; None for tasks without checks.
      notes: sentences for people, which are shown below the figures.
      items: by metric, the value of each item by a name of the item, of metrics that are the mean of such values and
        whose records do not say so under the metric's name; results are compared by them.
    """

    metrics: dict[str, Metric]
    config: dict[str, Any]
    examples: list[dict[str, Any]] | None = None
    forwards: int | None = None
    seconds: float | None = None
    checks: list[dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()
    items: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self, task: str) -> dict[str, Any]:
        """Return {"task", "metrics": {name: {"value", "stderr"}}, "config", "forwards", "seconds"}.

        "examples" is there if they were asked for, and "checks" if the task has some.
        """
        metrics = {name: metric._asdict() for name, metric in self.metrics.items()}
        values = {"task": task, "metrics": metrics, "config": self.config}
        values |= {"forwards": self.forwards, "seconds": self.seconds}
        others = {"examples": self.examples, "checks": self.checks}
        return values | {name: value for name, value in others.items() if value is not None}

    @property
    def failed(self) -> bool:
        """True if a check failed."""
        return any(check["verdict"] == "fail" for check in self.checks or [])


def mean(values: Sequence[float]) -> Metric:
    """Return the mean with its standard error over independent values, which takes at least two."""
    n, average = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Metric(average, None)
    return Metric(average, math.sqrt(math.fsum((value - average) ** 2 for value in values) / (n - 1) / n))


def mean_difference(values: Sequence[float]) -> Metric:
    """Return the mean of paired differences; its standard error is unknown if all are equal."""
    value, stderr = mean(values)
    return Metric(value, stderr or None)


def share(values: Sequence[bool]) -> Metric:
    """Return the share of true values with its standard error over independent ones, which takes at least two.

    A share of 0 or 1 has the length of Wilson's interval (1927) of one standard error, 1 / (n + 1), all of it on
    one side: the spread of equal values would be 0, as if the next one were certain.
    """
    n, figure = len(values), mean([float(value) for value in values])
    if n >= 2 and figure.value in (0, 1):
        return Metric(figure.value, 1 / (n + 1))
    return figure


def means(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Metric]:
    """Return the mean of each field over the records of all items; that of truth values is a share."""
    metrics = {}
    for name in names:
        values = [record[name] for record in records]
        truths = all(isinstance(value, bool) for value in values)
        metrics[name] = share(values) if truths else mean([float(value) for value in values])
    return metrics
