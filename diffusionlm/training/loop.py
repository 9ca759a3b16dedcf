"""A training run, top to bottom: join, prepare, restore, step, log, evaluate, save.

Everything that a run writes lies in its run directory: config.json, environment.json, metrics.jsonl, timeline.jsonl,
heartbeat, events/, checkpoints/, profile/ and, when it is done, DONE.json. Calling `train` again with the same
directory goes on where the newest checkpoint stands.
"""

import functools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from diffusionlm import config_io, flops, hardware
from diffusionlm.checkpoint.store import CheckpointManager, Sidecar
from diffusionlm.config import Config
from diffusionlm.data.pipeline import Dataset, eval_batches, train_batches
from diffusionlm.diffusion import schedules
from diffusionlm.diffusion.objectives import predicted_share
from diffusionlm.errors import UserError
from diffusionlm.parallel import processes as runtime
from diffusionlm.parallel import signals
from diffusionlm.parallel.mesh import check_batch, global_array, local_rows, make_mesh
from diffusionlm.progress import Progress
from diffusionlm.registry import experiments
from diffusionlm.storage import run_path, write_atomically
from diffusionlm.training import dataset as datasets
from diffusionlm.training import start as initial
from diffusionlm.training.metrics import MetricsWriter, StepLog
from diffusionlm.training.profiler import Profiler
from diffusionlm.training.programs import make_eval_step, make_train_step
from diffusionlm.training.run_directory import finished, record_run, refuse_another_run, require_same_command
from diffusionlm.training.state import TrainState, abstract_state, create_state
from diffusionlm.training.timeline import Timeline
from diffusionlm.version import __version__


@dataclass(frozen=True)
class Run:
    """Where a run stands when `train` returns."""

    workdir: epath.Path
    config: Config
    step: int  # optimizer steps taken
    result: dict[str, Any] | None  # the content of DONE.json; None if it was stopped before the end

    @property
    def done(self) -> bool:
        return self.result is not None


class DivergenceError(FloatingPointError):
    """A batch was bad, and `SafetyConfig` allows no further way on; it says which state has been saved."""


class Fence(Protocol):
    """Stands between a run and its directory where other workers may take it over, as those of a sweep."""

    def check(self) -> None:
        """Raises `OSError` where the run is known to be another's by now; it precedes every line that is written."""

    def confirm(self) -> None:
        """Asks, and raises `OSError` where the run is another's; it precedes every checkpoint, and DONE.json."""


class _Alone:
    """The fence around a directory that is this run's alone."""

    def check(self) -> None:
        pass

    confirm = check


def train(cfg: Config | str, workdir: epath.PathLike | None = None, *, fence: Fence | None = None) -> Run:
    """Trains `cfg` in `workdir` (default: runs/NAME), or goes on with the run that is there.

    On several hosts, every process calls this; see `runtime.initialize` for how they find each other.

    Args:
      cfg: a configuration, or the name of an experiment.
      workdir: the run directory.
      fence: what must hold when the first process writes there; None: the directory is this run's alone.

    Raises:
      UserError: the configuration is inconsistent, the directory holds another run, or the data do not fit the model;
        of several processes, all raise it if one must.
      DivergenceError: a batch gave a loss or gradient that cannot be used.
    """
    timeline = Timeline()
    if isinstance(cfg, str):
        cfg = experiments.get(cfg)
    if not isinstance(cfg, Config):
        raise UserError(f"cfg={cfg!r} must be a Config, such as dlm.experiment('demo'), or the name of an experiment")
    cfg.validate()
    schedules.build(cfg.diffusion)  # an unknown name is refused before anything is written
    runtime.initialize()
    runtime.check_joined()
    workdir = runtime.everywhere(lambda: run_path(workdir or f"runs/{cfg.name}"))
    cfg = initial.identified(cfg, workdir)
    require_same_command(cfg, workdir)
    runtime.everywhere(lambda: refuse_another_run(cfg, workdir))
    if result := finished(workdir):
        return Run(workdir, cfg, result["step"], result)
    mesh = fitting_mesh(cfg)
    runtime.require_shared(workdir)
    dataset = datasets.open_or_prepare(cfg, workdir)
    with jax.set_mesh(mesh), signals.stop_signals() as stopped, runtime.a_hint_at_deaths():
        loop = _Loop(cfg, workdir, dataset, mesh, timeline, fence or _Alone())
        try:
            return loop.run(stopped)
        finally:
            loop.let_go()


def fitting_mesh(cfg: Config) -> Mesh:
    """The mesh of a run on these devices.

    Raises:
      UserError: it does not fit them, or cannot share out the batch.
    """
    mesh = make_mesh(cfg.mesh)
    check_batch(mesh, cfg.data.batch_size, cfg.run.microbatches)
    return mesh


def evaluation_rows(cfg: Config, dataset: Dataset, rows: np.ndarray | None = None) -> Iterator[dict[str, np.ndarray]]:
    """The held-out batches that a run is evaluated on, in order; `rows` are those of each batch that are needed."""
    return eval_batches(dataset, batch_size=cfg.data.batch_size, records=cfg.run.eval_records, rows=rows)


class _Loop:
    """A run: its fixed parts, and where it stands.

    The devices are one step ahead of what is known here: the metrics of a step are fetched when the next one has been
    dispatched, so that they never wait. Until then a step is `pending`, and may turn out to have left out its batch.
    """

    def __init__(
        self,
        cfg: Config,
        workdir: epath.Path,
        dataset: Dataset,
        mesh: Mesh,
        timeline: Timeline,
        fence: Fence,
    ):
        self.cfg, self.workdir, self.dataset, self.mesh, self.timeline = cfg, workdir, dataset, mesh, timeline
        self.first_process = jax.process_index() == 0
        self.fence = fence if self.first_process else _Alone()
        self.train_step = make_train_step(cfg, mesh)
        self.eval_step = make_eval_step(cfg)
        self.rows = local_rows(mesh, cfg.data.batch_size)
        self.row_numbers = np.concatenate([np.arange(start, stop) for start, stop in self.rows])
        self.tokens_per_step = cfg.data.batch_size * cfg.data.sequence_length
        size, length = cfg.data.batch_size, cfg.data.sequence_length
        self.flops_per_step = size * flops.train(cfg.model, length, "model")
        self.credited_flops = size * flops.train(cfg.model, length, "model", predicted=predicted_share(cfg))
        chip = hardware.peak_flops(mesh.devices.flat[0].device_kind)
        self.peak_flops = chip * mesh.size if chip else None
        self.unwritten: OSError | None = None  # why a line could not be written

    def run(self, stopped: threading.Event) -> Run:
        cfg = self.cfg
        with ExitStack() as stack:
            self.checkpoints = stack.enter_context(
                runtime.everywhere(lambda: CheckpointManager(self.workdir, cfg.run.keep, cfg.run.keep_every))
            )
            self.saver = _Saver(cfg, self.checkpoints, self.sidecar, self.timeline)
            with self.timeline.measure("start" if self.checkpoints.latest_step() is None else "restore"):
                state = self._initial_state()
            self._stand_at(state)
            runtime.everywhere(lambda: record_run(cfg, self.workdir) if self.first_process else None)
            runtime.everywhere(lambda: self._open_records(stack))
            title, quiet = f"train {cfg.name}", not self.first_process
            self.progress = stack.enter_context(Progress(title, cfg.run.steps, self.step, quiet=quiet))
            if self.step:
                self.progress.say(f"going on from step {self.step} in {self.workdir}")
            elif cfg.run.init_id:
                self.progress.say(f"starting from the weights of {cfg.run.init_id}")
            profiler = stack.enter_context(
                Profiler(self.workdir / "profile", cfg.run.profile_start, cfg.run.profile_steps)
            )
            compiling, stop = self.timeline.measure("compile"), False
            while not stop:
                if self.ahead == cfg.run.steps:
                    self._settle()  # the last one may have left out its batch
                if self.step == cfg.run.steps:
                    break
                step = self.ahead
                profiler.before(step, self.state)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    self._dispatch(compiling)
                compiling, step = nullcontext(), self.ahead
                stop, overdue, unwritten = self._any_process(
                    stopped.is_set(), self.saver.overdue(), self.unwritten is not None
                )
                if unwritten:
                    runtime.everywhere(self._require_written)
                save = overdue or step % cfg.run.checkpoint_every == 0
                evaluate = cfg.run.eval_every and step % cfg.run.eval_every == 0 and step < cfg.run.steps
                if evaluate or save:
                    self._settle()
                    if self.step != step:  # it was not taken; its time will come
                        continue
                    if evaluate:  # before it is saved: what resumes at this step finds its lines complete
                        evaluation = self.evaluate(self.state.params)
                        with self._recording():
                            self.log.evaluation(step, evaluation)
                    if save:
                        self._save()
            self._settle()
            profiler.close()
            self._save()
            with self.timeline.measure("save"):
                self.checkpoints.wait()
            if self.step < cfg.run.steps:
                with self._recording():
                    self.timeline.note("stop", self.step)
                runtime.everywhere(self._require_written)
                return Run(self.workdir, cfg, self.step, None)
            return Run(self.workdir, cfg, self.step, self._finish())

    def let_go(self) -> None:
        """Frees the devices, whoever still holds on to this: the next run may need all of their memory."""
        self.state = self.pending = self.batches = None

    @property
    def ahead(self) -> int:
        """Steps taken, if the pending one is."""
        return self.step + (self.pending is not None)

    def _stand_at(self, state: TrainState) -> None:
        """Goes on from this state, with the batch that it expects."""
        self.state, self.step, self.index = state, int(state.step), int(state.next_index)
        self.pending: tuple[int, dict[str, jax.Array]] | None = None  # batch and metrics
        self.batches = self._batches(self.index)

    def _dispatch(self, compiling: Any) -> None:
        """Starts the next step, and settles the one before."""
        with self.timeline.waiting():
            batch = next(self.batches)
        with compiling:
            self.state, metrics = self.train_step(self.state, batch, np.int32(self.index))
        self.timeline.dispatched(functools.partial(jax.block_until_ready, metrics["loss"]))
        before, self.pending = self.pending, (self.index, metrics)
        self.index += 1
        if before:
            self._take_in(*before)

    def _settle(self) -> None:
        """Waits for the pending step, and learns what it did."""
        before, self.pending = self.pending, None
        if before:
            self._take_in(*before)

    def _take_in(self, index: int, metrics: dict[str, jax.Array]) -> None:
        """Learns what the step on batch `index` did: it was taken, or left the batch out, or that was one too many."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values["applied"]:
            self.step += 1
            with self._recording():
                self.log.add(self.step, values, skipped=index + 1 - self.step)
                self.timeline.took(self.step)
            self.progress.update(self.step, self.log.note)
            return
        found = {"batch": index, "loss": _json(values["loss"]), "grad_norm": _json(values["grad_norm"])}
        said = f"batch {index} gave loss {values['loss']} and gradient norm {values['grad_norm']}"
        if values["skipped"]:
            with self._recording():
                self.timeline.note("skip", self.step, **found)
            self.progress.say(f"{said} in step {self.step + 1}; it is left out")
        elif int(self.state.guard.rollbacks) < self.cfg.safety.max_rollbacks:
            self._roll_back(index, found, said)
        else:
            self._save()
            saved = f"the state before it is saved as step {self.step} in {self.workdir}"
            if self.saver.next_index != int(self.state.next_index):  # a step is saved only once
                saved = (
                    f"step {self.step} in {self.workdir} was saved when batch {self.saver.next_index} came next; the "
                    "same command repeats what was left out or rolled back since then"
                )
            raise DivergenceError(
                f"step {self.step + 1} on {said}; {saved}; to go on, see --safety.max_skips and --safety.max_rollbacks"
            )

    def _roll_back(self, index: int, found: dict[str, Any], said: str) -> None:
        """Returns to the newest checkpoint, and goes on behind batch `index`."""
        guard = jax.device_get(self.state.guard)
        factor = guard.lr_factor * np.float32(self.cfg.safety.rollback_lr)
        failed, self.state = self.step, None  # there is no room for two
        with self.timeline.measure("restore"):
            state = self._initial_state()

        def replaced(old: jax.Array, new: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback((), old.sharding, lambda _: new.astype(old.dtype))

        kept = state.guard.replace(
            rollbacks=replaced(state.guard.rollbacks, guard.rollbacks + 1),
            lr_factor=replaced(state.guard.lr_factor, factor),
        )
        self._stand_at(state.replace(next_index=replaced(state.next_index, np.int32(index + 1)), guard=kept))
        with self._recording():
            self.timeline.note("rollback", self.step, from_step=failed, lr_factor=float(factor), **found)
        runtime.everywhere(lambda: self.log.cut_back(self.step))
        self.progress.say(
            f"{said} in step {failed + 1}; going back to step {self.step}, and on with batch {index + 1} and "
            f"{factor:g} times the learning rate"
        )

    def _save(self) -> None:
        """Saves the state; what was logged is on disk before."""
        with self._recording():
            self.log.flush()
        runtime.everywhere(self._require_written)
        runtime.everywhere(self.fence.confirm)
        self.saver.save(self.state)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Inside, one process writes about the run: it must not fail alone, where the others would wait for it."""
        try:
            yield
        except OSError as error:
            self.unwritten = self.unwritten or error

    def _require_written(self) -> None:
        """Raises `UserError` if a line could not be written: no checkpoint may stand that it is missing before."""
        if self.unwritten:
            raise UserError(
                f"cannot write the metrics or the timeline in {self.workdir}: {self.unwritten}; when that is mended, "
                "the same command goes on from the newest checkpoint"
            ) from self.unwritten

    def evaluate(self, params: Any) -> dict[str, Any]:
        """The bound on held-out records (see `train_step.eval_step`), with the standard error of its noise draws.

        The error covers the Monte Carlo noise of the masks, not the choice of held-out documents; it is 0 for an
        autoregressive model, whose cross-entropy is exact.
        """
        run = self.cfg.run
        draws = run.eval_draws if self.cfg.objective == "mdm" else 1
        token_bytes = self.dataset.tokenizer.token_bytes()
        sums = np.zeros((draws, 3))
        with self.timeline.measure("evaluate"):
            for k, rows in enumerate(evaluation_rows(self.cfg, self.dataset, self.row_numbers)):
                batch = self._on_devices(rows)
                self.progress.note(f"evaluating batch {k + 1}")
                parts = [self.eval_step(params, batch, token_bytes, np.int32(k), np.int32(d)) for d in range(draws)]
                sums += np.array([[float(p[name]) for name in ("nats", "tokens", "bytes")] for p in parts])
                with self._recording():
                    self.timeline.took(self.step)
        per_draw = sums[:, 0] / sums[:, 1]
        nelbo = per_draw.mean()
        stderr = per_draw.std(ddof=1) / math.sqrt(draws) if draws > 1 else 0.0
        split = self.dataset.metadata.splits["validation"]
        # Tokens of a tokenizer that normalises text stand for fewer (or more) bytes than the documents had.
        bytes_scored = sums[0, 2] * split.raw_bytes / split.token_bytes
        return {
            "nelbo_nats_per_token": float(nelbo),
            "nelbo_stderr": float(stderr),
            "bits_per_byte": float(nelbo / math.log(2) * sums[0, 1] / bytes_scored),
            "nelbo_per_draw": per_draw.tolist(),
            "tokens": int(sums[0, 1]),
            "bytes": int(round(bytes_scored)),
        }

    def sidecar(self, step: int) -> Sidecar:
        cfg, tokenizer, template = self.cfg, self.dataset.tokenizer, self.dataset.metadata.template
        starts = {"chunk": tokenizer.eos_id, "segments": None, "examples": template and template["start_id"]}
        if self.dataset.metadata.bos:
            starts |= {"chunk": tokenizer.bos_id, "segments": tokenizer.bos_id}
        return Sidecar(
            objective=cfg.objective,
            model=config_io.to_dict(cfg.model),
            diffusion=config_io.to_dict(cfg.diffusion),
            mask_id=cfg.mask_id,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            bos_id=tokenizer.bos_id,
            suppressed_ids=cfg.suppressed_ids,
            tokenizer=tokenizer.to_dict(),
            alignment="shifted" if cfg.objective == "arm" else cfg.diffusion.alignment,
            canvas={
                "max_length": cfg.data.sequence_length,
                # What stands before a document in training, so that text can be started as one.
                "start_id": starts[cfg.data.packing],
            },
            template=template,
            source={
                "experiment": cfg.name,
                "fingerprint": config_io.fingerprint(cfg),
                "dataset": self.dataset.metadata.sha256,
                "diffusionlm": __version__,
                "step": step,
                "tokens": step * self.tokens_per_step,
                **({"init_id": cfg.run.init_id} if cfg.run.init_id else {}),
            },
        )

    def _initial_state(self) -> TrainState:
        """That of the newest checkpoint, or a fresh one, on every process the same."""

        def newest() -> int | None:
            self.checkpoints.wait()
            return self.checkpoints.latest_step()

        step = runtime.everywhere(newest)
        runtime.require_equal(
            {"newest checkpoint": step},
            f"what it sees of {self.workdir} lags behind or is another directory; start again",
        )
        return runtime.everywhere(lambda: self._state_at(step))

    def _state_at(self, step: int | None) -> TrainState:
        if step is None:
            return initial.with_weights(self.cfg, create_state(self.cfg, self.mesh), self.dataset, self.mesh)
        theirs = self.checkpoints.sidecar(step).source.get("dataset")
        if theirs != self.dataset.metadata.sha256:
            raise UserError(
                f"{self.workdir} was trained on another dataset ({theirs}) than {self.dataset.path} "
                f"({self.dataset.metadata.sha256}); use another --workdir, or that dataset"
            )
        state = self.checkpoints.restore(abstract_state(self.cfg, self.mesh), step)
        self.saver.next_index = int(state.next_index)
        return state

    def _open_records(self, stack: ExitStack) -> None:
        """Opens the timeline and the log, which one process writes."""
        try:
            self.timeline.open(self.workdir, self.step, write=self.first_process, check=self.fence.check)
            stack.enter_context(self.timeline)
            writer = MetricsWriter(self.workdir, self.step, self.fence.check) if self.first_process else None
        except ValueError as error:
            raise UserError(
                f"metrics.jsonl or timeline.jsonl in {self.workdir} has a damaged line ({error}); delete that line"
            ) from error
        self.log = stack.enter_context(self._step_log(writer))

    def _step_log(self, writer: MetricsWriter | None) -> StepLog:
        return StepLog(
            writer,
            self.timeline,
            every=self.cfg.run.log_every,
            last_step=self.cfg.run.steps,
            tokens_per_step=self.tokens_per_step,
            flops_per_step=self.credited_flops,
            peak_flops=self.peak_flops,
        )

    def _batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
        size, seed = self.cfg.data.batch_size, self.cfg.run.seed
        for rows in train_batches(self.dataset, batch_size=size, seed=seed, start=start, rows=self.row_numbers):
            yield self._on_devices(rows)

    def _on_devices(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        size = self.cfg.data.batch_size
        return {name: global_array(self.mesh, size, self.rows, values) for name, values in rows.items()}

    def _any_process(self, *wishes: bool) -> list[bool]:
        """What any process wishes: unless all save and stop at the same step, they wait for each other for ever.

        To ask is to wait for the devices, so that several processes only ask at the steps that are logged.
        """
        if jax.process_count() > 1 and self.ahead % self.cfg.run.log_every:
            return [False] * len(wishes)
        return runtime.any_process(*wishes)

    def _finish(self) -> dict[str, Any]:
        evaluation = self.evaluate(self.state.params)
        with self._recording():
            self.log.evaluation(self.step, evaluation)
            self.timeline.note("done", self.step)
        result = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "flops": self.step * self.flops_per_step,
            "train_loss": self.log.last_loss,
            "eval": evaluation,
            "seconds": round(self.timeline.held, 3),
            "goodput": round(self.timeline.goodput, 4),
            "seconds_by_kind": {kind: round(spent, 3) for kind, spent in self.timeline.seconds.items()},
            "skipped": self.index - self.step,
            "rollbacks": int(self.state.guard.rollbacks),
        }

        def write() -> None:
            self._require_written()
            if self.first_process:
                self.fence.confirm()
                write_atomically(self.workdir / "DONE.json", json.dumps(result, indent=2) + "\n")

        runtime.everywhere(write)
        return result


def _json(value: float) -> float | str:
    """JSON has no number that is not finite."""
    return value if math.isfinite(value) else str(value)


class _Saver:
    """Saves, and says when `checkpoint_minutes` have passed since it did."""

    def __init__(
        self, cfg: Config, checkpoints: CheckpointManager, sidecar: Callable[[int], Sidecar], timeline: Timeline
    ):
        self._run, self._checkpoints, self._sidecar, self._timeline = cfg.run, checkpoints, sidecar, timeline
        self._saved_at = time.monotonic()
        self.next_index: int | None = None  # of the newest checkpoint

    def overdue(self) -> bool:
        return 0 < self._run.checkpoint_minutes * 60 < time.monotonic() - self._saved_at

    def save(self, state: TrainState) -> None:
        step = int(state.step)
        if step != self._checkpoints.latest_step():
            self.next_index = int(state.next_index)
        with self._timeline.measure("save"):
            self._checkpoints.save(step, state, self._sidecar(step))
        self._saved_at = time.monotonic()
