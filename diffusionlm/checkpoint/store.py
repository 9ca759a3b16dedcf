"""Checkpoints: how they are written, found, restored and refused. The only module that imports Orbax.

A checkpoint is one directory that appears whole or not at all (Orbax writes under a temporary name, or on a bucket adds
a commit marker last):

    WORKDIR/checkpoints/<step>/
        params/             the parameters: all that a sampler reads
        train/              the rest of the train state: optimizer, step, next_index; absent from a params-only model
        sidecar/data.json   plain JSON that says what the parameters mean (`Sidecar`)

Every process of a run calls these functions; Orbax lets each write its own shards and the first one write the rest.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from diffusionlm import config, config_io
from diffusionlm.data.chat_templates import Template
from diffusionlm.errors import UserError, suggest

FORMAT, VERSION = "diffusionlm", 2  # 2: with a chat template
_SIDECAR = "sidecar/data.json"
_COMMIT = "commit_success.txt"  # Orbax writes it last


@dataclass(frozen=True)
class Sidecar:
    """What a reader must know beside the parameters; everything is plain JSON once `to_dict` has run."""

    objective: str  # mdm | arm
    model: dict  # ModelConfig as a dict
    diffusion: dict  # DiffusionConfig as a dict
    mask_id: int | None
    pad_id: int | None = None
    eos_id: int | None = None
    bos_id: int | None = None
    suppressed_ids: tuple[int, ...] = ()  # in-vocabulary ids that are never predicted
    alignment: str = "same"  # same: position i predicts token i; shifted: token i + 1
    tokenizer: dict | None = None  # the embedded tokenizer with its sha256
    canvas: dict = field(default_factory=dict)  # rules for the sampler's canvas: max_length
    source: dict = field(default_factory=dict)  # for people: experiment, fingerprint, dataset, versions, step, tokens
    template: dict | None = None  # how prompts are written, `templates.Template` as a dict; None: as they are

    @property
    def start_id(self) -> int | None:
        """What a text begins with, as documents did in training; EOS, which ends the one before, if nothing is said."""
        return self.canvas.get("start_id", self.eos_id)

    def to_dict(self) -> dict:
        values = dataclasses.asdict(self) | {"suppressed_ids": list(self.suppressed_ids)}
        if self.template is None:  # what earlier versions read as well
            return {"format": FORMAT, "version": 1, **{k: v for k, v in values.items() if k != "template"}}
        return {"format": FORMAT, "version": VERSION, **values}

    @classmethod
    def from_dict(cls, values: dict) -> "Sidecar":
        """Reads what `to_dict` wrote.

        Raises:
          UserError: another format, a newer version, or a field that this version cannot interpret.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT or not isinstance(values.get("version"), int):
            raise UserError(f"its sidecar is not of format {FORMAT!r}")
        if (version := values["version"]) > VERSION:
            raise UserError(f"written by a newer diffusionlm (version {version}); this one reads {VERSION}: upgrade")
        values = {k: v for k, v in values.items() if k not in ("format", "version")}
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise UserError(f"its sidecar has an unknown field {unknown[0]!r}{suggest(unknown[0], fields)}")
        if missing := [n for n in ("objective", "model", "diffusion", "mask_id") if n not in values]:
            raise UserError(f"its sidecar lacks the field {missing[0]!r}")
        for name, allowed in (("objective", ("mdm", "arm")), ("alignment", ("same", "shifted"))):
            if (value := values.get(name, allowed[0])) not in allowed:
                raise UserError(f"its sidecar has {name}={value!r}; this version knows {', '.join(allowed)}")
        if values["mask_id"] is None and values["objective"] == "mdm":
            raise UserError("its sidecar has objective='mdm' and no mask_id")
        # Unknown settings inside would change what the parameters mean, so they are refused here and not at first use.
        config_io.from_dict(config.ModelConfig, values["model"])
        config_io.from_dict(config.DiffusionConfig, values["diffusion"])
        if values.get("template") is not None:
            Template.from_dict(values["template"])
        return cls(**{**values, "suppressed_ids": tuple(values.get("suppressed_ids", ()))})


class CheckpointManager:
    """Saves and restores the train state of one run; when to save is the trainer's decision.

    Keeps the newest `keep` checkpoints and every one at a multiple of `keep_every` (0: no others). Saving is
    asynchronous: `save` returns once the state has left the device, so the caller may donate it at once. A failure
    surfaces at the next `save`, `wait` or `close`.
    """

    def __init__(self, workdir: epath.PathLike, keep: int, keep_every: int = 0):
        self._directory = absolute(workdir) / "checkpoints"
        policies = ocp.training.preservation_policies
        kept = [policies.LatestN(keep)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        with _writing(self._directory):
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
                context=_context(),
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            )
        for checkpoint in self._checkpointer.checkpoints:  # it would count among the newest and push whole ones out
            if not _is_whole(checkpoint.path):
                raise UserError(f"{checkpoint.path} is no whole diffusionlm checkpoint; move or delete it to continue")

    def latest_step(self) -> int | None:
        """The newest step that was saved, or is being saved; None where there is none."""
        latest = self._checkpointer.latest
        return latest and latest.step

    def save(self, step: int, state: Any, sidecar: Sidecar) -> None:
        """Starts saving `state` (a dataclass with params and anything else) as `step`; a step is saved only once."""
        if any(checkpoint.step == step for checkpoint in self._checkpointer.checkpoints):
            return
        items = {"params": state.params, "train": _rest(state), "sidecar": sidecar.to_dict()}
        with _writing(self._directory):
            self._checkpointer.save_checkpointables_async(step, items, force=True)

    def restore(self, abstract_state: Any, step: int | None = None) -> Any:
        """The state saved at `step` (the newest by default), on the shardings of `abstract_state`.

        Args:
          abstract_state: the train state with `jax.ShapeDtypeStruct` leaves that carry shardings, on any mesh.
          step: a saved step.

        Raises:
          UserError: nothing was saved, the state has other tensors, or a file is damaged.
        """
        self.wait()
        step = self.latest_step() if step is None else step
        if step is None:
            raise UserError(f"{self._directory} holds no checkpoint to restore")
        path, items = self._directory / str(step), {"params": abstract_state.params, "train": _rest(abstract_state)}
        saved = {item: _saved(path, item) for item in items}
        if differ := sorted(set(saved["train"]) ^ set(items["train"])):
            raise UserError(
                f"{path} holds the train state of another version, which differs in {', '.join(differ)}; train anew in "
                "another directory, or go on with the version that wrote it (its parameters can be used as before)"
            )
        for item, tree in items.items():
            _require_same_shapes(path, saved[item], tree)
        items = {item: _load(path, item, tree) for item, tree in items.items()}
        return abstract_state.replace(params=items["params"], **items["train"])

    def sidecar(self, step: int) -> Sidecar:
        """The sidecar saved at `step`."""
        return load_sidecar(self._directory / str(step))

    def wait(self) -> None:
        """Blocks until the save in flight is on disk."""
        with _writing(self._directory):
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits, then releases what Orbax holds."""
        with _writing(self._directory):
            self._checkpointer.close()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def find(path: epath.PathLike) -> epath.Path:
    """The checkpoint that `path` names.

    Args:
      path: a run directory or its checkpoints/ (the newest whole step), one step, or a params-only model.

    Raises:
      UserError: there is nothing there, nothing of ours, or only what an interrupted save left.
    """
    path = absolute(path)
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: it {'is a file' if path.exists() else 'does not exist'}; {_WANTED}")
    if _is_whole(path):
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    try:
        children = [child for child in root.iterdir() if child.is_dir()]
    except OSError as error:
        raise UserError(f"cannot read {root}: {error.strerror}") from error
    steps = [child for child in children if child.name.isdigit()]
    for step in sorted(steps, key=lambda child: int(child.name), reverse=True):
        if _is_whole(step):
            return step
    if any(_has_parts(directory) for directory in (path, *children)):
        raise UserError(f"{path} holds only an incomplete checkpoint (an interrupted save or copy); {_WANTED}")
    if any(child.suffix == ".safetensors" for child in path.glob("*")):
        raise UserError(f"{path} holds released weights; make a checkpoint of them: diffusionlm import {path}")
    raise UserError(f"{path} holds no diffusionlm checkpoint; {_WANTED}")


def params_sha256(path: epath.PathLike) -> str:
    """A hash that copies of a checkpoint's parameters share and no other checkpoint has, in whatever dtype.

    It is of the index of the files, in which Orbax names each by a random number.
    """
    path = find(path)
    with _reading(path):
        return hashlib.sha256((path / "params/manifest.ocdbt").read_bytes()).hexdigest()


def load_sidecar(path: epath.PathLike) -> Sidecar:
    """The sidecar of the checkpoint that `path` names (see `find`)."""
    path = find(path)
    try:
        return Sidecar.from_dict(json.loads((path / _SIDECAR).read_text()))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"cannot read {path / _SIDECAR}, it is damaged: {error}") from error


def load_params(path: epath.PathLike, dtype: Any = None, shardings: Any = None, expected: Any = None) -> Any:
    """The parameters alone; the optimizer's files are not opened.

    Args:
      path: what `find` takes.
      dtype: of the result, converted while reading; None: as saved.
      shardings: one sharding, or a pytree of them like the parameters, on any mesh; None: this process's first device.
      expected: the parameters of the caller's model (arrays or `jax.ShapeDtypeStruct`), whose names and shapes must
        be those saved.

    Raises:
      UserError: nothing of ours at `path`, another architecture than `expected`, or a damaged file.
    """
    path = find(path)
    saved = _saved(path, "params")
    if expected is not None:
        _require_same_shapes(path, saved, expected)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, saved)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding),
        saved,
        shardings,
    )
    return _load(path, "params", abstract)


def saved_params(path: epath.PathLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each parameter of a checkpoint by name, "blocks/q" for instance; no array is read."""
    flat = traverse_util.flatten_dict(_saved(find(path), "params"), sep="/")
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}


def load_some(path: epath.PathLike, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Some of the parameters that `saved_params` lists, in the memory of this host; others are not read."""
    # Orbax reads into the host where it is asked for NumPy arrays; these take no memory themselves.
    flat = {name: np.broadcast_to(np.empty((), leaf.dtype), leaf.shape) for name, leaf in wanted.items()}
    context = _context()
    context.pytree.loading.partial_load = True
    with context:
        found = _load(find(path), "params", traverse_util.unflatten_dict(flat, sep="/"))
    return traverse_util.flatten_dict(found, sep="/")


def save_params(directory: epath.PathLike, params: Any, sidecar: Sidecar, *, compress: bool = True) -> None:
    """Writes a params-only checkpoint as `directory`, in the dtypes of `params`; returns when it is on disk.

    Args:
      directory: a new one.
      params: JAX or NumPy arrays.
      sidecar: what they mean.
      compress: makes files of float32 a tenth smaller, and takes as much memory again as the parameters.

    Raises:
      UserError: `directory` exists, or cannot be written.
    """
    directory = absolute(directory)
    if directory.exists():
        raise UserError(f"{directory} exists; delete it or choose another directory")
    context = _context()
    context.array.saving.use_compression = compress
    context.memory.deepcopy_host_arrays = False  # nobody changes them meanwhile
    with _writing(directory), context:
        ocp.save_checkpointables(directory, {"params": params, "sidecar": sidecar.to_dict()})
        if jax.process_index() == 0:  # Orbax puts the absolute path here, which a model that is shared should not carry
            (directory / _COMMIT).write_text("complete\n")


_WANTED = "give a run directory, a step of its checkpoints, or a params-only model"


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that means the same wherever it is read."""
    path = epath.Path(path)
    return path if path.is_absolute() else path.resolve()  # resolve() would break the URL of a bucket


def _context() -> ocp.Context:
    _quieten()
    context = ocp.Context()
    # By itself Orbax stores a dict of strings as arrays; this makes the sidecar a JSON file.
    registry = ocp.handlers.local_registry().add(ocp.handlers.JsonHandler, checkpointable_name="sidecar")
    context.checkpointables.registry = registry
    # A directory that cannot be made is then an error of the call, not of a thread for which the others wait minutes.
    context.asynchronous.create_directories_asynchronously = False
    return context


def _rest(state: Any) -> dict[str, Any]:
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "params"}


def _is_whole(directory: epath.Path) -> bool:
    _quieten()
    parts = ("_CHECKPOINT_METADATA", "params/_METADATA", "params/manifest.ocdbt", _SIDECAR)
    return all((directory / part).exists() for part in parts) and ocp.is_orbax_checkpoint(directory)


def _has_parts(directory: epath.Path) -> bool:
    return (directory / "params").exists() or (directory / "sidecar").exists()


def _saved(path: epath.Path, item: str) -> Any:
    """The tree of one item as saved: leaves have shape and dtype."""
    with _reading(path):
        _quieten()
        if (tree := ocp.metadata(path, item).metadata) is None:  # Orbax has only logged why
            raise ValueError(f"the index of {item}/")
        return tree


def _load(path: epath.Path, item: str, abstract: Any) -> Any:
    with _reading(path):
        return ocp.load(path, abstract, checkpointable_name=item)


def _require_same_shapes(path: epath.Path, saved: Any, wanted: Any) -> None:
    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(name, simple=True, separator="/"): tuple(leaf.shape) for name, leaf in leaves}

    saved, wanted = shapes(saved), shapes(wanted)
    differing = [name for name in sorted(saved | wanted) if saved.get(name) != wanted.get(name)]
    if differing:
        shown = ", ".join(f"{n} saved {saved.get(n, 'absent')} wanted {wanted.get(n, 'absent')}" for n in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{path} holds other tensors than this model: {shown}{more}; use the settings it was saved with"
        )


def _root(error: BaseException) -> BaseException:
    return _root(error.__cause__) if error.__cause__ else error  # Orbax wraps what was said below it


def _is_storage(error: BaseException) -> bool:
    """TensorStore raises ValueErrors that begin with the name of a status."""
    return isinstance(error, ValueError) and bool(re.match(r"[A-Z_]+: ", str(error)))


def _reason(error: BaseException) -> str:
    error = _root(error)
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    return textwrap.shorten(str(error) or type(error).__name__, 200)


@contextlib.contextmanager
def _reading(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file surfaces as any of a dozen types
        if isinstance(_root(error), (jax.errors.JaxRuntimeError, MemoryError)):  # the devices or the host
            raise
        raise UserError(f"cannot read the checkpoint {path}, a file is damaged or missing: {_reason(error)}") from error


@contextlib.contextmanager
def _writing(directory: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(_root(error), OSError) or _is_storage(_root(error)):
            raise UserError(f"cannot write checkpoints to {directory}: {_reason(error)}") from error
        raise


# Orbax logs every save at length, and a failure many times over on three channels, some of it long after the call. All
# failures are raised above, as one line, so that is dropped; with an explicit absl verbosity its own log is shown.


def _of_orbax(filename: str) -> bool:
    return os.path.join("orbax", "checkpoint") in filename


def _keep_absl(record: logging.LogRecord) -> bool:
    return logging.getLogger("absl").level != logging.NOTSET or not _of_orbax(record.pathname)


def _keep_asyncio(record: logging.LogRecord) -> bool:
    """Drops tasks that failed beside the one that was reported."""
    return not (record.exc_info and _is_storage(_root(record.exc_info[1])))


def _report(unraisable: Any, report: Callable[[Any], Any]) -> None:
    """Drops parts that were in flight: they end after Orbax has closed the event loop that they belong to."""
    code = getattr(unraisable.object, "cr_code", None)
    late = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
    if not late and not (code and _of_orbax(code.co_filename)):
        report(unraisable)


def _quieten() -> None:
    """Sets the filters above, unless they are set: before Orbax is called, as importing this module changes nothing."""
    logging.getLogger("absl").addFilter(_keep_absl)
    logging.getLogger("asyncio").addFilter(_keep_asyncio)
    if getattr(sys.unraisablehook, "func", None) is not _report:
        sys.unraisablehook = functools.partial(_report, report=sys.unraisablehook)
