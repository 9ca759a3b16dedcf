"""The initial parameters of a run: fresh ones, or those of another checkpoint.

A checkpoint is identified by its content, not its path. It may hold a model of the same kind, or an autoregressive one
that is adapted to masked diffusion (`conversion`).
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from diffusionlm import config_io, fingerprint, hub
from diffusionlm.checkpoint import store
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.config import Config, ModelConfig
from diffusionlm.data.mixtures import Mixture
from diffusionlm.data.pipeline import Dataset
from diffusionlm.errors import UserError
from diffusionlm.model import conversion, lora
from diffusionlm.model.transformer import abstract_params
from diffusionlm.parallel import processes
from diffusionlm.training.parts import is_autoregressive
from diffusionlm.training.run_directory import recorded_config
from diffusionlm.training.state import TrainState, create_state

log = logging.getLogger(__name__)

# Fields of the model that may differ: how it is computed, how long sequences are (learned positions are tensors), and
# adapters, of which those of the checkpoint are merged into its weights and those of the run are new.
FREE = ("dtype", "max_length", "lora_rank")


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from, looked up once; its sidecar is read once, when it is first asked for.

    A run that has begun knows the identity of its start, and needs the checkpoint itself only if nothing was saved yet.
    """

    path: epath.Path | str  # one step, a params-only model, or the address of one on the Hub, with its commit
    recorded_identity: str = ""  # as the run that has begun, or the first process, knows it
    option: str = "run.init_from"  # which names it, for messages

    @property
    def identity(self) -> str:
        """EXPERIMENT@STEP and a hash of the parameters and what they mean; copies of a checkpoint share it."""
        return self.recorded_identity or self.current_identity()

    def is_named_by(self, path: epath.PathLike) -> bool:
        """Return True if `path` is this checkpoint, or the directory or repository whose step or commit it is."""
        if hub.is_address(path) or isinstance(self.path, str):
            return self._is_addressed_by(str(path))
        absolute, steps = store.absolute(path), self.path.parent
        return absolute == self.path or (self.path.name.isdigit() and absolute in (steps, steps.parent))

    def _is_addressed_by(self, path: str) -> bool:
        if not (hub.is_address(path) and hub.is_address(self.path)):
            return False
        here, named = hub.parse(str(self.path)), hub.parse(path)
        return named.repository == here.repository and named.revision in (None, "main", here.revision)

    @functools.cached_property
    def sidecar(self) -> Sidecar:
        """The sidecar of the checkpoint, which says what the parameters mean."""
        with _about(self.option):
            return store.load_sidecar(self.path)

    def current_identity(self) -> str:
        """Return the identity of the files now on disk.

        Raises:
          UserError: the checkpoint does not say what it is.
        """
        sidecar = self.sidecar
        with _about(self.option):
            return _identity(self.path, sidecar)


def resolve(cfg: Config, workdir: epath.Path) -> tuple[Config, Start | None]:
    """Find the checkpoint that `run.init_from` means, and check that the run can start from it.

    A directory's newest step may be another by the time that the parameters are read, so the first process looks it up
    once. Every process calls this, with the same `cfg`. A model on the Hub stays an address, now with its commit, which
    each process fetches when it reads from it.

    Returns:
      `cfg` with the path or address of the checkpoint, and its identity, which is part of the fingerprint; and the
      checkpoint, or None for fresh weights.

    Raises:
      UserError: there is no checkpoint, another than `run.init_id` says, or one that the run cannot start from.
    """
    if not cfg.run.init_from:
        if cfg.model.lora_rank and not cfg.run.continue_from:
            raise UserError(
                f"model.lora_rank={cfg.model.lora_rank} trains adapters of a model that is frozen; name it with "
                "--run.init_from CHECKPOINT, or set lora_rank=0"
            )
        return cfg, None
    start, identity = _look_up(cfg, workdir)
    path, identity = json.loads(processes.gather(json.dumps([str(start.path) if start else "", identity]))[0])
    if cfg.run.init_id not in ("", identity):
        raise UserError(
            f"run.init_from={path} is {identity}, not run.init_id={cfg.run.init_id}; leave init_id out, or name that "
            "checkpoint"
        )
    run = dataclasses.replace(cfg.run, init_from=path, init_id=identity)
    return dataclasses.replace(cfg, run=run), start or Start(_place(path), identity)


@processes.on_all_processes
def initial_state(cfg: Config, start: Start | None, dataset: Dataset | Mixture, mesh: Mesh) -> TrainState:
    """Return the state of a run that has taken no step yet.

    Raises:
      UserError: the start is not `run.init_id`, has another model, mask token or tokenizer, or is damaged.
    """
    _warn_of_no_diffusion(cfg)
    state = create_state(cfg, mesh)
    if start is None:
        if cfg.run.init_id:
            raise UserError(f"run.init_id={cfg.run.init_id} needs run.init_from, where that checkpoint is")
        _warn_of_random_weights(cfg)
        return state
    # Preparing data may have taken hours since the start was resolved, or the run may have begun in another process.
    if (identity := start.current_identity()) != cfg.run.init_id:
        raise UserError(
            f"run.init_from={start.path} is now {identity}, but this run was started with {cfg.run.init_id}; restore "
            "that checkpoint, or use another --workdir"
        )
    require_same_model(cfg, start)
    _require_tokenizer(start, dataset)
    if cfg.objective == "mdm" and cfg.diffusion.alignment != start.sidecar.alignment and jax.process_index() == 0:
        log.warning(
            f"run.init_from={start.path} predicts the token after each position, and diffusion.alignment=same "
            "unlearns that; --diffusion.alignment shifted keeps it"
        )
    return _with_weights(cfg, start, state, mesh)


def _with_weights(cfg: Config, start: Start, state: TrainState, mesh: Mesh) -> TrainState:
    """Replace the parameters of `state` by those of the start, in float32 and laid out alike."""
    source = config_io.from_dict(ModelConfig, start.sidecar.model)
    shardings, adapters = jax.tree.map(lambda x: x.sharding, state.params), lora.adapters(state.params)
    adapter_ids = set(map(id, jax.tree.leaves(adapters)))
    jax.tree.map(lambda x: None if id(x) in adapter_ids else x.delete(), state.params)  # there may be no room for both
    shapes = abstract_params(dataclasses.replace(source, max_length=cfg.model.max_length), mesh)
    params = store.load_params(start.path, jnp.float32, jax.tree.map(lambda x: x.sharding, shapes), expected=shapes)
    if not conversion.same_parameters(source, cfg.model):
        params = conversion.convert_on_mesh(source, cfg.model, params, adapters, shardings)
    return dataclasses.replace(state, params=params)


def _warn_of_no_diffusion(cfg: Config) -> None:
    steps = cfg.run.steps
    if cfg.objective != "arm" and is_autoregressive(cfg) and not jax.process_index():
        log.warning(
            f"all {steps} steps are autoregressive, as diffusion.arm_steps={cfg.diffusion.arm_steps}, and none trains "
            "diffusion: give more than that with --run.steps, or fewer with --diffusion.arm_steps"
        )


def _warn_of_random_weights(cfg: Config) -> None:
    if jax.process_index():
        return
    if cfg.data.holds_examples:
        log.warning("fine-tuning random weights: give a trained model with --run.init_from CHECKPOINT")
    elif cfg.diffusion.alignment == "shifted" and not cfg.diffusion.arm_steps:
        log.warning("adapting random weights: give an autoregressive model with --run.init_from CHECKPOINT")


@processes.on_all_processes
def _look_up(cfg: Config, workdir: epath.Path) -> tuple[Start | None, str]:
    """Return the checkpoint that `run.init_from` names, and its identity, on the first process; nothing on the others.

    If the run in `workdir` began with the same directory, it is the step of then.
    """
    if jax.process_index():
        return None, ""
    recorded = recorded_config(workdir)
    if recorded and recorded.run.init_id and recorded.run.init_from:
        start = Start(_place(recorded.run.init_from), recorded.run.init_id)
        if start.is_named_by(cfg.run.init_from):
            return start, start.identity
    with _about("run.init_from"):
        location = store.locate(cfg.run.init_from)
    start = Start(str(location.address) if location.address else location.path)
    require_same_model(cfg, start)
    return start, start.identity


def _place(path: str) -> epath.Path | str:
    return path if hub.is_address(path) else epath.Path(path)


def _identity(path: epath.Path | str, sidecar: Sidecar) -> str:
    if not sidecar.source:
        raise UserError(
            f"{path} does not say what it is (its sidecar has an empty `source`); rewrite it with "
            "`source={'experiment': ..., 'step': ...}`"
        )
    content = [sidecar.objective, sidecar.model, sidecar.mask_id, _tokenizer_sha256(sidecar.tokenizer), sidecar.source]
    content += [sidecar.alignment, store.params_sha256(path)]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return f"{sidecar.source.get('experiment', 'unnamed')}@{sidecar.source.get('step', 0)}-{digest}"


@contextlib.contextmanager
def _about(option: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


def require_same_model(cfg: Config, start: Start) -> None:
    """Raise `UserError` unless the run can train the model of the start, as far as is known before there are data."""
    path, sidecar = start.path, start.sidecar
    model = config_io.from_dict(ModelConfig, sidecar.model)
    there, here = fingerprint.scientific_fields(model), fingerprint.scientific_fields(cfg.model)
    adapted = sidecar.objective == "arm" and cfg.objective == "mdm"
    differing = [name for name in here if name not in FREE and there[name] != here[name]]
    if adapted:
        differing = [name for name in differing if not conversion.is_convertible(name, there[name], here[name])]
    if differing:
        shown = ", ".join(f"model.{name} ({there[name]} there, {here[name]} here)" for name in differing)
        raise UserError(f"run.init_from={path} holds another model: {shown}; use the settings it was trained with")
    if not adapted:  # an autoregressive model has no mask yet
        _require_same_diffusion(cfg, path, sidecar)


def _require_same_diffusion(cfg: Config, path: epath.Path | str, sidecar: Sidecar) -> None:
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
        there, here = (sorted(ids) for ids in (sidecar.suppressed_ids, cfg.suppressed_ids))
        raise UserError(
            f"run.init_from={path} never predicts the ids {there}, this run {here}; set --diffusion.suppress_mask "
            f"{sidecar.mask_id in there}, or use another checkpoint"
        )


def _require_tokenizer(start: Start, dataset: Dataset | Mixture) -> None:
    there, here = _tokenizer_sha256(start.sidecar.tokenizer), dataset.metadata.tokenizer["sha256"]
    if there not in (None, here):
        fix = (
            f"prepare the data with `diffusionlm data prepare --tokenizer {start.path}`, and name them with --data.path"
        )
        raise UserError(
            f"run.init_from={start.path} has another tokenizer (sha256 {there[:12]}) than {dataset.path} "
            f"({here[:12]}); {fix}"
        )


def _tokenizer_sha256(tokenizer: dict | None) -> str | None:
    return tokenizer["sha256"] if tokenizer else None
