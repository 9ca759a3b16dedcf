"""A new run that goes on from the whole state of another: parameters, moments, steps, place in data and noise.

The steps of the other run count as its own, so that no batch and no noise is repeated. Its learning-rate schedule
covers the steps that it takes itself, warm-up included. As with weights to start from (`start`), the state is known by
its content and looked up once.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from diffusionlm import config_mixture, fingerprint
from diffusionlm.checkpoint import store
from diffusionlm.config import Config
from diffusionlm.data.mixtures import Mixture
from diffusionlm.data.pipeline import Dataset
from diffusionlm.errors import UserError
from diffusionlm.parallel import processes
from diffusionlm.training.run_directory import recorded_config
from diffusionlm.training.start import Start
from diffusionlm.training.state import TrainState, abstract_state

# Scientific fields that may be others than those of the run that is continued: the length, the schedule of the learning
# rate and the evaluation. The data are compared by their content, and their shares up to where the run goes on.
FREE = {
    *(f"run.{name}" for name in ("steps", "init_id", "continue_id", "continued_steps", "eval_records", "eval_draws")),
    *(f"optim.{name}" for name in ("peak_lr", "schedule", "warmup_steps", "final_lr", "drop_step", "drop_lr")),
    *(f"optim.{name}" for name in ("decay_steps", "weight_decay", "arm_peak_lr")),
    *(f"data.{name}" for name in ("source", "tokenizer", "mixture")),
}


def resolve(cfg: Config, workdir: epath.Path) -> Config:
    """Return `cfg` with the step that `run.continue_from` means, its identity and the steps that it has taken.

    The run that is continued may have begun with weights of its own start, or gone on from another; the first start of
    them all is that of the new run too (`run.init_id`).

    Every process calls this, with the same `cfg`; the first one looks.

    Raises:
      UserError: there is no such state, or the run cannot go on from it.
    """
    if not cfg.run.continue_from:
        if cfg.run.continue_id or cfg.run.continued_steps:
            raise UserError(
                f"run.continue_id={cfg.run.continue_id} needs run.continue_from, the run that is continued; `train` "
                "fills it and run.continued_steps in"
            )
        return cfg
    found = processes.run_on_all_processes(lambda: _look_up(cfg, workdir) if not jax.process_index() else None)
    path, identity, step, init_id = json.loads(processes.gather(json.dumps(found))[0])
    if cfg.run.continue_id not in ("", identity):
        raise UserError(
            f"run.continue_from={path} is {identity}, not run.continue_id={cfg.run.continue_id}; leave continue_id "
            "out, or name that run"
        )
    run = dataclasses.replace(cfg.run, continue_from=path, continue_id=identity, continued_steps=step, init_id=init_id)
    return dataclasses.replace(cfg, run=run).validate()


@processes.on_all_processes
def continued_state(cfg: Config, dataset: Dataset | Mixture, mesh: Mesh) -> TrainState:
    """Return the state that a run begins with which `resolve` has resolved.

    Raises:
      UserError: the state is not `run.continue_id`, was trained on other data, or is damaged.
    """
    path = epath.Path(cfg.run.continue_from)
    if (identity := _start(path).current_identity()) != cfg.run.continue_id:
        raise UserError(
            f"run.continue_from={path} is now {identity}, but this run began with {cfg.run.continue_id}; restore that "
            "checkpoint, or use another --workdir"
        )
    old = _require_same_settings(cfg, path)
    _require_same_data(old, path, dataset)
    state = store.load_state(path, abstract_state(cfg, mesh))
    there, here = (config_mixture.parse(run.data.mixture or "data=1").phases for run in (old, cfg))
    if not config_mixture.agree(there, here, int(state.next_index)):
        raise UserError(
            f"run.continue_from={path} has taken other shares of its sources (data.mixture={old.data.mixture!r}) than "
            f"data.mixture={cfg.data.mixture!r} has up to batch {int(state.next_index)}; begin with those shares, and "
            f"change them from there on: ...;{int(state.next_index)}:PATH=WEIGHT,..."
        )
    guard = state.guard  # its rates and its patience are those of a new run
    fresh = {"lr_factor": jnp.ones_like(guard.lr_factor), "rollbacks": jnp.zeros_like(guard.rollbacks)}
    return state.replace(guard=guard.replace(**fresh, skips=jnp.zeros_like(guard.skips)))


def _start(path: epath.Path, identity: str = "") -> Start:
    return Start(path, identity, option="run.continue_from")


def _look_up(cfg: Config, workdir: epath.Path) -> tuple[str, str, int, str]:
    """Return the place, the identity and the steps of the state, and what its run began with.

    If the run in `workdir` has begun, they are those of then.
    """
    named, recorded = cfg.run.continue_from, recorded_config(workdir)
    if recorded and recorded.run.continue_id and recorded.run.continue_from:
        start = _start(epath.Path(recorded.run.continue_from), recorded.run.continue_id)
        if start.is_named_by(named):
            return str(start.path), start.identity, recorded.run.continued_steps, recorded.run.init_id
    try:
        path = store.find(named)
    except UserError as error:
        raise UserError(f"run.continue_from: {error}") from error
    if path.parent.parent == store.absolute(workdir):
        raise UserError(
            f"run.continue_from={named} is in {workdir}, where the new run would be; choose another --workdir, or drop "
            "it to resume that run"
        )
    if not (path / "train").exists() or not path.name.isdigit():
        raise UserError(
            f"run.continue_from={named} holds parameters without the state of their training; begin with them at step "
            "0 by --run.init_from"
        )
    old = _require_same_settings(cfg, path)
    return str(path), _start(path).identity, int(path.name), old.run.init_id


def _require_same_settings(cfg: Config, path: epath.Path) -> Config:
    """Return the run that saved `path`; refuse one in whose settings its state would mean something else."""
    directory = path.parent.parent
    old = recorded_config(directory)
    if old is None:
        raise UserError(
            f"run.continue_from={path} needs {directory / 'config.json'}, which says what the state means, and it "
            "cannot be read; name a run directory, or a step in one"
        )
    there, here = fingerprint.scientific_fields(old), fingerprint.scientific_fields(cfg)
    if differing := [name for name in here if name not in FREE and there[name] != here[name]]:
        shown = ", ".join(f"{name} ({there[name]} there, {here[name]} here)" for name in differing)
        raise UserError(
            f"run.continue_from={path} is the state of another kind of run: {shown}; use its settings (the steps, the "
            "learning rate and the evaluation may change), or take its weights alone with --run.init_from"
        )
    if int(path.name) < old.diffusion.arm_steps:
        raise UserError(
            f"run.continue_from={path} is within the {old.diffusion.arm_steps} steps of diffusion.arm_steps, which "
            "have one schedule; let that run go on until then"
        )
    return old


def _require_same_data(old: Config, path: epath.Path, dataset: Dataset | Mixture) -> None:
    """Refuse data that do not begin with the sources that the state was trained on."""
    source = store.load_sidecar(path).source
    names = [f"dataset/{label}" for label in old.data.sources] or ["dataset"]
    there = [str(source.get(name)) for name in names]
    here = [each.sha256 for each in dataset.datasets] if isinstance(dataset, Mixture) else [dataset.sha256]
    if here[: len(there)] != there:
        shown = [" and ".join(sha256[:12] for sha256 in known) for known in (there, here)]
        raise UserError(
            f"run.continue_from={path} was trained on other data (sha256 {shown[0]}) than {dataset.path} ({shown[1]}); "
            "give the same data, to which a mixture may add sources at its end"
        )
