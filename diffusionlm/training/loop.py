"""A training run, top to bottom: join, prepare, restore, step, log, evaluate, save.

Everything that a run writes is in its run directory: config.json, environment.json, metrics.jsonl, timeline.jsonl,
heartbeat, events/, checkpoints/, profile/ and, when it is done, DONE.json. Calling `train` again with the same
directory resumes from the newest checkpoint.
"""

import dataclasses
import functools
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from diffusionlm import notebook, shortening
from diffusionlm.config import Config
from diffusionlm.data.mixtures import Mixture
from diffusionlm.data.pipeline import Dataset
from diffusionlm.diffusion import schedules
from diffusionlm.errors import UserError, require_package
from diffusionlm.parallel import processes
from diffusionlm.parallel.mesh import check_batch, make_mesh
from diffusionlm.parallel.signals import StopRequest, stop_signals
from diffusionlm.progress import Progress
from diffusionlm.registry import experiments
from diffusionlm.storage import run_path
from diffusionlm.training import continuation, memory_check, parts
from diffusionlm.training.batches import Batches
from diffusionlm.training.dataset import open_or_prepare
from diffusionlm.training.evaluate import Evaluator
from diffusionlm.training.fence import Fence, owned_run
from diffusionlm.training.metrics import StepCost, step_cost
from diffusionlm.training.profiler import Profiler
from diffusionlm.training.programs import make_train_step
from diffusionlm.training.records import Records
from diffusionlm.training.run_directory import (
    finished,
    grown_from,
    record_run,
    refuse_another_run,
    require_same_command,
)
from diffusionlm.training.saver import Saver
from diffusionlm.training.start import Start, initial_state, resolve
from diffusionlm.training.state import TrainState
from diffusionlm.training.stepper import Outcome, Stepper
from diffusionlm.training.timeline import Timeline
from diffusionlm.training.wandb_run import WandbRun


@dataclass(frozen=True)
class Run:
    """The state of a run when `train` returns."""

    workdir: epath.Path
    config: Config = field(repr=False)
    step: int  # optimizer steps taken
    result: dict[str, Any] | None  # the content of DONE.json, NaN for null; None if stopped before the end
    done_before: bool = field(default=False, repr=False)  # the call found a finished run

    @property
    def done(self) -> bool:
        """True if the run has taken all of its steps."""
        return self.result is not None

    def _repr_html_(self) -> str:
        rows = {"directory": self.workdir, "step": f"{self.step:,} of {self.config.run.steps:,}"}
        if self.result is None:
            rows["state"] = "stopped and saved; the same call resumes it"
        else:
            held_out = self.result["eval"]
            rows["held out"] = (
                f"{held_out['nelbo_nats_per_token']:.3f} +/- {held_out['nelbo_stderr']:.3f} nats per token, "
                f"{held_out['bits_per_byte']:.3f} bits per byte"
            )
            rows |= {"tokens": f"{self.result['tokens']:,}", "seconds": f"{self.result['seconds']:,.0f}"}
        return notebook.table(self.config.name, rows)


class DivergenceError(FloatingPointError):
    """A batch was bad, and `SafetyConfig` allows no further way on; the message says which state has been saved."""


def train(
    cfg: Config | str, workdir: epath.PathLike | None = None, *, fence: Fence | None = None, wandb: bool = False
) -> Run:
    """Train `cfg` in `workdir` (default: runs/NAME), or resume the run that is there.

    On several hosts, every process calls this; see `processes.initialize` for how they find each other.

    Args:
      cfg: a configuration, or the name of an experiment.
      workdir: the run directory.
      fence: what must hold when the first process writes there, beside that no other process has the directory.
      wandb: also log the metrics to Weights & Biases.

    Raises:
      UserError: the configuration is inconsistent, the directory holds another run or another process trains there,
        or the data do not fit the model; of several processes, all raise it if one must.
      DivergenceError: a batch gave a loss or gradient that cannot be used.
    """
    timeline = Timeline()
    if wandb:
        require_package("wandb", "wandb=True", "wandb", "wandb")
    if isinstance(cfg, str):
        cfg = experiments.get(cfg)
    if not isinstance(cfg, Config):
        raise UserError(f"cfg={cfg!r} must be a Config, such as dlm.experiment('demo'), or the name of an experiment")
    shortening.validate(cfg)
    schedules.build(cfg.diffusion)  # an unknown name is refused before anything is written
    processes.initialize()
    processes.check_joined()
    directory = processes.run_on_all_processes(functools.partial(run_path, workdir or f"runs/{cfg.name}"))
    require_same_command(cfg, directory)
    cfg, start = resolve(continuation.resolve(cfg, directory), directory)
    refuse_another_run(cfg, directory)
    if result := finished(directory, cfg.run.steps):
        return Run(directory, cfg, result["step"], result, done_before=True)
    mesh = fitting_mesh(cfg)
    processes.run_on_all_processes(lambda: memory_check.require_room(cfg, mesh))
    processes.require_shared(directory)
    alone = fence is None  # one of the many runs of a sweep leaves neither a picture nor a bar in a notebook
    with owned_run(directory, fence) as fence:
        refuse_another_run(cfg, directory)
        if result := finished(directory, cfg.run.steps):  # by an owner that this process waited for
            return Run(directory, cfg, result["step"], result, done_before=True)
        dataset = open_or_prepare(cfg, directory, start)
        with (
            jax.set_mesh(mesh),
            stop_signals() as stopped,
            memory_check.refusals(cfg, mesh),
            processes.name_lost_processes(),
        ):
            cost, batches = step_cost(cfg, mesh), Batches(cfg, dataset, mesh)
            stepper = Stepper(cfg, make_train_step(cfg, mesh), batches.train, timeline)
            evaluator = Evaluator(cfg, dataset, batches)
            mirror = WandbRun(cfg, directory) if wandb and jax.process_index() == 0 else None
            records = Records(cfg, directory, cost, timeline, fence, mirror)
            loop = Loop(cfg, directory, start, dataset, mesh, timeline, cost, stepper, evaluator, records, alone)
            try:
                return loop.run(stopped)
            finally:
                stepper.release()


def fitting_mesh(cfg: Config) -> Mesh:
    """Return the mesh of a run on these devices.

    Raises:
      UserError: the mesh does not fit the devices, or cannot share out the batch.
    """
    mesh = make_mesh(cfg.mesh)
    check_batch(mesh, cfg.data.batch_size, cfg.run.microbatches)
    return mesh


@dataclass
class Loop:
    """A run under way: its parts, and the loop that drives them."""

    cfg: Config
    workdir: epath.Path
    start: Start | None
    dataset: Dataset | Mixture
    mesh: Mesh
    timeline: Timeline
    cost: StepCost
    stepper: Stepper
    evaluator: Evaluator
    records: Records
    alone: bool  # not a run of a sweep
    saver: Saver = field(init=False)
    progress: Progress = field(init=False)

    def run(self, stopped: StopRequest) -> Run:
        """Train until the last step, or until `stopped` is set; save, and write DONE.json at the end."""
        cfg, stepper = self.cfg, self.stepper
        stopped.starting = True
        with ExitStack() as stack:
            self.saver = stack.enter_context(
                processes.run_on_all_processes(lambda: Saver(cfg, self.workdir, self.dataset, self.timeline))
            )
            with self.timeline.measure("restore" if self.saver.has_checkpoint() else "start"):
                stepper.set_state(self._initial_state())
            beginning = self._beginning()
            record_run(cfg, self.workdir)
            stack.enter_context(self.records).open(stepper.step)
            quiet = jax.process_index() != 0
            shown = {"quiet": quiet, "picture": self.records.curve.png if self.alone else None, "stay": self.alone}
            self.progress = stack.enter_context(Progress(f"train {cfg.name}", cfg.run.steps, stepper.step, **shown))
            if beginning:
                self.progress.say(beginning)
            profiler = stack.enter_context(
                Profiler(self.workdir / "profile", cfg.run.profile_start, cfg.run.profile_steps)
            )
            stop = False
            while not stop:
                if stepper.ahead >= cfg.run.steps:
                    self.process_metrics(stepper.drain())  # the last step may have left out its batch
                if stepper.step >= cfg.run.steps:
                    break
                profiler.before(stepper.ahead, stepper.state)
                with jax.profiler.StepTraceAnnotation("train", step_num=stepper.ahead):
                    self.process_metrics(stepper.dispatch())
                stopped.starting = False
                stop, overdue = self._requests(stopped)
                step = stepper.ahead
                save = overdue or step % cfg.run.checkpoint_every == 0
                evaluate = cfg.run.eval_every and step % cfg.run.eval_every == 0 and step < cfg.run.steps
                opens = parts.opens_at(cfg, stepper.batch_index)
                if evaluate or save or opens:
                    self.process_metrics(stepper.drain())
                    if opens and parts.opens_at(cfg, stepper.batch_index):
                        self.open_attention()
                        evaluate = False
                    if stepper.step != step:  # the step was not taken; its time will come
                        continue
                    if evaluate:  # before the step is saved: a run that resumes from it finds its lines complete
                        self.records.evaluation(step, self.evaluate())
                    if save:
                        self.save()
            self.process_metrics(stepper.drain())
            profiler.close()
            self.save()
            self.saver.wait()
            return Run(self.workdir, cfg, stepper.step, self._end())

    def process_metrics(self, outcome: Outcome | None) -> None:
        """Log a step that was taken; skip the batch, roll back or give up if it was not."""
        if outcome is None:
            return
        stepper, batch, metrics = self.stepper, outcome.batch_index, outcome.metrics
        if metrics["applied"]:
            ends_part = parts.opens_at(self.cfg, batch + 1)
            self.records.step(stepper.step, metrics, skipped=batch + 1 - stepper.step, ends_part=ends_part)
            self.progress.update(stepper.step, self.records.log.note)
            return
        details = {"batch": batch, "loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}
        message = f"batch {batch} gave loss {metrics['loss']} and gradient norm {metrics['grad_norm']}"
        if metrics["skipped"]:
            self.records.event("skip", stepper.step, **details)
            self.progress.say(f"{message} in step {stepper.step + 1}; it is left out")
        elif int(stepper.state.guard.rollbacks) < self.cfg.safety.max_rollbacks:
            self._roll_back(batch, details, message)
        else:
            self._give_up(message)

    def open_attention(self) -> None:
        """Record and save what the autoregressive part of the run has reached; the next batch trains diffusion."""
        evaluation = self.evaluate()
        self.records.evaluation(self.stepper.step, evaluation)
        self.save()  # a roll-back never crosses the border, and the autoregressive model is kept
        self.progress.say(
            f"step {self.stepper.step}: as an autoregressive model {evaluation['bits_per_byte']:.3f} bits per byte; "
            "now attention opens, and the run goes on as a masked diffusion model"
        )

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the current parameters, while the heartbeat continues."""

        def on_batch(k: int) -> None:
            self.progress.note(f"evaluating batch {k + 1}")
            self.records.alive(self.stepper.step)

        with self.timeline.measure("evaluate"):
            return self.evaluator(self.stepper.state.params, self.stepper.batch_index, on_batch)

    def save(self) -> None:
        """Save the state; everything that was logged is on disk before."""
        self.records.before_checkpoint()
        self.saver.save(self.stepper.state)

    def _initial_state(self) -> TrainState:
        """Return the state of the newest checkpoint, or a fresh one; the same on every process."""
        step = self.saver.newest_step()
        if step is None and self.cfg.run.continue_from:
            return continuation.continued_state(self.cfg, self.dataset, self.mesh)
        if step is None:
            return initial_state(self.cfg, self.start, self.dataset, self.mesh)
        return self.saver.restore(step, self.mesh)

    def _beginning(self) -> str:
        """Return what there is to say about the state that the loop begins with.

        Raises:
          UserError: it is of a run with fewer steps that must not grow.
        """
        run, step = self.cfg.run, self.stepper.step
        # The learning rate counts batches where there are two parts, and steps where another run is continued.
        clock = self.stepper.batch_index if self.cfg.diffusion.arm_steps and not run.continued_steps else step
        before = grown_from(self.cfg, self.workdir, clock)
        grown = f"; it grows from {before} to {run.steps} steps" if before else ""
        if step and self.saver.has_checkpoint():
            return f"resuming from step {step} in {self.workdir}{grown}"
        if run.continue_id:
            return (
                f"going on from the whole state of {run.continue_id}, with batch {self.stepper.batch_index}; the "
                f"schedule of the learning rate covers steps {step + 1} to {run.steps}"
            )
        return f"starting from the weights of {run.init_id}" if run.init_id else ""

    def _requests(self, stopped: StopRequest) -> tuple[bool, bool]:
        """Return (stop, save) as any process requests it: unless all do both at the same step, they wait for ever.

        To ask is to wait for the devices, so several processes ask only at the steps that are logged.

        Raises:
          UserError: a process could not write about the run.
        """
        if jax.process_count() > 1 and self.stepper.ahead % self.cfg.run.log_every:
            return False, False
        requests = stopped.is_set(), self.saver.overdue(), self.records.unwritten is not None
        stop, save, unwritten = processes.any_across_processes(*requests)
        if unwritten:
            self.records.require_written()
        return stop, save

    def _roll_back(self, batch: int, details: dict[str, Any], message: str) -> None:
        """Return to the newest checkpoint, and continue after `batch`."""
        stepper = self.stepper
        guard = jax.device_get(stepper.state.guard)
        factor = guard.lr_factor * np.float32(self.cfg.safety.rollback_lr)
        failed = stepper.step
        stepper.release()  # there is no room for two states
        with self.timeline.measure("restore"):
            state = self._initial_state()

        def replaced(old: jax.Array, new: np.ndarray | np.generic) -> jax.Array:
            return jax.make_array_from_callback((), old.sharding, lambda _: new.astype(old.dtype))

        new_guard = dataclasses.replace(
            state.guard,
            rollbacks=replaced(state.guard.rollbacks, guard.rollbacks + 1),
            lr_factor=replaced(state.guard.lr_factor, factor),
        )
        next_index = replaced(state.next_index, np.int32(batch + 1))
        stepper.set_state(dataclasses.replace(state, next_index=next_index, guard=new_guard))
        self.records.event("rollback", stepper.step, from_step=failed, lr_factor=float(factor), **details)
        self.records.cut_back(stepper.step)
        self.progress.say(
            f"{message} in step {failed + 1}; rolling back to step {stepper.step}, and continuing with batch "
            f"{batch + 1} at {factor:g} times the learning rate"
        )

    def _give_up(self, message: str) -> None:
        stepper = self.stepper
        self.save()
        saved = f"the state before it is saved as step {stepper.step} in {self.workdir}"
        if self.saver.next_index != int(stepper.state.next_index):  # a step is saved only once
            saved = (
                f"step {stepper.step} in {self.workdir} was saved when batch {self.saver.next_index} came next; the "
                "same command repeats what was left out or rolled back since then"
            )
        raise DivergenceError(
            f"step {stepper.step + 1} on {message}; {saved}; to continue, see --safety.max_skips and "
            "--safety.max_rollbacks"
        )

    def _end(self) -> dict[str, Any] | None:
        """Return the content of DONE.json once it is written; None if the run was stopped before its last step."""
        if self.stepper.step < self.cfg.run.steps:
            self.records.event("stop", self.stepper.step)
            self.records.require_written()
            return None
        return self.finish()

    def finish(self) -> dict[str, Any]:
        """Evaluate, write DONE.json, and return its content."""
        step, timeline = self.stepper.step, self.timeline
        evaluation = self.evaluate()
        self.records.evaluation(step, evaluation)
        self.records.event("done", step)
        result = {
            "step": step,
            "tokens": step * self.cost.tokens,
            "flops": step * self.cost.flops,
            "train_loss": self.records.log.last_loss,
            "eval": evaluation,
            "seconds": round(timeline.held, 3),
            "goodput": round(timeline.goodput, 4),
            "seconds_by_kind": {kind: round(spent, 3) for kind, spent in timeline.seconds.items()},
            "skipped": self.stepper.batch_index - step,
            "rollbacks": int(self.stepper.state.guard.rollbacks),
        }
        if isinstance(self.dataset, Mixture):
            result["sources"] = self.dataset.seen(self.cfg.data.batch_size, self.stepper.batch_index)
        self.records.finish(result)
        return result
