"""TODO: one sentence."""

from typing import NamedTuple

import jax


class Cache(NamedTuple):
    """The keys and values of every position of a canvas, in every layer; N layers."""

    k_NxBxSxGxK: jax.Array
    v_NxBxSxGxK: jax.Array


class Window(NamedTuple):
    """Which positions of a canvas a forward pass computes, while those of all others are cached."""

    places_BxW: jax.Array  # int32, rising; S or more: nowhere
    segment_ids_BxS: jax.Array  # int32: of the whole canvas


def scatter_rows(x_BxS: jax.Array, places_BxW: jax.Array, new_BxW: jax.Array) -> jax.Array:
    """`x` with each row's `new` elements at its places, those of S or more left out; any further axes.

    Row by row, so that on a mesh every device sees that its rows are its own.
    """
    return jax.vmap(lambda x_S, places_W, new_W: x_S.at[places_W].set(new_W, mode="drop"))(x_BxS, places_BxW, new_BxW)
