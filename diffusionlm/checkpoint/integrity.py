"""Checksums of what a checkpoint holds, so that a flipped bit is an error and not another model.

Arrays carry their own, which TensorStore computes as it writes and checks as it reads: each chunk ends with Zstandard's
checksum, which is cheaper, or with a CRC-32C if it is not compressed (codecs of Zarr 3), and the index of the chunks
(OCDBT) with a CRC-32C. The JSON around them has none. For it `integrity/data.json`, which appears with its step, holds
the SHA-256 of the sidecar and of the names, shapes and dtypes of the arrays of each item. What is compared is what was
understood, not bytes: white space may differ.
"""

import functools
import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import msgspec
from etils import epath

from diffusionlm import schema
from diffusionlm.checkpoint import sidecar as sidecar_lib
from diffusionlm.errors import UserError
from diffusionlm.tree_types import PyTree

log = logging.getLogger(__name__)

ITEM = "integrity"
FILE = f"{ITEM}/data.json"


class Digests(schema.Record, frozen=True):
    """The content of `integrity/data.json`."""

    version: Literal[1]
    chunks: Literal["checksums", "none"]  # what the arrays' chunks end with
    sidecar: str
    trees: dict[str, str]  # by item
    sha256: str  # of the other fields


def digests(sidecar: Mapping[str, Any], trees: Mapping[str, PyTree], chunks: str) -> dict[str, Any]:
    """Return what to write as `integrity/data.json`.

    Args:
      sidecar: the content of the sidecar's file.
      trees: the items, of arrays or anything with shape and dtype.
      chunks: what the arrays' chunks end with.
    """
    values: dict[str, Any] = {"version": 1, "chunks": chunks, "sidecar": json_digest(sidecar)}
    values["trees"] = {item: tree_digest(tree) for item, tree in trees.items()}
    return values | {"sha256": json_digest(values)}


def json_digest(values: Any) -> str:
    """Return the SHA-256 of values in JSON types, whatever the order of their fields."""
    return hashlib.sha256(msgspec.json.encode(values, order="sorted")).hexdigest()


def tree_digest(tree: PyTree) -> str:
    """Return the SHA-256 of the names, shapes and dtypes of a tree's arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    described = sorted(
        (jax.tree_util.keystr(name, simple=True, separator="/"), list(leaf.shape), str(leaf.dtype))
        for name, leaf in leaves
    )
    return json_digest(described)


def with_checksums(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return `build`, which makes the metadata of a Zarr 3 array with one sharding codec, with checksums of chunks."""

    @functools.wraps(build)
    def build_with_checksums(*args: Any, **kwargs: Any) -> dict[str, Any]:
        metadata = build(*args, **kwargs)
        (sharding,) = metadata["codecs"]
        codecs = sharding["configuration"]["codecs"]
        if codecs[-1]["name"] == "zstd":
            codecs[-1]["configuration"]["checksum"] = True
        else:
            codecs.append({"name": "crc32c"})
        return metadata

    return build_with_checksums


def read(step: epath.Path) -> Digests | None:
    """Return the digests of a checkpoint; None, and a line that says so once, if it was saved without them.

    Raises:
      UserError: the file is damaged.
    """
    file = step / FILE
    if not (step / ITEM).exists():
        _warn_unverifiable(step)
        return None
    try:
        stored = schema.read_json(file, Digests)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    values = msgspec.to_builtins(stored)
    if json_digest({name: value for name, value in values.items() if name != "sha256"}) != stored.sha256:
        raise _damaged(file)
    if stored.chunks == "none":
        _warn_unverifiable(step)
    return stored


def read_sidecar(step: epath.Path) -> sidecar_lib.Sidecar:
    """Return the sidecar of a checkpoint, of which the parameters need not be there.

    Raises:
      UserError: it cannot be read, is not understood, or is not the one that was saved.
    """
    file = step / sidecar_lib.FILE
    sidecar, stored = sidecar_lib.read(file), read(step)
    if stored and json_digest(schema.read_json(file, dict[str, Any])) != stored.sidecar:
        raise _damaged(file)
    return sidecar


def require_same_tree(step: epath.Path, item: str, tree: PyTree, file: epath.Path) -> None:
    """Raise `UserError` if the arrays of an item have other names, shapes or dtypes than when it was saved.

    Args:
      step: the checkpoint.
      item: one of its items.
      tree: the item as its index describes it.
      file: the part of the index that no checksum covers.
    """
    stored = read(step)
    if stored and tree_digest(tree) != stored.trees.get(item):
        raise _damaged(file)


def require_same_shapes(path: epath.Path, saved: PyTree, expected: PyTree) -> None:
    """Raise `UserError` if a checkpoint holds other names or shapes than a model has."""

    def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(name, simple=True, separator="/"): tuple(leaf.shape) for name, leaf in leaves}

    saved_shapes, expected_shapes = shapes(saved), shapes(expected)
    names = sorted(saved_shapes | expected_shapes)
    differing = [name for name in names if saved_shapes.get(name) != expected_shapes.get(name)]
    if differing:
        shown = ", ".join(
            f"{name} saved {saved_shapes.get(name, 'absent')} wanted {expected_shapes.get(name, 'absent')}"
            for name in differing[:3]
        )
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{path} holds other tensors than this model: {shown}{more}; use the settings it was saved with"
        )


def _damaged(file: epath.Path) -> UserError:
    return UserError(f"{file} is damaged: it differs from what was saved; use another checkpoint, or a copy")


def _warn_unverifiable(step: epath.Path) -> None:
    warn_once(
        f"{step} has no checksums (it is of an earlier version, or a part of it is missing): damage cannot be noticed"
    )


@functools.cache
def warn_once(line: str) -> None:
    """Log a line on the first process, unless it was logged before."""
    if jax.process_index() == 0:
        log.warning(line)
