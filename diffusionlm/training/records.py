"""The files that the first process writes during a run: metrics, events, timeline, DONE.json."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
from etils import epath

from diffusionlm.config import Config
from diffusionlm.errors import UserError
from diffusionlm.ownership.lease import LeaseLost
from diffusionlm.parallel.processes import on_all_processes
from diffusionlm.storage import dump_numbers, write_atomically
from diffusionlm.training.curve import Curve
from diffusionlm.training.fence import Fence
from diffusionlm.training.metrics import MetricsWriter, StepCost, StepLog
from diffusionlm.training.timeline import Timeline
from diffusionlm.training.wandb_run import WandbRun


class Records:
    """The log and the timeline of a run; a context manager that flushes and closes them.

    Only the first process writes. A failure to write must not be raised there alone, where the other processes would
    wait for it: it is kept in `unwritten`, and `require_written` raises it on all of them, before the next checkpoint.
    """

    def __init__(
        self,
        cfg: Config,
        workdir: epath.Path,
        cost: StepCost,
        timeline: Timeline,
        fence: Fence,
        mirror: WandbRun | None = None,
    ):
        self._mirror = mirror
        self._cfg, self._workdir, self._cost, self._timeline = cfg, workdir, cost, timeline
        self._first = jax.process_index() == 0
        self._fence = fence
        self._stack = ExitStack()
        self.curve = Curve(cfg.name, cfg.run.steps, cfg.diffusion.arm_steps)
        self.unwritten: OSError | None = None  # why something could not be written

    @on_all_processes
    def open(self, step: int) -> None:
        """Open the files to continue after `step`; lines of later steps are dropped from metrics.jsonl."""
        run = self._cfg.run
        try:
            self._timeline.open(self._workdir, step, write=self._first, check=self._fence.check)
            self._stack.enter_context(self._timeline)
            mirror = self._stack.enter_context(self._mirror) if self._mirror else None
            check = self._fence.check
            writer = MetricsWriter(self._workdir, step, check, run.steps, mirror) if self._first else None
        except ValueError as error:
            raise UserError(
                f"metrics.jsonl or timeline.jsonl in {self._workdir} has a damaged line ({error}); delete that line"
            ) from error
        self.curve.restart(writer.kept if writer else ())
        settings: dict[str, Any] = {"every": run.log_every, "last_step": run.steps, "curve": self.curve}
        log = StepLog(writer, self._timeline, self._cost, sources=self._cfg.data.sources, **settings)
        self.log = self._stack.enter_context(log)

    def step(self, step: int, metrics: dict[str, float], skipped: int, ends_part: bool = False) -> None:
        """Record that `step` was taken; `skipped` batches were left out so far, and it may end a part of the run."""
        with self._writing():
            self.log.add(step, metrics, skipped=skipped, ends_part=ends_part)
            self._timeline.reach(step)

    def event(self, event: str, step: int, **values: Any) -> None:
        """Record something that happened at `step` in the timeline."""
        with self._writing():
            self._timeline.note(event, step, **values)

    def evaluation(self, step: int, values: dict[str, Any]) -> None:
        """Record the numbers of an evaluation at `step`."""
        with self._writing():
            self.log.evaluation(step, values)

    def alive(self, step: int) -> None:
        """Keep the heartbeat going during work at `step` that takes long."""
        with self._writing():
            self._timeline.reach(step)

    @on_all_processes
    def cut_back(self, step: int) -> None:
        """Drop the metrics of steps after `step`."""
        self.log.cut_back(step)

    @on_all_processes
    def require_written(self) -> None:
        """Raise `UserError` on every process if a line could not be written: no checkpoint may follow a gap."""
        if self.unwritten:
            raise self._failure("write the metrics or the timeline", self.unwritten) from self.unwritten

    def before_checkpoint(self) -> None:
        """Put everything that was recorded on disk, and raise unless it is there and the run is still this worker's."""
        with self._writing():
            self.log.flush()
        self.require_written()
        self._confirm()

    def finish(self, result: dict[str, Any]) -> None:
        """Write DONE.json, which ends the run; a number that is not finite is null there."""
        self.require_written()
        self._write_done(dump_numbers(result, indent=2) + "\n")

    @on_all_processes
    def _write_done(self, text: str) -> None:
        if self._first:
            self._confirm_alone()
            write_atomically(self._workdir / "DONE.json", text)

    @on_all_processes
    def _confirm(self) -> None:
        self._confirm_alone()

    def _confirm_alone(self) -> None:
        try:
            self._fence.confirm()
        except OSError as error:
            raise self._failure("renew the lease", error) from error

    def _failure(self, action: str, error: OSError) -> UserError:
        if isinstance(error, LeaseLost):
            return UserError(f"{error}; this process writes no more there")
        return UserError(
            f"cannot {action} in {self._workdir}: {error}; when that is fixed, the same command resumes from the "
            "newest checkpoint"
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.unwritten = self.unwritten or error

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *failure: Any) -> None:
        self._stack.__exit__(*failure)
