"""Metrics of a run: `metrics.jsonl` for programs, TensorBoard events for people."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from etils import epath
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends one JSON object a logged step to WORKDIR/metrics.jsonl, and its numbers to WORKDIR/events.

    Lines after `restored_step` belong to work that the restored checkpoint does not contain; they are cut off.
    """

    def __init__(self, workdir: epath.Path, restored_step: int):
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read(workdir) if line["step"] <= restored_step]
        self.latest = {name: value for line in kept for name, value in line.items()}  # what earlier processes wrote
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        # Files are named by the second; the suffix keeps a quick resume from overwriting what it goes on from.
        self._events = SummaryWriter(
            str(workdir / "events"), purge_step=restored_step + 1, filename_suffix=f".{restored_step}"
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        with self._path.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of WORKDIR/metrics.jsonl; a last line that a kill cut short is left out."""
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is empty or cut short


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a file that readers see whole or not at all."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    temporary.write_text(text)
    temporary.replace(path)


class StepLog:
    """Turns the metrics of single steps into the lines of metrics.jsonl: one every `every` steps, and one at the last.

    Each line has step, tokens, loss (nats/token), cross_entropy and grad_norm (means over the steps since the line
    before or, after it, since the resume), lr, tokens_per_second, step_seconds, mfu (where the chip's peak is known),
    seconds (of the run, resumed parts included) and goodput (the share of them that went into training steps). Time
    spent in `paused` is not the steps'.
    """

    def __init__(
        self,
        writer: MetricsWriter | None,
        *,
        every: int,
        last_step: int,
        tokens_per_step: int,
        flops_per_step: int,
        peak_flops: float | None,
    ):
        self._writer, self._every, self._last_step = writer, every, last_step
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_step, peak_flops
        self._sums: dict[str, float] = {}
        self._count = 0
        self._started = self._clock = time.monotonic()
        self._paused = 0.0
        before = writer.latest if writer else {}
        self._seconds_before = before.get("seconds", 0.0)
        self._in_steps = self._seconds_before * before.get("goodput", 0.0)  # seconds, those before a resume included
        self.last_loss: float | None = before.get("loss")
        self.note = ""

    @property
    def seconds(self) -> float:
        """Seconds of the run so far, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._started

    @property
    def goodput(self) -> float:
        """The share of `seconds` that went into training steps."""
        return self._in_steps / max(self.seconds, 1e-9)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writer:
            self._writer.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Work that is not the training step's: compilation, evaluation, saving."""
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes in one step's metrics, and writes a line where one is due."""
        for name in ("loss", "cross_entropy", "grad_norm"):
            self._sums[name] = self._sums.get(name, 0.0) + float(metrics[name])
        self._count += 1
        if step % self._every == 0 or step == self._last_step:
            self._write(step, float(metrics["lr"]))

    def _write(self, step: int, lr: float) -> None:
        now = time.monotonic()
        spent = max(now - self._clock - self._paused, 1e-9)
        self._in_steps += spent
        rate = self._count / spent
        values = {name: total / self._count for name, total in self._sums.items()}
        values |= {"tokens": step * self._tokens, "lr": lr, "tokens_per_second": rate * self._tokens}
        values |= {"step_seconds": 1 / rate, **self._times()}
        if self._peak:
            values["mfu"] = rate * self._flops / self._peak
        self.last_loss = values["loss"]
        self.note = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tok/s"
        if self._writer:
            self._writer.write(step, values)
        self._sums, self._count, self._clock, self._paused = {}, 0, now, 0.0

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Writes a line with an evaluation's results under eval_*."""
        if self._writer:
            line = {f"eval_{name}": value for name, value in values.items()}
            self._writer.write(step, line | {"tokens": step * self._tokens, **self._times()})

    def _times(self) -> dict[str, float]:
        return {"seconds": self.seconds, "goodput": self.goodput}
