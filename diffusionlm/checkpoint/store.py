"""Write, find, restore and reject checkpoints. This is the only module that imports Orbax.

A checkpoint is one directory that appears whole or not at all (Orbax writes under a temporary name, or on a bucket adds
a commit marker last):

    WORKDIR/checkpoints/<step>/
        params/             the parameters: all that a sampler reads
        train/              the rest of the train state: optimizer, step, next_index; absent from a params-only model
        sidecar/data.json   plain JSON that says what the parameters mean (`Sidecar`)
        integrity/data.json checksums of what has none of its own (see `integrity`)

Every process of a run calls these functions; Orbax lets each write its own shards and the first one write the rest.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils

from diffusionlm import hub
from diffusionlm.checkpoint import deletion, integrity
from diffusionlm.checkpoint import sidecar as sidecar_lib
from diffusionlm.checkpoint.failures import reading, writing
from diffusionlm.checkpoint.location import Location
from diffusionlm.checkpoint.quiet import quieten
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.errors import UserError
from diffusionlm.storage import run_path
from diffusionlm.tree_types import Params, PyTree, Shardings
from diffusionlm.untrusted import kind_of

log = logging.getLogger(__name__)

_COMMIT = "commit_success.txt"  # Orbax writes it last
_HINT = "give a run directory, a step of its checkpoints, or a params-only model"


class CheckpointManager:
    """Saves and restores the train state of one run; the caller decides when.

    Saving is asynchronous: `save` returns once the state has left the device, so the caller may donate it at once. A
    failure surfaces at the next `save`, `wait` or `close`.

    Args:
      workdir: the run directory.
      keep: how many of the newest checkpoints stay.
      keep_every: checkpoints at its multiples stay too; 0: no others.

    Raises:
      UserError: the directory holds something that is not a complete checkpoint, or cannot be written.
    """

    def __init__(self, workdir: epath.PathLike, keep: int, keep_every: int = 0):
        self._directory = absolute(workdir) / "checkpoints"
        with writing(self._directory):
            if jax.process_index() == 0 and (names := deletion.remove_leftovers(self._directory)):
                log.warning(f"{self._directory}: finished deleting step {', '.join(names)}, which a kill had cut short")
            # Orbax would delete in place, and a kill meanwhile would leave half a step.
            policy = ocp.training.preservation_policies.PreserveAll()
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
                context=_context(),
                # Orbax annotates its policies and what takes them differently.
                preservation_policy=policy,  # pyright: ignore[reportArgumentType]
                cleanup_tmp_directories=True,
            )
        self._steps = self._whole_steps()
        self._saving: int | None = None
        self._deleter = deletion.Deleter(self._directory, keep, keep_every)

    def _whole_steps(self) -> list[int]:
        """Return the steps that were saved, in order; of others, which are left alone, say that they are ignored."""
        checkpoints = self._checkpointer.checkpoints
        damaged = [checkpoint for checkpoint in checkpoints if not _is_whole(checkpoint.path)]
        if damaged and damaged[-1].step == checkpoints[-1].step:  # nobody should resume before it unawares
            raise UserError(f"{damaged[-1].path} is not a complete diffusionlm checkpoint; move or delete it")
        if damaged and jax.process_index() == 0:
            names = ", ".join(str(checkpoint.step) for checkpoint in damaged)
            log.warning(f"{self._directory}: ignored step {names}, no complete checkpoint; a newer one is complete")
        return [checkpoint.step for checkpoint in checkpoints if checkpoint not in damaged]

    def latest_step(self) -> int | None:
        """Return the newest step that was saved, or is being saved; None if there is none."""
        return max(self._steps, default=None) if self._saving is None else self._saving

    def save(self, step: int, state: PyTree, sidecar: Sidecar) -> None:
        """Start saving `state` as `step`; a step that was saved before is left unchanged.

        Args:
          step: names the checkpoint.
          state: a dataclass with `params` and anything else.
          sidecar: what the parameters mean.

        Raises:
          UserError: the checkpoint, or the one before, cannot be written.
        """
        if step in (*self._steps, self._saving):
            return
        self._finish_save()
        items = {"params": state.params, "train": _train_items(state)}
        checkpointables = _with_sidecar(items, sidecar)
        with writing(self._directory):
            self._checkpointer.save_checkpointables_async(step, checkpointables, force=True)
        self._saving = step
        self._delete_old()

    def restore(self, abstract_state: PyTree, step: int | None = None) -> PyTree:
        """Return the state saved at `step`, the newest by default, on the shardings of `abstract_state`.

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
        return load_state(self._directory / str(step), abstract_state)

    def sidecar(self, step: int) -> Sidecar:
        """Return the sidecar saved at `step`."""
        return load_sidecar(self._directory / str(step))

    def wait(self) -> None:
        """Block until the save in flight is on disk, and checkpoints that it replaces are deleted.

        Raises:
          UserError: it cannot be written, or they cannot be deleted.
        """
        self._finish_save()
        self._delete_old()
        with writing(self._directory):
            self._deleter.finish()

    def close(self) -> None:
        """Wait, then release what Orbax holds."""
        try:
            self.wait()
        finally:
            with writing(self._directory):
                self._checkpointer.close()

    def _finish_save(self) -> None:
        saving, self._saving = self._saving, None
        with writing(self._directory):
            self._checkpointer.wait()
        if saving is not None:
            self._steps.append(saving)

    def _delete_old(self) -> None:
        """Start to delete what is neither among the newest on disk nor kept for good."""
        with writing(self._directory):
            self._steps = self._deleter.start(self._steps)

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def locate(path: epath.PathLike) -> Location:
    """Return where the checkpoint is that `path` names; say once which newer steps are passed over.

    Args:
      path: a run directory or its checkpoints/ (the newest whole step), one step, a params-only model, or the address
        of one on the Hugging Face Hub, which is fetched (hf://OWNER/NAME, see `hub`).

    Raises:
      UserError: there is nothing, no checkpoint of ours, only what an interrupted save left, or the Hub refuses.
    """
    if hub.is_address(path):
        fetched = hub.fetch(str(path))
        if not _is_whole(epath.Path(fetched.path)):
            raise UserError(
                f"{fetched.address} is not on this disk whole (connect, so that the rest is fetched), or holds no "
                "diffusionlm checkpoint"
            )
        return Location(epath.Path(fetched.path), address=fetched.address)
    path = absolute(path)
    if not path.is_dir():
        state = f"is {kind_of(path)}, not a directory" if path.exists() else "does not exist"
        raise UserError(f"no checkpoint at {path}: it {state}; {_HINT}")
    if _is_whole(path):
        return Location(path)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    try:
        children = [child for child in root.iterdir() if child.is_dir()]
    except OSError as error:
        raise UserError(f"cannot read {root}: {error.strerror}") from error
    steps = sorted((child for child in children if child.name.isdigit()), key=lambda child: int(child.name))[::-1]
    for i, step in enumerate(steps):
        if _is_whole(step):
            if i:
                damaged = ", ".join(newer.name for newer in steps[:i])
                integrity.warn_once(f"{root}: passed over step {damaged}, which lacks a part; using step {step.name}")
            return Location(step, tuple(newer.name for newer in steps[:i]))
    if any(_has_parts(directory) for directory in (path, *children)):
        raise UserError(f"{path} holds only an incomplete checkpoint (an interrupted save or copy); {_HINT}")
    if any(child.suffix == ".safetensors" for child in path.glob("*")):
        raise UserError(f"{path} holds released weights; make a checkpoint of them: diffusionlm import {path}")
    raise UserError(f"{path} holds no diffusionlm checkpoint; {_HINT}")


def find(path: epath.PathLike) -> epath.Path:
    """Return the directory of the checkpoint that `path` names (see `locate`)."""
    return locate(path).path


def params_sha256(path: epath.PathLike) -> str:
    """Return a hash that copies of a checkpoint's parameters share and no other checkpoint has.

    It is of the index of the files, in which Orbax names each by a random number: the same parameters, saved twice,
    have two hashes.
    """
    path = find(path)
    with reading(path, "params"):
        return hashlib.sha256((path / "params/manifest.ocdbt").read_bytes()).hexdigest()


def load_sidecar(path: epath.PathLike) -> Sidecar:
    """Return the sidecar of the checkpoint that `path` names (see `find`).

    Raises:
      UserError: there is no checkpoint, or its sidecar cannot be read, is damaged or is not understood.
    """
    return integrity.read_sidecar(find(path))


def load_params(
    path: epath.PathLike,
    dtype: jax.typing.DTypeLike | None = None,
    shardings: Shardings = None,
    expected: Params | None = None,
) -> Params:
    """Return the parameters alone; the optimizer's files are not opened.

    Args:
      path: what `find` takes.
      dtype: of the result, converted while reading; None: as saved.
      shardings: one sharding, or a tree of them like the parameters, on any mesh; None: this process's first device.
      expected: the parameters of the caller's model (arrays or `jax.ShapeDtypeStruct`), whose names and shapes must
        be those saved.

    Raises:
      UserError: there is no checkpoint, it has another architecture than `expected`, or a file is damaged.
    """
    path = find(path)
    saved = _saved_tree(path, "params")
    if expected is not None:
        integrity.require_same_shapes(path, saved, expected)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        sharding = shardings
        shardings = jax.tree.map(lambda _: sharding, saved)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding),
        saved,
        shardings,
    )
    return _load(path, "params", abstract)


def load_state(path: epath.Path, abstract_state: PyTree) -> PyTree:
    """Return the train state of one step, as `CheckpointManager.restore` does, and leave its run alone."""
    items = {"params": abstract_state.params, "train": _train_items(abstract_state)}
    saved = {item: _saved_tree(path, item) for item in items}
    if differ := sorted(set(saved["train"]) ^ set(items["train"])):
        raise UserError(
            f"{path} holds the train state of another version, which differs in {', '.join(differ)}; start a new "
            "run in another directory, or resume with the version that wrote it (its parameters can still be used)"
        )
    for item, tree in items.items():
        integrity.require_same_shapes(path, saved[item], tree)
    restored = {item: _load(path, item, tree) for item, tree in items.items()}
    return dataclasses.replace(abstract_state, params=restored["params"], **restored["train"])


def param_shapes(path: epath.PathLike) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape and dtype of each parameter of a checkpoint by name, such as "blocks/q"; no array is read."""
    flat: dict[str, Any] = traverse_util.flatten_dict(_saved_tree(find(path), "params"), sep="/")
    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}


def load_subset(path: epath.PathLike, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Load some of the parameters that `param_shapes` lists into the memory of this host; others are not read."""
    # Orbax reads into the host where it is asked for NumPy arrays; these take no memory themselves.
    flat = {name: np.broadcast_to(np.empty((), leaf.dtype), leaf.shape) for name, leaf in shapes.items()}
    context = _context()
    context.pytree.loading.partial_load = True
    with context:
        params = _load(find(path), "params", traverse_util.unflatten_dict(flat, sep="/"))
    arrays: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    return arrays


def save_params(directory: epath.PathLike, params: Params, sidecar: Sidecar, *, compress: bool = True) -> None:
    """Write a params-only checkpoint as `directory`, in the dtypes of `params`; return when it is on disk.

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
    with writing(directory), context:
        ocp.save_checkpointables(directory, _with_sidecar({"params": params}, sidecar))
        if jax.process_index() == 0:  # Orbax puts the absolute path here, which a model that is shared should not carry
            (directory / _COMMIT).write_text("complete\n")


def absolute(path: epath.PathLike) -> epath.Path:
    """Return a path that means the same wherever it is read."""
    path = run_path(path)
    return path if path.is_absolute() else path.resolve()  # resolve() would break the URL of a bucket


def _context() -> ocp.Context:
    quieten()
    context = ocp.Context()
    # By itself Orbax stores a dict of strings as arrays; this makes the sidecar a JSON file.
    registry = ocp.handlers.local_registry()
    for item in ("sidecar", integrity.ITEM):
        registry = registry.add(ocp.handlers.JsonHandler, checkpointable_name=item)
    context.checkpointables.registry = registry
    # A directory that cannot be made is then an error of the call, not of a thread for which the others wait minutes.
    context.asynchronous.create_directories_asynchronously = False
    return context


def _with_sidecar(items: Mapping[str, PyTree], sidecar: Sidecar) -> dict[str, Any]:
    """Return what a checkpoint of `items` holds."""
    values = sidecar.to_dict()
    return {**items, "sidecar": values, integrity.ITEM: integrity.digests(values, items, _checksum_chunks())}


def _checksum_chunks() -> Literal["checksums", "none"]:
    """Make Orbax, which has no option for it, write arrays whose chunks end with a checksum, and say what they have."""
    build = getattr(tensorstore_utils, "_build_zarr3_metadata", None)
    if build is None:  # another version of Orbax
        return "none"
    if not hasattr(build, "__wrapped__"):
        tensorstore_utils._build_zarr3_metadata = integrity.with_checksums(build)
    return "checksums"


def _train_items(state: PyTree) -> dict[str, PyTree]:
    """Return the fields of a train state other than its parameters."""
    return {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "params"}


def _is_whole(directory: epath.Path) -> bool:
    quieten()
    parts = ("_CHECKPOINT_METADATA", "params/_METADATA", "params/manifest.ocdbt", sidecar_lib.FILE)
    return all((directory / part).exists() for part in parts) and ocp.is_orbax_checkpoint(directory)


def _has_parts(directory: epath.Path) -> bool:
    return (directory / "params").exists() or (directory / "sidecar").exists()


def _saved_tree(path: epath.Path, item: str) -> PyTree:
    """Return the tree of one item as saved, whose leaves have shape and dtype."""
    with reading(path, item):
        quieten()
        if (tree := ocp.metadata(path, item).metadata) is None:  # Orbax has only logged why
            raise ValueError("its index cannot be read")
    integrity.require_same_tree(path, item, tree, path / item / "_METADATA")
    return tree


def _load(path: epath.Path, item: str, abstract: PyTree) -> PyTree:
    with reading(path, item):
        return ocp.load(path, abstract, checkpointable_name=item)
