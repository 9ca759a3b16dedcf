"""Starting a run from the weights of another checkpoint, which is known by what it is and not by where it lies."""

import dataclasses
import hashlib
import json
import logging

import jax
import jax.numpy as jnp
from etils import epath

from diffusionlm import checkpoint
from diffusionlm import config as config_lib
from diffusionlm.config import Config, ModelConfig
from diffusionlm.data.pipeline import Dataset
from diffusionlm.errors import UserError
from diffusionlm.train_state import TrainState

log = logging.getLogger(__name__)

# Of the model, what may differ: how it is computed, and how long sequences are (learned positions are tensors).
FREE = ("dtype", "max_length")


def identified(cfg: Config, workdir: epath.Path) -> Config:
    """`cfg` with `run.init_id`, the identity of the checkpoint that `run.init_from` names.

    A run that has begun knows what it started from, so that the checkpoint may be gone then.

    Raises:
      UserError: there is no checkpoint, or another than `run.init_id` says.
    """
    if not cfg.run.init_from:
        return cfg
    known = _begun(workdir)
    found = known.run.init_id if known and known.run.init_from == cfg.run.init_from else ""
    found = found or identity(_sidecar(cfg))
    if cfg.run.init_id not in ("", found):
        raise UserError(
            f"run.init_from={cfg.run.init_from} is {found}, not run.init_id={cfg.run.init_id}; leave init_id out, or "
            "name that checkpoint"
        )
    return dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, init_id=found))


def identity(sidecar: checkpoint.Sidecar) -> str:
    """EXPERIMENT@STEP and a hash of what made the parameters; a copy of a checkpoint has the same."""
    told = [sidecar.objective, sidecar.model, sidecar.mask_id, _tokenizer_of(sidecar.tokenizer), sidecar.source]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    return f"{sidecar.source.get('experiment', 'unnamed')}@{sidecar.source.get('step', 0)}-{digest}"


def with_weights(cfg: Config, state: TrainState, dataset: Dataset) -> TrainState:
    """A fresh state with the parameters that `run.init_from` names, in float32, where the state's own were.

    Raises:
      UserError: another checkpoint than `run.init_id`, another model, mask token or tokenizer, or a damaged file.
    """
    path = cfg.run.init_from
    if not path:
        if cfg.run.init_id:
            raise UserError(f"run.init_id={cfg.run.init_id} needs run.init_from, where that checkpoint is")
        if cfg.data.packing == "examples" and jax.process_index() == 0:
            log.warning("fine-tuning random weights: give a trained model with --run.init_from CHECKPOINT")
        return state
    sidecar = _sidecar(cfg)
    if (found := identity(sidecar)) != cfg.run.init_id:
        raise UserError(f"run.init_from={path} is {found} now, and this run was started with {cfg.run.init_id}")
    _require_same(cfg, sidecar, dataset)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params)
    jax.tree.map(lambda x: x.delete(), state.params)  # there may be no room for both
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    return state.replace(params=checkpoint.load_params(path, jnp.float32, shardings, expected=shapes))


def _begun(workdir: epath.Path) -> Config | None:
    """The configuration of the run in `workdir`; one that cannot be read is refused elsewhere."""
    try:
        return config_lib.from_json((workdir / "config.json").read_text())
    except (OSError, ValueError):
        return None


def _sidecar(cfg: Config) -> checkpoint.Sidecar:
    try:
        return checkpoint.load_sidecar(cfg.run.init_from)
    except UserError as error:
        raise UserError(f"run.init_from: {error}") from error


def _require_same(cfg: Config, sidecar: checkpoint.Sidecar, dataset: Dataset) -> None:
    path = cfg.run.init_from
    theirs, ours = config_lib.from_dict(ModelConfig, sidecar.model), cfg.model
    science = [name for name in config_lib.scientific_fields(ours) if name not in FREE]
    if differ := [name for name in science if getattr(theirs, name) != getattr(ours, name)]:
        shown = ", ".join(
            f"model.{name} ({getattr(theirs, name)} there, {getattr(ours, name)} here)" for name in differ
        )
        raise UserError(f"run.init_from={path} holds another model: {shown}; use the settings it was trained with")
    if sidecar.mask_id != cfg.mask_id:
        raise UserError(
            f"run.init_from={path} masks with id {sidecar.mask_id}, this run with {cfg.mask_id}; set "
            f"--diffusion.mask_id {sidecar.mask_id}, or use another checkpoint"
        )
    there, here = _tokenizer_of(sidecar.tokenizer), _tokenizer_of(dataset.metadata.tokenizer)
    if there not in (None, here):
        raise UserError(
            f"run.init_from={path} has another tokenizer (sha256 {there[:12]}) than {dataset.path} ({here[:12]}); "
            f"prepare the data with --tokenizer {path}"
        )


def _tokenizer_of(values: dict | None) -> str | None:
    return values and values["sha256"]
