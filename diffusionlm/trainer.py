"""A training run, top to bottom: prepare, restore, step, log, evaluate, save.

Everything that a run writes lies in its run directory: config.json, environment.json, metrics.jsonl, events/,
checkpoints/, profile/ and, when it is done, DONE.json. Calling `train` again with the same directory goes on where the
newest checkpoint stands.
"""

import json
import math
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from diffusionlm import config as config_lib
from diffusionlm import flops, schedules
from diffusionlm.checkpoint import CheckpointManager, Sidecar
from diffusionlm.config import Config
from diffusionlm.data import datasets
from diffusionlm.data.pipeline import Dataset, eval_batches, train_batches
from diffusionlm.errors import UserError
from diffusionlm.metrics import MetricsWriter, StepLog, write_atomically
from diffusionlm.progress import Progress
from diffusionlm.registry import experiments
from diffusionlm.sharding import check_batch, global_array, local_rows, make_mesh
from diffusionlm.train_state import TrainState, abstract_state, create_state
from diffusionlm.train_step import make_eval_step, make_train_step
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


class NonFiniteError(FloatingPointError):
    """The loss or the gradient of a step was not finite; the state before that step has been saved."""


def train(cfg: Config | str, workdir: epath.PathLike | None = None) -> Run:
    """Trains `cfg` in `workdir` (default: runs/NAME), or goes on with the run that is there.

    Args:
      cfg: a configuration, or the name of an experiment.
      workdir: the run directory.

    Raises:
      UserError: the configuration is inconsistent, the directory holds another run, or the data do not fit the model.
      NonFiniteError: a loss or gradient was not finite.
    """
    if isinstance(cfg, str):
        cfg = experiments.get(cfg)
    if not isinstance(cfg, Config):
        raise UserError(f"cfg={cfg!r} must be a Config, such as dlm.experiment('demo'), or the name of an experiment")
    cfg.validate()
    schedules.build(cfg.diffusion)  # an unknown name is refused before anything is written
    workdir = epath.Path(workdir or f"runs/{cfg.name}")
    refuse_another_run(cfg, workdir)
    done = workdir / "DONE.json"
    if done.exists():
        result = json.loads(done.read_text())
        return Run(workdir, cfg, result["step"], result)
    mesh = make_mesh(cfg.mesh)
    check_batch(mesh, cfg.data.batch_size, cfg.run.microbatches)
    dataset = datasets.open_or_prepare(cfg, workdir)
    with jax.set_mesh(mesh), stop_signals() as stopped:
        return _Loop(cfg, workdir, dataset, mesh).run(stopped)


def refuse_another_run(cfg: Config, workdir: epath.Path) -> None:
    """Raises `UserError` unless the directory is free, or the run in it is of the same science."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        theirs = config_lib.from_json(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is damaged, or of another version ({e}); use another --workdir") from e
    if config_lib.fingerprint(theirs) != config_lib.fingerprint(cfg):
        old, new = config_lib.scientific_fields(theirs), config_lib.scientific_fields(cfg)
        differ = ", ".join(f"{k} ({old[k]} there, {new[k]} here)" for k in new if old[k] != new[k])
        raise UserError(
            f"{workdir} holds another run: {differ}; use another --workdir to train anew, or the settings of that run"
        )


def record_run(cfg: Config, workdir: epath.Path) -> None:
    """Writes config.json and environment.json; the environments of earlier starts go on in its "earlier"."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / "config.json", config_lib.to_json(cfg))
        path = workdir / "environment.json"
        last = _last_environment(path)
        earlier = [*last.pop("earlier", []), last] if last else []
        write_atomically(path, json.dumps({**environment(), "earlier": earlier}, indent=2) + "\n")
    except OSError as e:
        raise UserError(f"cannot write to the run directory {workdir}: {e.strerror}; choose another --workdir") from e


def _last_environment(path: epath.Path) -> dict[str, Any]:
    """What environment.json says, or nothing: it is a record, and no reason to refuse a run."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def evaluation_rows(cfg: Config, dataset: Dataset, rows: np.ndarray | None = None) -> Iterator[dict[str, np.ndarray]]:
    """The held-out batches that a run is evaluated on, in order; `rows` are those of each batch that are needed."""
    return eval_batches(dataset, batch_size=cfg.data.batch_size, records=cfg.run.eval_records, rows=rows)


def environment() -> dict[str, Any]:
    """Versions, devices and source revision, for the record."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
    return {
        "diffusionlm": __version__,
        "git": git_revision(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in names},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "command": sys.argv,
    }


def git_revision() -> str | None:
    """The commit that this package runs from; None where it is no checkout, or there is no git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, cwd=epath.Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return git.stdout.strip() or None


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM or a first Ctrl-C sets, so that a run saves before it ends; a second Ctrl-C interrupts."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield stopped
        return

    def stop(signum: int, frame: Any) -> None:
        if stopped.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        stopped.set()

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class _Loop:
    """The loop's fixed parts; what changes is in the TrainState, and in the local variables of `run`."""

    def __init__(self, cfg: Config, workdir: epath.Path, dataset: Dataset, mesh: Mesh):
        self.cfg, self.workdir, self.dataset, self.mesh = cfg, workdir, dataset, mesh
        self.train_step = make_train_step(cfg, mesh)
        self.eval_step = make_eval_step(cfg)
        self.rows = local_rows(mesh, cfg.data.batch_size)
        self.row_numbers = np.concatenate([np.arange(start, stop) for start, stop in self.rows])
        self.tokens_per_step = cfg.data.batch_size * cfg.data.sequence_length
        self.flops_per_step = cfg.data.batch_size * flops.train(cfg.model, cfg.data.sequence_length, "model")
        chip = flops.peak_flops(mesh.devices.flat[0].device_kind)
        self.peak_flops = chip * mesh.size if chip else None

    def run(self, stopped: threading.Event) -> Run:
        cfg = self.cfg
        with ExitStack() as stack:
            checkpoints = stack.enter_context(CheckpointManager(self.workdir, cfg.run.keep, cfg.run.keep_every))
            state = self._initial_state(checkpoints)
            step, index = int(state.step), int(state.next_index)
            first_process = jax.process_index() == 0
            if first_process:
                record_run(cfg, self.workdir)
            log = stack.enter_context(self._open_log(step))
            progress = stack.enter_context(Progress(f"train {cfg.name}", cfg.run.steps, step, quiet=not first_process))
            if step:
                progress.say(f"going on from step {step} in {self.workdir}")
            tracing = stack.enter_context(ExitStack())
            batches = self._batches(index)
            saver = _Saver(cfg, checkpoints, self.sidecar)
            # Metrics are fetched one step late: by then the next step is dispatched, and the device never waits.
            pending: tuple[int, dict[str, jax.Array]] | None = None

            def settle() -> None:
                nonlocal pending
                if pending:
                    settled, values = pending[0], jax.device_get(pending[1])
                    self._raise_if_not_finite(settled, values, state, saver)
                    log.add(settled, values)
                    progress.update(settled, log.note)
                pending = None

            first, stop = True, False
            while step < cfg.run.steps and not stop:
                self._profile(step, state, tracing)
                with log.paused() if first else nullcontext(), jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = self.train_step(state, next(batches), np.int32(index))  # the first call compiles
                first = False
                step, index = step + 1, index + 1
                settle()
                pending = (step, metrics)
                stop, overdue = self._any_process(step, stopped.is_set(), saver.overdue())
                save = overdue or step % cfg.run.checkpoint_every == 0
                evaluate = cfg.run.eval_every and step % cfg.run.eval_every == 0 and step < cfg.run.steps
                if evaluate or save:
                    settle()
                    with log.paused():
                        if evaluate:  # before it is saved: what resumes at this step finds its lines complete
                            log.evaluation(step, self.evaluate(state.params, progress))
                        if save:
                            saver.save(state)
            settle()
            tracing.close()
            saver.save(state)
            checkpoints.wait()
            if step < cfg.run.steps:
                return Run(self.workdir, cfg, step, None)
            return Run(self.workdir, cfg, step, self._finish(state, log, progress))

    def evaluate(self, params: Any, progress: Progress | None = None) -> dict[str, float]:
        """The bound on held-out records (see `train_step.eval_step`), with the standard error of its noise draws.

        The error covers the Monte Carlo noise of the masks, not the choice of held-out documents; it is 0 for an
        autoregressive model, whose cross-entropy is exact.
        """
        run = self.cfg.run
        draws = run.eval_draws if self.cfg.objective == "mdm" else 1
        token_bytes = self.dataset.tokenizer.token_bytes()
        sums = np.zeros((draws, 3))
        for k, rows in enumerate(evaluation_rows(self.cfg, self.dataset, self.row_numbers)):
            batch = self._on_devices(rows)
            if progress:
                progress.note(f"evaluating batch {k + 1}")
            parts = [self.eval_step(params, batch, token_bytes, np.int32(k), np.int32(d)) for d in range(draws)]
            sums += np.array([[float(p[name]) for name in ("nats", "tokens", "bytes")] for p in parts])
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
            "tokens": int(sums[0, 1]),
            "bytes": int(round(bytes_scored)),
        }

    def sidecar(self, step: int) -> Sidecar:
        cfg, tokenizer = self.cfg, self.dataset.tokenizer
        return Sidecar(
            objective=cfg.objective,
            model=config_lib.to_dict(cfg.model),
            diffusion=config_lib.to_dict(cfg.diffusion),
            mask_id=cfg.mask_id,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            bos_id=tokenizer.bos_id,
            suppressed_ids=cfg.suppressed_ids,
            tokenizer=tokenizer.to_dict(),
            alignment="shifted" if cfg.objective == "arm" else "same",
            canvas={
                "max_length": cfg.data.sequence_length,
                # What stands before a document in training, so that text can be started as one.
                "start_id": tokenizer.eos_id if cfg.data.packing == "chunk" else None,
            },
            source={
                "experiment": cfg.name,
                "fingerprint": config_lib.fingerprint(cfg),
                "dataset": self.dataset.metadata.sha256,
                "diffusionlm": __version__,
                "step": step,
                "tokens": step * self.tokens_per_step,
            },
        )

    def _initial_state(self, checkpoints: CheckpointManager) -> TrainState:
        step = checkpoints.latest_step()
        if step is None:
            return create_state(self.cfg, self.mesh)
        theirs = checkpoints.sidecar(step).source.get("dataset")
        if theirs != self.dataset.metadata.sha256:
            raise UserError(
                f"{self.workdir} was trained on another dataset ({theirs}) than {self.dataset.path} "
                f"({self.dataset.metadata.sha256}); use another --workdir, or that dataset"
            )
        return checkpoints.restore(abstract_state(self.cfg, self.mesh), step)

    def _open_log(self, step: int) -> StepLog:
        return StepLog(
            MetricsWriter(self.workdir, step) if jax.process_index() == 0 else None,
            every=self.cfg.run.log_every,
            last_step=self.cfg.run.steps,
            tokens_per_step=self.tokens_per_step,
            flops_per_step=self.flops_per_step,
            peak_flops=self.peak_flops,
        )

    def _batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
        size, seed = self.cfg.data.batch_size, self.cfg.run.seed
        for rows in train_batches(self.dataset, batch_size=size, seed=seed, start=start, rows=self.row_numbers):
            yield self._on_devices(rows)

    def _on_devices(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        size = self.cfg.data.batch_size
        return {name: global_array(self.mesh, size, self.rows, values) for name, values in rows.items()}

    def _raise_if_not_finite(
        self, step: int, metrics: dict[str, np.ndarray], state: TrainState, saver: "_Saver"
    ) -> None:
        """Stops the run if `step` was not applied; `state` is then still the one before it (see `train_step`)."""
        if float(metrics["applied"]):
            return
        saver.save(state)
        raise NonFiniteError(
            f"step {step} on batch {int(state.next_index)} gave loss {float(metrics['loss'])} and gradient norm "
            f"{float(metrics['grad_norm'])}; the state before it is saved as step {int(state.step)} in {self.workdir}"
        )

    def _any_process(self, step: int, *wishes: bool) -> list[bool]:
        """What any process wishes: unless all save and stop at the same step, they wait for each other for ever.

        To ask is to wait for the device, so that several processes only ask at the steps that are logged.
        """
        if jax.process_count() == 1:
            return list(wishes)
        if step % self.cfg.run.log_every:
            return [False] * len(wishes)
        return multihost_utils.process_allgather(np.array(wishes)).any(axis=0).tolist()

    def _profile(self, step: int, state: TrainState, tracing: ExitStack) -> None:
        run = self.cfg.run
        if step in (run.profile_start, run.profile_start + run.profile_steps):
            jax.block_until_ready(state)  # or steps dispatched before would be in the trace, and its last ones not
        if step == run.profile_start:
            tracing.enter_context(jax.profiler.trace(str(self.workdir / "profile")))
        elif step == run.profile_start + run.profile_steps:
            tracing.close()  # nothing to close in a run that resumed inside the window

    def _finish(self, state: TrainState, log: StepLog, progress: Progress) -> dict[str, Any]:
        evaluation = self.evaluate(state.params, progress)
        step = int(state.step)
        log.evaluation(step, evaluation)
        result = {
            "step": step,
            "tokens": step * self.tokens_per_step,
            "flops": step * self.flops_per_step,
            "train_loss": log.last_loss,
            "eval": evaluation,
            "seconds": round(log.seconds, 3),
            "goodput": round(log.goodput, 4),
        }
        if jax.process_index() == 0:
            write_atomically(self.workdir / "DONE.json", json.dumps(result, indent=2) + "\n")
        return result


class _Saver:
    """Saves, and says when `checkpoint_minutes` have passed since it did."""

    def __init__(self, cfg: Config, checkpoints: CheckpointManager, sidecar: Callable[[int], Sidecar]):
        self._run, self._checkpoints, self._sidecar = cfg.run, checkpoints, sidecar
        self._saved_at = time.monotonic()

    def overdue(self) -> bool:
        return 0 < self._run.checkpoint_minutes * 60 < time.monotonic() - self._saved_at

    def save(self, state: TrainState) -> None:
        step = int(state.step)
        self._checkpoints.save(step, state, self._sidecar(step))
        self._saved_at = time.monotonic()
