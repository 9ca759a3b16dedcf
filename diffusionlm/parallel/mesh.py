"""The device mesh, and the rules by which tensors are split over it.

Model code names dimensions ("batch", "embed", "heads", ...), and `RULES` maps the names to mesh axes. A mesh axis that
does not divide a dimension is dropped for that tensor, with one log line (LLaDA-1B's MLP width 5634, SMDM's 9 heads).
"""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusionlm.config import MeshConfig
from diffusionlm.errors import UserError
from diffusionlm.tree_types import PyTree, Shardings

log = logging.getLogger(__name__)

Array = jax.Array | np.ndarray  # on devices or in the memory of the host

AXES = ("data", "fsdp", "tensor")

# Logical dimension -> mesh axes, outermost first. Dimensions that are not listed are never split.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the (data, fsdp, tensor) mesh over `devices` (default: all), with sizes of -1 filled in.

    Devices are laid out for the interconnect: within a slice by `create_device_mesh`; several slices along "data",
    whose gradient all-reduce is the only traffic that the slow network between slices should carry.

    Raises:
      UserError: the product of the sizes is not the number of devices, or "data" is not a multiple of the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = cfg.sizes(len(devices))
    if math.prod(sizes) != len(devices):
        shape = f"mesh.data={cfg.data} x mesh.fsdp={cfg.fsdp} x mesh.tensor={cfg.tensor}"
        raise UserError(
            f"{shape} does not fit {len(devices)} device(s); the product must be {len(devices)} (-1 means the rest)"
        )
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices > 1:
        if sizes[0] % slices:
            raise UserError(f"mesh.data={sizes[0]} must be a multiple of the {slices} slices; set --mesh.data {slices}")
        within = (sizes[0] // slices, sizes[1], sizes[2])
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(np.asarray(grid), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def partition_spec(shape: Sequence[int], logical: Sequence[str | None], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """Return the mesh axes that split each dimension of a tensor, by the logical names of its dimensions."""
    used: set[str] = set()
    spec: list[str | tuple[str, ...] | None] = []
    for size, name in zip(shape, logical, strict=True):
        kept: list[str] = []
        for axis in RULES.get(name, ()) if name else ():
            ways = mesh_shape.get(axis, 1)
            if ways == 1 or axis in used:
                continue
            if size % (ways * math.prod(mesh_shape[a] for a in kept)):
                if size > 1:  # size 1 is the dummy batch of an initialisation
                    _log_dropped(axis, ways, name, size)
                continue
            kept.append(axis)
            used.add(axis)
        spec.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
    return PartitionSpec(*spec)


@functools.cache
def _log_dropped(axis: str, ways: int, name: str, size: int) -> None:
    log.warning(
        "mesh axis %s=%d does not divide dimension %s=%d: such tensors are not split over it", axis, ways, name, size
    )


def check_batch(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Check that every device gets the same number of whole sequences of each micro-batch.

    A weight that an axis does not divide is merely not split; a batch that is not split would be computed whole by
    every device.

    Raises:
      UserError: the batch size is not a multiple of devices and micro-batches.
    """
    ways = row_ways(mesh.shape)
    if batch_size % (ways * microbatches):
        raise UserError(
            f"data.batch_size={batch_size} in run.microbatches={microbatches} parts cannot be split over "
            f"mesh.data={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']} devices; use a multiple of "
            f"{ways * microbatches}, or other sizes of the mesh"
        )


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrain the layout of `x` by its logical dimensions, under the mesh of `jax.set_mesh`; do nothing without."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, logical, dict(mesh.shape)))


def row_ways(mesh_shape: Mapping[str, int] | None = None) -> int:
    """Return the number of parts that a mesh splits a batch into; None: the mesh of `jax.set_mesh`, or 1 without."""
    shape = jax.sharding.get_abstract_mesh().shape if mesh_shape is None else mesh_shape
    return math.prod(shape.get(axis, 1) for axis in RULES["batch"])


def rows_per_device(batch_size: int) -> int:
    """Return the number of rows of a batch on each device of the mesh of `jax.set_mesh`; all rows without a mesh."""
    shape = dict(jax.sharding.get_abstract_mesh().shape)
    axes = axis_names(partition_spec((batch_size,), ("batch",), shape)[0])
    return batch_size // math.prod(shape[axis] for axis in axes)


def axis_names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a `PartitionSpec`."""
    return axes if isinstance(axes, tuple) else (axes,) if axes else ()


def sum_over_rows(x: jax.Array, rows: tuple[str, ...], split: tuple[str, ...], dimension: int) -> jax.Array:
    """Sum gradients under `shard_map` over devices with different rows, and keep this device's part of the sum.

    Args:
      x: the sum over this device's rows, whole in `dimension`.
      rows: the mesh axes that split the rows.
      split: the mesh axes that split `dimension` of the result.
      dimension: a dimension of `x`.
    """
    both = tuple(axis for axis in split if axis in rows)
    if others := tuple(axis for axis in rows if axis not in split):
        x = jax.lax.psum(x, others)
    if both == split:
        return jax.lax.psum_scatter(x, both, scatter_dimension=dimension, tiled=True) if both else x
    # On an axis that does not split the rows all devices have the same sum.
    width = x.shape[dimension] // math.prod(jax.lax.axis_size(axis) for axis in split)
    x = jax.lax.psum(x, both) if both else x
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(split) * width, width, dimension)


def tree_shardings(boxed: PyTree, mesh: Mesh) -> Shardings:
    """Return a `NamedSharding` for each leaf of a tree of `nn.LogicallyPartitioned` (abstract) arrays.

    Leaves without names are replicated.
    """

    def leaf_sharding(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, partition_spec(leaf.value.shape, leaf.names, dict(mesh.shape)))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(leaf_sharding, boxed, is_leaf=_is_boxed)


def unbox(tree: PyTree) -> PyTree:
    """Return a tree without the names of its dimensions.

    `nn.unbox` would refuse abstract leaves under a mesh.
    """
    return jax.tree.map(lambda leaf: leaf.value if _is_boxed(leaf) else leaf, tree, is_leaf=_is_boxed)


def bytes_per_device(tree: PyTree) -> int:
    """Return the bytes that each device holds of arrays, or of shapes with dtypes and shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _is_boxed(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def batch_sharding(mesh: Mesh, batch_size: int, ndim: int = 2) -> NamedSharding:
    """Return the sharding of a global batch of `batch_size` rows and `ndim` dimensions."""
    return NamedSharding(
        mesh, partition_spec((batch_size,) + (1,) * (ndim - 1), ("batch",) + (None,) * (ndim - 1), dict(mesh.shape))
    )


def local_rows(mesh: Mesh, batch_size: int) -> list[tuple[int, int]]:
    """Return the (start, stop) row ranges of a global batch on this process's devices, in order, without overlap."""
    sharding = batch_sharding(mesh, batch_size, ndim=1)
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({index[0].indices(batch_size)[:2] for index in indices if index is not None})


def global_array(mesh: Mesh, batch_size: int, rows: list[tuple[int, int]], local: np.ndarray) -> jax.Array:
    """Return a global (batch_size, ...) array from the rows of this process, in the order of `local_rows`."""
    sharding = batch_sharding(mesh, batch_size, ndim=local.ndim)
    offsets = dict(zip(rows, np.cumsum([0] + [stop - start for start, stop in rows])[:-1], strict=True))

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        start, stop = index[0].indices(batch_size)[:2]
        return local[offsets[start, stop] : offsets[start, stop] + stop - start]

    return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, read)
