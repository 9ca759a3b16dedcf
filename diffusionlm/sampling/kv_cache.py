"""The positions that a cached step recomputes; all others come from the cache.

At the start of a block everything is computed. Its later steps compute a window: with "dual" the block alone, with
"prefix" everything from the block on (Fast-dLLM, arXiv 2505.22618). In a model with bidirectional attention the cached
keys and values go stale as tokens are revealed, so both are approximate; `SamplingConfig.refresh` sets how often
everything is computed again, and 1 is exact. The past of a causal model never changes, so its cache ("causal") is
always exact.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm.parallel.mesh import Array
from diffusionlm.sampling.canvas import Canvas, bucket_size

MOST_WIDTHS = 4


class Windows(NamedTuple):
    """The static structure of a cached generation; the default has no cache."""

    cache: str = "none"  # "none", "prefix", "dual" or "causal"
    shifted: bool = False  # whether the model is shifted; a block then also needs the position before its first one
    widths: tuple[int, ...] = ()  # the widths of the windows in rising order; each is compiled once

    @property
    def lockstep(self) -> bool:
        """True if all rows go through their blocks together, so that one pass refreshes all caches."""
        return self.cache in ("prefix", "dual")


def plan_windows(cache: str, shifted: bool, canvas: Canvas) -> Windows:
    """Return the windows of a canvas: as wide as its widest block needs, and for "prefix" also halves of that."""
    if cache == "none":
        return Windows()
    windows = Windows(cache, shifted)
    B = len(canvas.row_ids_B)
    blocks = range(int(canvas.block_BxT.max()) + 1)
    needed = [int(in_window(windows, canvas, np.full(B, b)).sum(-1).max()) for b in blocks]
    widths = {bucket_size(max(needed))}
    while cache == "prefix" and len(widths) < MOST_WIDTHS and min(widths) > bucket_size(min(needed)):
        widths.add(bucket_size(min(widths) // 2))
    return windows._replace(widths=tuple(sorted(widths)))


def in_window(windows: Windows, canvas: Canvas, block_B: Array) -> Array:
    """Mark the positions that a step of block `block_B` computes.

    Returns:
      bool (B, T), a NumPy array where the canvas holds NumPy arrays.
    """
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


def window_indices(in_window_BxT: jax.Array, width: int) -> jax.Array:
    """Return the positions of each row's window in rising order, filled up with T. int32 (B, width)."""
    T = in_window_BxT.shape[1]
    indices_BxT = jnp.sort(jnp.where(in_window_BxT, jnp.arange(T, dtype=jnp.int32)[None], T), axis=-1)
    padding = max(width - T, 0)
    return jnp.pad(indices_BxT, ((0, 0), (0, padding)), constant_values=T)[:, :width]
