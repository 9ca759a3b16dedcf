"""Look up rows of a table by id, with a gradient that is summed in float32 before it crosses the mesh."""

import functools
import math

import jax
import jax.numpy as jnp

from diffusionlm.parallel.mesh import axis_names, constrain, partition_spec, sum_over_rows

SLAB = 1 << 27  # most float32 numbers of a gradient that a device sums at a time: 512 MiB


def look_up(
    table_VxD: jax.Array, ids_BxT: jax.Array, dtype: str, name: str | None = "vocab", batch: int | None = None
) -> jax.Array:
    """Return rows of a float32 table, with a gradient that is summed in float32.

    Half of all positions may hold one id, the mask's: a sum of that many gradients in bfloat16 stops growing.

    Args:
      table_VxD: the table.
      ids_BxT: int32 ids of rows.
      dtype: of the result.
      name: the logical dimension of the table's rows.
      batch: repeat the result of a single row of ids (B = 1) this many times; None: do not repeat it.

    Returns:
      (B, T, D), or (batch, T, D).
    """
    return _look_up(table_VxD, ids_BxT, dtype, name, batch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _look_up(table_VxD: jax.Array, ids_BxT: jax.Array, dtype: str, name: str | None, batch: int | None) -> jax.Array:
    # Rows gathered from a table that is split over its width would have to be resharded; gather the width first.
    x_BxTxD = constrain(table_VxD.astype(dtype), name, None)[ids_BxT]
    return x_BxTxD if batch is None else jnp.broadcast_to(x_BxTxD, (batch, *x_BxTxD.shape[1:]))


def _forward(
    table_VxD: jax.Array, ids_BxT: jax.Array, dtype: str, name: str | None, batch: int | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _look_up(table_VxD, ids_BxT, dtype, name, batch), (table_VxD, ids_BxT)


def _backward(
    dtype: str, name: str | None, batch: int | None, saved: tuple[jax.Array, jax.Array], grad_BxTxD: jax.Array
) -> tuple[jax.Array, None]:
    table_VxD, ids_BxT = saved
    mesh = dict(jax.sharding.get_abstract_mesh().shape)
    # Device by device: left to itself the compiler may send the gradients of all tokens to all devices, each of which
    # then adds a sliver of every token of the batch.
    body = functools.partial(_one_device, *table_VxD.shape, mesh)
    if mesh:
        ids, rows = (partition_spec(x.shape[:2], ("batch", None), mesh) for x in (ids_BxT, grad_BxTxD))
        table = partition_spec(table_VxD.shape, (name, "embed"), mesh)
        body = functools.partial(body, rows=axis_names(rows[0]), vocab=axis_names(table[0]), embed=axis_names(table[1]))
        body = jax.shard_map(body, in_specs=(ids, rows), out_specs=table, check_vma=False)
    return body(ids_BxT, grad_BxTxD).astype(table_VxD.dtype), None


_look_up.defvjp(_forward, _backward)


def _one_device(
    V: int,
    D: int,
    mesh: dict[str, int],
    ids_BxT: jax.Array,
    grad_BxTxD: jax.Array,
    *,
    rows: tuple[str, ...] = (),
    vocab: tuple[str, ...] = (),
    embed: tuple[str, ...] = (),
) -> jax.Array:
    """Return the part of the table's gradient that this device keeps.

    Args:
      V: rows of the whole table.
      D: its width.
      mesh: the sizes of the mesh axes.
      ids_BxT: this device's ids, or one row of them for all of its gradients.
      grad_BxTxD: its gradients.
      rows: the mesh axes that split the batch.
      vocab: those that split the table's rows.
      embed: those that split its width.
    """
    if vocab:
        V //= math.prod(mesh[axis] for axis in vocab)
        ids_BxT -= jax.lax.axis_index(vocab) * V
        ids_BxT = jnp.where(ids_BxT < 0, V, ids_BxT)  # a negative index would count from the end
    P = math.prod(mesh[axis] for axis in embed)
    W = D // P  # columns that each device keeps
    # In slabs of the same columns of every part, so that what is reduced is contiguous where it is kept.
    S = next(s for s in range(1, W + 1) if W % s == 0 and (V * D // s <= SLAB or s == W))
    B, T = grad_BxTxD.shape[:2]

    def slab(grad_BxTxPxE: jax.Array) -> jax.Array:
        grad_BxTxI = grad_BxTxPxE.reshape(B, T, D // S).astype(jnp.float32)
        if ids_BxT.shape[0] < B:
            grad_BxTxI = grad_BxTxI.sum(0, keepdims=True)
        grad_VxI = jnp.zeros((V, D // S), jnp.float32).at[ids_BxT].add(grad_BxTxI, mode="drop")
        return sum_over_rows(grad_VxI, rows, embed, 1)

    grad_SxBxTxPxE = jnp.moveaxis(grad_BxTxD.reshape(B, T, P, S, W // S), 3, 0)
    return jnp.moveaxis(jax.lax.map(slab, grad_SxBxTxPxE), 0, 1).reshape(V, W)
