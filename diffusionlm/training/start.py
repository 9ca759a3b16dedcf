"""Starting a run from the weights of another checkpoint, which is known by what it is and not by where it lies.

It may be a model of the same kind, or an autoregressive one that is adapted to masked diffusion (`adaptation`).
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from diffusionlm import config_io
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import Config, ModelConfig
from diffusionlm.data.pipeline import Dataset
from diffusionlm.errors import UserError
from diffusionlm.model import conversion as adaptation
from diffusionlm.model import lora
from diffusionlm.model.transformer import abstract_params
from diffusionlm.parallel import processes as runtime
from diffusionlm.training.run_directory import begun
from diffusionlm.training.state import TrainState

log = logging.getLogger(__name__)

# Of the model, what may differ: how it is computed, how long sequences are (learned positions are tensors), and
# adapters, of which theirs go into the weights and ours are new.
FREE = ("dtype", "max_length", "lora_rank")


def identified(cfg: Config, workdir: epath.Path) -> Config:
    """`cfg` with the step that `run.init_from` means, and its identity as `run.init_id`; every process calls this.

    A directory's newest step may be another by the time that the parameters are read, so that it is looked up once, by
    process 0. A run that has begun knows what it started from, and the checkpoint may be gone then.

    Raises:
      UserError: there is no checkpoint, another than `run.init_id` says, or one that the run cannot start from.
    """
    runtime.require_equal({"run.init_from": cfg.run.init_from}, "start every process with the same command")
    if not cfg.run.init_from:
        if cfg.model.lora_rank:
            raise UserError(
                f"model.lora_rank={cfg.model.lora_rank} trains adapters of a model that is frozen; name it with "
                "--run.init_from CHECKPOINT, or set lora_rank=0"
            )
        return cfg
    chosen = runtime.gather(runtime.everywhere(lambda: _resolved(cfg, workdir)))[0]
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, init_from=chosen))
    found = runtime.everywhere(lambda: _known_id(cfg, workdir) or _checked_id(cfg))
    if cfg.run.init_id not in ("", found):
        raise UserError(
            f"run.init_from={cfg.run.init_from} is {found}, not run.init_id={cfg.run.init_id}; leave init_id out, or "
            "name that checkpoint"
        )
    return dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, init_id=found))


def identity(path: epath.PathLike) -> str:
    """EXPERIMENT@STEP and a hash of the parameters and what they mean; a copy of a checkpoint has the same.

    Raises:
      UserError: no checkpoint, or one that does not say what it is.
    """
    path = checkpoint.find(path)
    sidecar = checkpoint.load_sidecar(path)
    if not sidecar.source:
        raise UserError(
            f"{path} does not say what it is (its sidecar has an empty `source`); write it anew with "
            "`source={'experiment': ..., 'step': ...}`"
        )
    told = [sidecar.objective, sidecar.model, sidecar.mask_id, _tokenizer_of(sidecar.tokenizer), sidecar.source]
    told += [sidecar.alignment, checkpoint.params_sha256(path)]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    return f"{sidecar.source.get('experiment', 'unnamed')}@{sidecar.source.get('step', 0)}-{digest}"


def with_weights(cfg: Config, state: TrainState, dataset: Dataset, mesh: Mesh) -> TrainState:
    """A fresh state with the parameters that `run.init_from` names, in float32, laid out as the state's own were.

    Raises:
      UserError: another checkpoint than `run.init_id`, another model, mask token or tokenizer, or a damaged file.
    """
    path = cfg.run.init_from
    if not path:
        if cfg.run.init_id:
            raise UserError(f"run.init_id={cfg.run.init_id} needs run.init_from, where that checkpoint is")
        if cfg.data.packing == "examples" and jax.process_index() == 0:
            log.warning("fine-tuning random weights: give a trained model with --run.init_from CHECKPOINT")
        elif cfg.diffusion.alignment == "shifted" and jax.process_index() == 0:
            log.warning("adapting random weights: give an autoregressive model with --run.init_from CHECKPOINT")
        return state
    if (found := _checked_id(cfg)) != cfg.run.init_id:
        raise UserError(
            f"run.init_from={path} is {found} now, and this run was started with {cfg.run.init_id}; bring that back, "
            "or start anew in another --workdir"
        )
    sidecar = checkpoint.load_sidecar(path)
    _require_tokenizer(cfg, sidecar, dataset)
    if cfg.objective == "mdm" and cfg.diffusion.alignment != sidecar.alignment and jax.process_index() == 0:
        log.warning(
            f"run.init_from={path} predicts the token behind each position, and diffusion.alignment=same unlearns "
            "that; --diffusion.alignment shifted keeps it"
        )
    theirs = config_io.from_dict(ModelConfig, sidecar.model)
    shardings, adapters = jax.tree.map(lambda x: x.sharding, state.params), lora.adapters(state.params)
    kept = set(map(id, jax.tree.leaves(adapters)))
    jax.tree.map(lambda x: None if id(x) in kept else x.delete(), state.params)  # there may be no room for both
    shapes = abstract_params(dataclasses.replace(theirs, max_length=cfg.model.max_length), mesh)
    params = checkpoint.load_params(path, jnp.float32, jax.tree.map(lambda x: x.sharding, shapes), expected=shapes)
    if not adaptation.same_parameters(theirs, cfg.model):
        params = adaptation.convert(theirs, cfg.model, params, adapters, shardings)
    return state.replace(params=params)


def _resolved(cfg: Config, workdir: epath.Path) -> str:
    """The step that `run.init_from` names: that of the run in `workdir` if it began with the same directory."""
    given = checkpoint.absolute(cfg.run.init_from)
    if (known := begun(workdir)) and known.run.init_id and known.run.init_from:
        step = epath.Path(known.run.init_from)
        if given == step or (step.name.isdigit() and given in (step.parent, step.parent.parent)):
            return str(step)
    with _about_init_from():
        return str(checkpoint.find(given))


def _known_id(cfg: Config, workdir: epath.Path) -> str:
    known = begun(workdir)
    return known.run.init_id if known and known.run.init_from == cfg.run.init_from else ""


def _checked_id(cfg: Config) -> str:
    """The identity of the checkpoint, from which this run can start as far as it is known before there are data."""
    with _about_init_from():
        found, sidecar = identity(cfg.run.init_from), checkpoint.load_sidecar(cfg.run.init_from)
    _require_same(cfg, sidecar)
    return found


@contextlib.contextmanager
def _about_init_from() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"run.init_from: {error}") from error


def _require_same(cfg: Config, sidecar: checkpoint.Sidecar) -> None:
    path = cfg.run.init_from
    theirs, ours = config_io.from_dict(ModelConfig, sidecar.model), cfg.model
    adapted = sidecar.objective == "arm" and cfg.objective == "mdm"
    science = [name for name in config_io.scientific_fields(ours) if name not in FREE]
    if adapted:
        changes = adaptation.CHANGES
        science = [n for n in science if (getattr(theirs, n), getattr(ours, n)) != changes.get(n)]
    if differ := [name for name in science if getattr(theirs, name) != getattr(ours, name)]:
        shown = ", ".join(
            f"model.{name} ({getattr(theirs, name)} there, {getattr(ours, name)} here)" for name in differ
        )
        raise UserError(f"run.init_from={path} holds another model: {shown}; use the settings it was trained with")
    if adapted:  # it has no mask yet
        return
    if sidecar.mask_id != cfg.mask_id:
        raise UserError(
            f"run.init_from={path} masks with id {sidecar.mask_id}, this run with {cfg.mask_id}; set "
            f"--diffusion.mask_id {sidecar.mask_id}, or use another checkpoint"
        )
    alignment = "shifted" if cfg.objective == "arm" else cfg.diffusion.alignment
    if sidecar.alignment != alignment:
        raise UserError(
            f"run.init_from={path} predicts with alignment {sidecar.alignment!r} (position i token i"
            f"{' + 1' if sidecar.alignment == 'shifted' else ''}), and this run trains {alignment!r}; set "
            f"--diffusion.alignment {sidecar.alignment}, or use another checkpoint"
        )
    if set(sidecar.suppressed_ids) != set(cfg.suppressed_ids):
        theirs, ours = (sorted(ids) for ids in (sidecar.suppressed_ids, cfg.suppressed_ids))
        raise UserError(
            f"run.init_from={path} never predicts the ids {theirs}, this run {ours}; set --diffusion.suppress_mask "
            f"{sidecar.mask_id in theirs}, or use another checkpoint"
        )


def _require_tokenizer(cfg: Config, sidecar: checkpoint.Sidecar, dataset: Dataset) -> None:
    there, here = _tokenizer_of(sidecar.tokenizer), _tokenizer_of(dataset.metadata.tokenizer)
    if there not in (None, here):
        path = cfg.run.init_from
        fix = f"prepare the data with `diffusionlm data prepare --tokenizer {path}`, and name them with --data.path"
        raise UserError(
            f"run.init_from={path} has another tokenizer (sha256 {there[:12]}) than {dataset.path} ({here[:12]}); {fix}"
        )


def _tokenizer_of(values: dict | None) -> str | None:
    return values and values["sha256"]
