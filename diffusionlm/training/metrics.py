"""Metrics of a run: `metrics.jsonl` for programs, TensorBoard events for people."""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter

from diffusionlm.storage import JsonLines, in_bucket, read_json_lines
from diffusionlm.training.timeline import Timeline

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends one JSON object a logged step to WORKDIR/metrics.jsonl, and its numbers to WORKDIR/events.

    Lines after `restored_step` belong to work that the restored checkpoint does not contain; they are cut off. Before
    anything is written, `check` may raise.
    """

    def __init__(self, workdir: epath.Path, restored_step: int, check: Callable[[], None] = lambda: None):
        self._workdir, self._check = workdir, check
        self._open(restored_step)

    def cut_back(self, restored_step: int) -> None:
        """Drops the lines after `restored_step`, and goes on from there."""
        self.close()
        self._open(restored_step)

    def _open(self, restored_step: int) -> None:
        self._lines = JsonLines(self._workdir / FILE, lambda line: line["step"] <= restored_step, self._check)
        self.latest = {name: value for line in self._lines.kept for name, value in line.items()}
        self._events = _event_writer(self._workdir / "events", restored_step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._lines.write({"step": step, **values})
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Makes sure that what was written is there for who reads it."""
        self._lines.flush()

    def close(self) -> None:
        try:
            self._lines.flush()
        finally:
            if self._events:
                self._events.close()


def _event_writer(directory: epath.Path, restored_step: int) -> SummaryWriter | None:
    if in_bucket(directory) and not _importable("google.cloud.storage" if "gs://" in str(directory) else "boto3"):
        log.warning("no TensorBoard events in %s: tensorboardX needs google-cloud-storage or boto3 there", directory)
        return None
    # Files are named by the second; the suffix keeps a quick resume from overwriting what it goes on from.
    return SummaryWriter(str(directory), purge_step=restored_step + 1, filename_suffix=f".{restored_step}")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor the package around it
        return False


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of WORKDIR/metrics.jsonl; a last line that a kill cut short is left out."""
    return read_json_lines(epath.Path(workdir) / FILE)


class StepLog:
    """Turns the metrics of single steps into the lines of metrics.jsonl: one every `every` steps, and one at the last.

    Each line has step, tokens, loss (nats/token), cross_entropy and grad_norm (means over the steps since the line
    before or, after it, since the resume), lr, skipped (batches left out so far), tokens_per_second, step_seconds, mfu
    (where the chip's peak is known), seconds and goodput (see `timeline`). A step's metrics come when the next one is
    under way, which makes the rate of a few steps wrong; so the last line's goes back to the line before the last.
    """

    def __init__(
        self,
        writer: MetricsWriter | None,
        timeline: Timeline,
        *,
        every: int,
        last_step: int,
        tokens_per_step: int,
        flops_per_step: int,
        peak_flops: float | None,
    ):
        self._writer, self._timeline, self._every, self._last_step = writer, timeline, every, last_step
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_step, peak_flops
        self.last_loss: float | None = writer.latest.get("loss") if writer else None
        self.note = ""
        self._before: tuple[int, float] | None = None  # of the last line: its steps, and when they began
        self._begin()

    def _begin(self) -> None:
        """A new line begins."""
        self._sums: dict[str, float] = {}
        self._count, self._began = 0, self._timeline.stepping

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        try:
            if self._writer:
                self._writer.close()
        except OSError as error:
            if failure is None:
                raise
            log.warning("cannot write %s: %s", FILE, error)  # and what ended the run is what is raised

    def add(self, step: int, metrics: dict[str, Any], skipped: int = 0) -> None:
        """Takes in one step's metrics, and writes a line where one is due."""
        for name in ("loss", "cross_entropy", "grad_norm"):
            self._sums[name] = self._sums.get(name, 0.0) + float(metrics[name])
        self._count += 1
        if step % self._every == 0 or step == self._last_step:
            self._write(step, float(metrics["lr"]), skipped)

    def _write(self, step: int, lr: float, skipped: int) -> None:
        steps, began = self._count, self._began
        if self._before and step % self._every:
            steps, began = steps + self._before[0], self._before[1]
        rate = steps / max(self._timeline.stepping - began, 1e-9)
        values = {name: total / self._count for name, total in self._sums.items()}
        values |= {"tokens": step * self._tokens, "lr": lr, "skipped": skipped}
        values |= {"tokens_per_second": rate * self._tokens, "step_seconds": 1 / rate, **self._times()}
        if self._peak:
            values["mfu"] = rate * self._flops / self._peak
        self.last_loss = values["loss"]
        self.note = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tok/s"
        if self._writer:
            self._writer.write(step, values)
        self._before = self._count, self._began
        self._begin()

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Writes a line with an evaluation's numbers under eval_*."""
        if self._writer:
            line = {f"eval_{name}": value for name, value in values.items() if not isinstance(value, list)}
            self._writer.write(step, line | {"tokens": step * self._tokens, **self._times()})

    def flush(self) -> None:
        """Makes sure that what was written is there for who reads it."""
        if self._writer:
            self._writer.flush()

    def cut_back(self, step: int) -> None:
        """Drops what was logged of steps after `step`."""
        if self._writer:
            self._writer.cut_back(step)
            self.last_loss = self._writer.latest.get("loss")
        self._before = None
        self._begin()

    def _times(self) -> dict[str, float]:
        return {"seconds": self._timeline.held, "goodput": self._timeline.goodput}
