"""The cross-entropy of labels under the vocabulary projection, with the logits of a chunk of tokens at a time.

Training uses `weighted_cross_entropy`: it projects only the positions that are predicted, and computes gradients while
it has their logits, so that nothing is computed twice. `cross_entropy` returns one number for each position.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from diffusionlm.parallel.mesh import axis_names, partition_spec, rows_per_device, sum_over_rows

LOOP = "vocabulary"  # the name scope of the loop over chunks, by which the compile check recognises it


def cross_entropy(
    head: Callable[[jax.Array], jax.Array],
    hidden_BxTxD: jax.Array,
    labels_BxT: jax.Array,
    suppressed_V: jax.Array,
    chunk: int,
) -> jax.Array:
    """Return -log softmax(logits)[label] without suppressed ids, in float32 nats (B, T); not to be differentiated.

    Chunks are cut along T, which no mesh axis splits.

    Args:
      head: a function from hidden states (B, t, D) to raw float32 logits (B, t, V).
      hidden_BxTxD: final hidden states.
      labels_BxT: int32 ids; none may be suppressed.
      suppressed_V: bool, ids that get no probability.
      chunk: the most tokens that each device projects at a time, but at least one position of each of its rows.
    """

    def nll(hidden_BxCxD: jax.Array, labels_BxC: jax.Array) -> jax.Array:
        logits_BxCxV = jnp.where(suppressed_V[None, None], -jnp.inf, head(hidden_BxCxD))
        label_BxC = jnp.take_along_axis(logits_BxCxV, labels_BxC[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BxCxV, axis=-1) - label_BxC

    B, T, D = hidden_BxTxD.shape
    C = min(T, max(1, chunk // rows_per_device(B)))
    if C == T:
        return nll(hidden_BxTxD, labels_BxT)
    S = -(-T // C)
    padding = ((0, 0), (0, S * C - T))  # the result is cut back to T below
    hidden_SxBxCxD = jnp.pad(hidden_BxTxD, (*padding, (0, 0))).reshape(B, S, C, D).swapaxes(0, 1)
    labels_SxBxC = jnp.pad(labels_BxT, padding).reshape(B, S, C).swapaxes(0, 1)
    nll_SxBxC = jax.lax.map(lambda x: nll(*x), (hidden_SxBxCxD, labels_SxBxC))
    return nll_SxBxC.swapaxes(0, 1).reshape(B, S * C)[:, :T]


def weighted_cross_entropy(
    hidden_BxTxD: jax.Array,
    head_DxV: jax.Array,
    labels_BxT: jax.Array,
    weight_BxT: jax.Array,
    counted_BxT: jax.Array,
    suppressed_V: jax.Array,
    chunk: int,
    share: float,
    group_B: jax.Array | None = None,
    groups: int = 1,
    source_B: jax.Array | None = None,
    sources: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Return the sum of weight * nll over the counted positions, where nll = -log softmax(logits)[label], and of nll.

    Each device collects its counted positions and projects them to the vocabulary in as many chunks as it needs, so
    that all of them are projected and no others. Gradients are computed along with the loss, chunk by chunk, and are
    reduced over the mesh once, at the end. If devices split the vocabulary, they exchange two numbers for each
    position. Logits exist for one chunk at a time. Only the first sum is differentiable.

    Args:
      hidden_BxTxD: final hidden states, in the dtype of the matmuls.
      head_DxV: the projection, float32.
      labels_BxT: int32 ids; no counted label may be suppressed.
      weight_BxT: float32; 0 where not counted.
      counted_BxT: bool, where a label is predicted.
      suppressed_V: bool, ids that get no probability.
      chunk: the most tokens that each device projects at a time.
      share: the usual share of counted positions, from which the size of chunks is chosen.
      group_B: int32 in [0, groups), the group of each row; None: all are in group 0.
      groups: the number of groups of rows, such as levels of noise.
      source_B: int32 in [0, sources), another grouping of the rows, by the dataset that they come from.
      sources: the number of these groups; 0: there are none.

    Returns:
      The first sum, a float32 scalar in nats; and, float32 (2, groups + sources), the sum of nll and the count of
      positions in each group of rows, followed by the sum of weight * nll and that count for each source.
    """
    B, T = labels_BxT.shape
    shape = dict(jax.sharding.get_abstract_mesh().shape)
    rows = partition_spec((B,), ("batch",), shape)[0]
    embed, vocab = partition_spec(head_DxV.shape, ("embed", "vocab"), shape)
    C = head_chunk(rows_per_device(B), T, chunk, share)
    bias_V = jnp.where(suppressed_V, -jnp.inf, 0.0)
    split = _Split(axis_names(rows), axis_names(embed), axis_names(vocab))
    group_B = jnp.zeros(B, jnp.int32) if group_B is None else group_B
    inputs = (hidden_BxTxD, head_DxV, labels_BxT, weight_BxT, counted_BxT, group_B, bias_V)
    source_B = source_B if sources else None
    return _sums(C, (groups, sources), split, _Inputs(*map(jnp.asarray, inputs), source_B=source_B))


class _Split(NamedTuple):
    """The mesh axes that split each dimension."""

    rows: tuple[str, ...]
    embed: tuple[str, ...]
    vocab: tuple[str, ...]


class _Inputs(NamedTuple):
    hidden_BxTxD: jax.Array
    head_DxV: jax.Array
    labels_BxT: jax.Array
    weight_BxT: jax.Array
    counted_BxT: jax.Array
    group_B: jax.Array
    bias_V: jax.Array
    source_B: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(C: int, groups: tuple[int, int], split: _Split, inputs: _Inputs) -> tuple[jax.Array, jax.Array]:
    return _on_each_device(C, groups, split, inputs, gradients=False)[0]


def _sums_forward(
    C: int, groups: tuple[int, int], split: _Split, inputs: _Inputs
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    return _on_each_device(C, groups, split, inputs, gradients=True)


def _sums_backward(
    C: int, groups: tuple[int, int], split: _Split, saved: tuple, outer: tuple[jax.Array, jax.Array]
) -> tuple[_Inputs]:
    grad_BxTxD, grad_DxV = saved
    scale = outer[0]
    grad_BxTxD = (scale * grad_BxTxD.astype(jnp.float32)).astype(grad_BxTxD.dtype)
    gradients: tuple[Any, ...] = (grad_BxTxD, scale * grad_DxV, None, None, None, None, None, None)
    return (_Inputs(*gradients),)


_sums.defvjp(_sums_forward, _sums_backward)


def _on_each_device(C: int, groups: tuple[int, int], split: _Split, inputs: _Inputs, *, gradients: bool) -> Any:
    body = functools.partial(_one_device, C, groups, split, gradients)
    if jax.sharding.get_abstract_mesh().empty:
        return body(inputs)
    rows, embed, vocab = (axes or None for axes in split)
    by_row = PartitionSpec(rows)
    head = PartitionSpec(embed, vocab)
    by_source = None if inputs.source_B is None else by_row
    specs: tuple[Any, ...] = (by_row, head, by_row, by_row, by_row, by_row, PartitionSpec(vocab), by_source)
    scalar = PartitionSpec()
    out = ((scalar, scalar), (by_row, head) if gradients else None)
    return jax.shard_map(body, in_specs=(_Inputs(*specs),), out_specs=out, check_vma=False)(inputs)


def _one_device(C: int, groups: tuple[int, int], split: _Split, gradients: bool, inputs: _Inputs) -> Any:
    """Return the sums over all devices and, with `gradients`, this device's part of the gradients."""
    B, T, D = inputs.hidden_BxTxD.shape
    N, dtype = B * T, inputs.hidden_BxTxD.dtype
    hidden_NxD = inputs.hidden_BxTxD.reshape(N, D)
    labels_N, weight_N = inputs.labels_BxT.reshape(N), inputs.weight_BxT.reshape(N)
    head_DxV = inputs.head_DxV.astype(dtype)
    if split.embed:  # gathered in the dtype of the matmuls
        head_DxV = jax.lax.all_gather(head_DxV, split.embed, axis=0, tiled=True)
    V = head_DxV.shape[1]
    first_id = jax.lax.axis_index(split.vocab) * V if split.vocab else 0
    ids_1xV = first_id + jnp.arange(V, dtype=jnp.int32)[None]

    counted_N = inputs.counted_BxT.reshape(N)
    places_P = jnp.sort(jnp.where(counted_N, jnp.arange(N, dtype=jnp.int32), N))
    places_P = jnp.pad(places_P, (0, -N % C), constant_values=N)
    turns = (counted_N.sum(dtype=jnp.int32) + C - 1) // C
    if split.vocab and split.rows:
        # All devices make as many turns, so that all take part in every collective inside the loop.
        turns = jax.lax.pmax(turns, split.rows)

    def turn(j: jax.Array, carry: tuple) -> tuple:
        (loss, of_groups_2xG), grads = carry
        places_C = jax.lax.dynamic_slice_in_dim(places_P, j * C, C)
        hidden_CxD = hidden_NxD.at[places_C].get(mode="fill", fill_value=0)
        label_C = labels_N.at[places_C].get(mode="fill", fill_value=-1)
        weight_C = weight_N.at[places_C].get(mode="fill", fill_value=0)
        logits_CxV = jnp.dot(hidden_CxD, head_DxV, preferred_element_type=jnp.float32) + inputs.bias_V[None]
        is_label_CxV = ids_1xV == label_C[:, None]
        total_C = jax.nn.logsumexp(logits_CxV, axis=-1)
        chosen_C = jnp.where(is_label_CxV, logits_CxV, 0.0).sum(-1)
        if split.vocab:
            totals_PxC, chosen_PxC = jax.lax.all_gather(jnp.stack([total_C, chosen_C]), split.vocab, axis=1)
            total_C, chosen_C = jax.nn.logsumexp(totals_PxC, axis=0), chosen_PxC.sum(0)
        nll_C = jnp.where(places_C < N, total_C - chosen_C, 0.0)
        of_groups_2xG += _by_groups(inputs, places_C // T, nll_C, weight_C, groups)
        sums = (loss + (weight_C * nll_C).sum(), of_groups_2xG)
        if not gradients:
            return sums, grads
        grad_NxD, grad_DxV = grads
        probability_CxV = jnp.exp(logits_CxV - total_C[:, None])
        error_CxV = ((probability_CxV - is_label_CxV.astype(jnp.float32)) * weight_C[:, None]).astype(dtype)
        grad_DxV += jnp.dot(hidden_CxD.T, error_CxV, preferred_element_type=jnp.float32)
        grad_CxD = jnp.dot(error_CxV, head_DxV.T, preferred_element_type=jnp.float32)
        return sums, (grad_NxD.at[places_C].set(grad_CxD.astype(grad_NxD.dtype), mode="drop"), grad_DxV)

    # Partial sums over the vocabulary, from several devices, are added in float32.
    part = jnp.float32 if split.vocab else dtype
    grads = (jnp.zeros((N, D), part), jnp.zeros((D, V), jnp.float32)) if gradients else None
    sums = jnp.float32(0), jnp.zeros((2, sum(groups)), jnp.float32)
    with jax.named_scope(LOOP):
        sums, grads = jax.lax.fori_loop(0, turns, turn, (sums, grads))
    if split.rows:
        sums = jax.lax.psum(sums, split.rows)
    if not gradients:
        return sums, None
    grad_NxD, grad_DxV = grads
    if split.vocab:
        grad_NxD = jax.lax.psum(grad_NxD, split.vocab)
    return sums, (grad_NxD.astype(dtype).reshape(B, T, D), sum_over_rows(grad_DxV, split.rows, split.embed, 0))


def _by_groups(
    inputs: _Inputs, row_C: jax.Array, nll_C: jax.Array, weight_C: jax.Array, groups: tuple[int, int]
) -> jax.Array:
    """Return the sums of a chunk for each group of rows and each source, (2, groups + sources)."""
    of_groups_2xG = _by_group(inputs.group_B, row_C, nll_C, groups[0])
    if inputs.source_B is None:
        return of_groups_2xG
    return jnp.concatenate([of_groups_2xG, _by_group(inputs.source_B, row_C, weight_C * nll_C, groups[1])], axis=1)


def _by_group(group_B: jax.Array, row_C: jax.Array, nll_C: jax.Array, groups: int) -> jax.Array:
    """Return the sum and the number of some cross-entropies in each group of rows, (2, groups); row B is none."""
    group_C = group_B.at[row_C].get(mode="fill", fill_value=groups)
    is_of_CxG = group_C[:, None] == jnp.arange(groups)[None]
    each_2xC = jnp.stack([nll_C, jnp.ones_like(nll_C)])
    return jnp.where(is_of_CxG[None], each_2xC[..., None], 0.0).sum(1)


def slowest_share(rows: int, share: float) -> float:
    """Return the share of predicted tokens on the slowest of many devices with `rows` rows each.

    Antithetic times keep pairs of rows close to the mean; all of a row without its partner may be predicted on some
    device, and the others wait for it.
    """
    return share if rows % 2 == 0 else min(1.0, share * (rows + 1) / rows)


def head_chunk(rows: int, length: int, most: int, share: float) -> int:
    """Return the number of tokens that a device projects to the vocabulary at a time.

    It divides the usual work of the slowest device, and an eighth more, into the fewest equal chunks.

    Args:
      rows: the rows of the device.
      length: the positions of each.
      most: the largest chunk.
      share: the mean share of predicted positions.
    """
    tokens = rows * length
    usual = min(tokens, math.ceil(tokens * slowest_share(rows, share) * 9 / 8))
    return -(-usual // -(-usual // most))


def head_turns(rows: int, length: int, most: int, share: float) -> int:
    """Return the usual number of chunks of the slowest device; arguments are those of `head_chunk`."""
    return math.ceil(rows * length * slowest_share(rows, share) / head_chunk(rows, length, most, share))
