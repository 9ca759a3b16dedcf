"""Key/value caches: which positions a step computes while the others are remembered.

At the start of a block everything is computed, and the steps of the block recompute a window: with "dual" the block
alone, with "prefix" all from the block on (Fast-dLLM, arXiv 2505.22618). In a model that looks both ways what is
remembered goes stale as tokens are revealed, so both are approximate; `refresh` says how often all is computed again,
and 1 is exact. A causal model's past never changes, so its cache is always exact ("causal").
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm.sampling.canvas import Canvas

MOST_WIDTHS = 4


class Windows(NamedTuple):
    """The static structure of a cached generation; the default has no cache.

    Attributes:
      cache: "none", "prefix", "dual" or "causal".
      shifted: of the model; a block then needs what predicts its first position, too.
      widths: of the windows, rising; each compiles once.
    """

    cache: str = "none"
    shifted: bool = False
    widths: tuple[int, ...] = ()

    @property
    def lockstep(self) -> bool:
        """Whether rows go through their blocks together, so that their caches are refreshed at the same time."""
        return self.cache in ("prefix", "dual")


def plan(cache: str, shifted: bool, canvas: Canvas) -> Windows:
    """The windows of a canvas: as wide as its widest block needs, and for "prefix" halves of that, too."""
    if cache == "none":
        return Windows()
    blocks = range(int(canvas.block_BxT.max()) + 1)
    windows = Windows(cache, shifted)
    needed = [int(members(windows, canvas, np.full(len(canvas.block_BxT), b)).sum(-1).max()) for b in blocks]
    widths = {_bucket(max(needed))}
    while cache == "prefix" and len(widths) < MOST_WIDTHS and min(widths) > _bucket(min(needed)):
        widths.add(_bucket(min(widths) // 2))
    return windows._replace(widths=tuple(sorted(widths)))


def members(windows: Windows, canvas: Canvas, block_B: Any) -> Any:
    """The positions that a step of block `block_B` computes; of NumPy arrays a NumPy array. bool (B, T)."""
    xp = canvas.block_BxT.__array_namespace__()
    active_BxT = canvas.block_BxT == block_B[:, None]
    predicting_BxT = xp.zeros_like(active_BxT)
    if windows.shifted:
        predicting_BxT = xp.concatenate([active_BxT[:, 1:], active_BxT[:, :1] & False], axis=1)
    if windows.cache == "causal":
        return predicting_BxT
    if windows.cache == "dual":
        return active_BxT | predicting_BxT
    begun_BxT = xp.cumsum((active_BxT | predicting_BxT).astype(xp.int32), axis=1) > 0
    return begun_BxT & (canvas.segment_ids_BxT != 0)


def places(members_BxT: jax.Array, width: int) -> jax.Array:
    """The members of each row in rising order, then T. int32 (B, width)."""
    T = members_BxT.shape[1]
    places_BxT = jnp.sort(jnp.where(members_BxT, jnp.arange(T, dtype=jnp.int32)[None], T), axis=-1)
    padding = max(width - T, 0)
    return jnp.pad(places_BxT, ((0, 0), (0, padding)), constant_values=T)[:, :width]


def _bucket(width: int) -> int:
    """The next multiple of 8; small ones are powers of two."""
    return 1 << (width - 1).bit_length() if width <= 8 else -(-width // 8) * 8
