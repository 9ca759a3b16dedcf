"""The metrics of a run: `metrics.jsonl` for programs, TensorBoard events for people."""

import importlib.util
import logging
import math
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh

# The names of protocol buffers are made at import.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter, directory_check

from diffusionlm import flops, hardware
from diffusionlm.config import Config
from diffusionlm.diffusion.objectives import LEVELS, level_names, predicted_share
from diffusionlm.storage import JsonLines, in_bucket, read_json_lines
from diffusionlm.training.curve import Curve
from diffusionlm.training.outcome import MetricsLine
from diffusionlm.training.timeline import Timeline
from diffusionlm.training.wandb_run import WandbRun

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends one JSON object a logged step to WORKDIR/metrics.jsonl, and its numbers to WORKDIR/events.

    Lines after `restored_step` belong to work that the restored checkpoint does not contain; they are cut off. So is
    the evaluation of the last step, which follows its checkpoint and is made again by whoever restores that. A number
    that is not finite is written as null.
    """

    def __init__(
        self,
        workdir: epath.Path,
        restored_step: int,
        check: Callable[[], None] = lambda: None,
        last_step: int | None = None,
        mirror: WandbRun | None = None,
    ):
        """Open the files to continue after `restored_step`.

        Before each write `check` is called, which may raise; `mirror` gets the lines too.
        """
        self._mirror = mirror
        self._workdir, self._last_step, self._check = workdir, last_step, check
        self._open(restored_step)

    def cut_back(self, restored_step: int) -> None:
        """Drop the lines after `restored_step`, and continue from there."""
        self.close()
        self._open(restored_step)

    def _open(self, restored_step: int) -> None:
        def keep(line: dict[str, Any]) -> bool:
            repeated = line["step"] == self._last_step and "eval_nelbo_nats_per_token" in line
            return line["step"] <= restored_step and not repeated

        self._lines = JsonLines(self._workdir / FILE, keep, self._check, MetricsLine)
        self.kept: list[dict[str, Any]] = list(self._lines.kept)  # those from before
        self.latest = {name: value for line in self._lines.kept for name, value in line.items()}
        self._events = _event_file(self._workdir / "events", restored_step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append a line with `step` and `values`."""
        self._lines.write({"step": step, **values})
        if self._events:
            self._events.write(step, values)
        if self._mirror:
            self._mirror.log(step, values)

    def flush(self) -> None:
        """Make what was written visible to readers."""
        self._lines.flush()
        if self._events:
            self._events.flush()

    def close(self) -> None:
        """Flush and close the files."""
        try:
            self._lines.flush()
        finally:
            if self._events:
                self._events.close()


class EventFile:
    """A file of TensorBoard events, one a logged step.

    tensorboardX's own SummaryWriter hands events to a thread; on a full disk the thread dies, and its queue then blocks
    the run for ever. Here errors are raised where the event is written.
    """

    FLUSH_SECONDS = 60.0  # in a bucket the whole object is uploaded again

    def __init__(self, directory: epath.Path, restored_step: int):
        """Begin a file; TensorBoard then hides the events of other files after `restored_step`."""
        directory_check(str(directory))
        # Files are named by the second; the suffix keeps a quick resume from overwriting the file before it.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{restored_step}"
        self._records = RecordWriter(str(directory / name))
        self._flushed = time.monotonic()
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=restored_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append the numbers of a step."""
        numbers = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=numbers)))
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make what was written visible to readers."""
        self._records.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        self._records.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())


def _event_file(directory: epath.Path, restored_step: int) -> EventFile | None:
    if in_bucket(directory) and not _importable("google.cloud.storage" if "gs://" in str(directory) else "boto3"):
        log.warning("no TensorBoard events in %s: tensorboardX needs google-cloud-storage or boto3 there", directory)
        return None
    return EventFile(directory, restored_step)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing too
        return False


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Return the lines of WORKDIR/metrics.jsonl, without a last line that a kill cut short; null is NaN."""
    return read_json_lines(epath.Path(workdir) / FILE, MetricsLine)


class StepCost(NamedTuple):
    """The work of one training step."""

    tokens: int  # that the model sees
    flops: int  # by the "model" convention of `flops`
    credited_flops: int  # the same with the head on predicted positions alone, for MFU
    peak_flops: float | None  # of all devices together, FLOP/s; None where the chip is unknown
    arm_steps: int = 0  # steps that are autoregressive at first

    def credited(self, step: int) -> int:
        """Return the FLOPs of step `step` (1-based) that MFU credits: all, where every position is predicted."""
        return self.flops if step <= self.arm_steps else self.credited_flops


def step_cost(cfg: Config, mesh: Mesh) -> StepCost:
    """Return the cost of a training step of `cfg` on `mesh`."""
    size, length = cfg.data.batch_size, cfg.data.sequence_length
    share = predicted_share(cfg)
    chip = hardware.peak_flops(mesh.devices.flat[0].device_kind)
    return StepCost(
        tokens=size * length,
        flops=size * flops.train(cfg.model, length, "model"),
        credited_flops=size * flops.train(cfg.model, length, "model", predicted=share),
        peak_flops=chip * mesh.size if chip else None,
        arm_steps=cfg.diffusion.arm_steps,
    )


def by_level(levels_2xG: np.ndarray) -> dict[str, float]:
    """Return the mean cross-entropy of masked tokens by the share of tokens that were masked, where there were any.

    Args:
      levels_2xG: nats and counts of masked tokens at each level of noise.
    """
    return {
        f"cross_entropy/{name}": float(nats / tokens)
        for name, nats, tokens in zip(level_names(), *levels_2xG, strict=True)
        if tokens
    }


def by_source(names: Sequence[str], sources_2xS: np.ndarray) -> dict[str, float]:
    """Return the loss of the rows of each source alone, where there were any.

    Args:
      names: of the sources.
      sources_2xS: the parts of each source in the losses of some steps, and in what these are means over.
    """
    return {f"loss/{name}": float(part / share) for name, part, share in zip(names, *sources_2xS, strict=True) if share}


class StepLog:
    """Turns the metrics of single steps into the lines of metrics.jsonl.

    There is one line every `every` steps, one at the last step, and one at the last step of a part of the run.

    Each line has step, tokens, loss (nats/token), cross_entropy and grad_norm (means over the steps since the line
    before or, after it, since the resume), cross_entropy/0.0-0.1 and so on of a diffusion model (the same by the share
    of tokens that were masked), loss/NAME of each source of a mixture (the loss of its rows alone), lr, skipped
    (batches left out so far), tokens_per_second, step_seconds, mfu (where the chip's peak is known), seconds and
    goodput (see `timeline`). A step's metrics arrive when the next one is in flight, which makes the rate of a few
    steps wrong; so the rate of the last line goes back to the line before.
    """

    def __init__(
        self,
        writer: MetricsWriter | None,
        timeline: Timeline,
        cost: StepCost,
        *,
        every: int,
        last_step: int,
        curve: Curve | None = None,
        sources: Sequence[str] = (),
    ):
        """Log to `writer` (None: only keep the note) and `curve`, with the times that `timeline` measures.

        `sources` are the names of those of a mixture.
        """
        self._names = sources
        self._writer, self._timeline, self._cost = writer, timeline, cost
        self._curve = curve or Curve("", last_step)
        self._every, self._last_step = every, last_step
        self.last_loss: float = writer.latest.get("loss", math.nan) if writer else math.nan
        self.note = ""  # the last line in short, for a progress bar
        self._before: tuple[int, float] | None = None  # the last line: its steps, and when they began
        self._begin()

    def _begin(self) -> None:
        self._sums: dict[str, float] = {}
        self._levels: np.ndarray = np.zeros((2, LEVELS))
        self._sources: np.ndarray = np.zeros((2, len(self._names)))
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
            log.warning("cannot write %s: %s", FILE, error)  # what ended the run is raised instead

    def add(self, step: int, metrics: dict[str, Any], skipped: int = 0, ends_part: bool = False) -> None:
        """Add the metrics of one step, and write a line where one is due, as at the end of a part of the run."""
        for name in ("loss", "cross_entropy", "grad_norm"):
            self._sums[name] = self._sums.get(name, 0.0) + float(metrics[name])
        if "levels" in metrics:
            self._levels = self._levels + np.asarray(metrics["levels"], np.float64)
        if "sources" in metrics:
            self._sources = self._sources + np.asarray(metrics["sources"], np.float64)
        self._count += 1
        if step % self._every == 0 or step == self._last_step or ends_part:
            self._write(step, float(metrics["lr"]), skipped)

    def _write(self, step: int, lr: float, skipped: int) -> None:
        steps, began = self._count, self._began
        if self._before and step % self._every:
            steps, began = steps + self._before[0], self._before[1]
        rate = steps / max(self._timeline.stepping - began, 1e-9)
        values = {name: total / self._count for name, total in self._sums.items()}
        values |= by_level(self._levels) | by_source(self._names, self._sources)
        values |= {"tokens": step * self._cost.tokens, "lr": lr, "skipped": skipped}
        values |= {"tokens_per_second": rate * self._cost.tokens, "step_seconds": 1 / rate, **self._times()}
        if self._cost.peak_flops:
            values["mfu"] = rate * self._cost.credited(step) / self._cost.peak_flops
        self.last_loss = values["loss"]
        self.note = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tok/s"
        self._curve.add(step, values)
        if self._writer:
            self._writer.write(step, values)
        self._before = self._count, self._began
        self._begin()

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Write a line with the numbers of an evaluation under eval_*."""
        line = {f"eval_{name}": value for name, value in values.items() if not isinstance(value, list)}
        self._curve.add(step, line)
        if self._writer:
            self._writer.write(step, line | {"tokens": step * self._cost.tokens, **self._times()})

    def flush(self) -> None:
        """Make what was written visible to readers."""
        if self._writer:
            self._writer.flush()

    def cut_back(self, step: int) -> None:
        """Drop what was logged about steps after `step`."""
        self._curve.cut_back(step)
        if self._writer:
            self._writer.cut_back(step)
            self.last_loss = self._writer.latest.get("loss", math.nan)
        self._before = None
        self._begin()

    def _times(self) -> dict[str, float]:
        return {"seconds": self._timeline.held, "goodput": self._timeline.goodput}
