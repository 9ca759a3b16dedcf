"""The key/value cache as arrays, and its updates; `sampling.kv_cache` chooses the positions to recompute."""

from typing import NamedTuple

import jax

from diffusionlm.parallel.mesh import constrain


class Cache(NamedTuple):
    """The keys and values of every position of a canvas, in every layer; N layers, G key/value heads."""

    k_NxBxSxGxK: jax.Array
    v_NxBxSxGxK: jax.Array


class LayerCache(NamedTuple):
    """The keys and values of one layer: of the whole canvas (T = S) or of a window."""

    k_BxTxGxK: jax.Array
    v_BxTxGxK: jax.Array


class Window(NamedTuple):
    """The positions of a canvas that a forward pass computes; the keys and values of all others are cached."""

    places_BxW: jax.Array  # int32, rising; S or more: an unused place of the window
    segment_ids_BxS: jax.Array  # int32, of the whole canvas


def scatter_rows(x_BxS: jax.Array, places_BxW: jax.Array, new_BxW: jax.Array) -> jax.Array:
    """Return `x` with each row's `new` elements at that row's places; further axes are whole elements.

    Places of S or more are dropped. Rows are scattered one by one (vmap), which tells the compiler that on a mesh every
    device needs its own rows only.
    """
    return jax.vmap(lambda x_S, places_W, new_W: x_S.at[places_W].set(new_W, mode="drop"))(x_BxS, places_BxW, new_BxW)


def update_layer(cached: LayerCache, window: Window, new: LayerCache) -> LayerCache:
    """Return a layer's keys and values with those of the window replaced."""
    return LayerCache(*(_sharded(scatter_rows(x, window.places_BxW, y)) for x, y in zip(cached, new, strict=True)))


def update_cache(cache: Cache, window: Window, new: Cache) -> Cache:
    """Return the cache with the keys and values of the window replaced, in every layer.

    The scatter is the only thing that happens to the whole cache in a decoding step, so that the compiler can do it in
    place.
    """
    over_layers = jax.vmap(scatter_rows, in_axes=(0, None, 0))
    return Cache(*(over_layers(x, window.places_BxW, y) for x, y in zip(cache, new, strict=True)))


def _sharded(x_BxTxGxK: jax.Array) -> jax.Array:
    return constrain(x_BxTxGxK, "batch", None, "kv_heads", None)
