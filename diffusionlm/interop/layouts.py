"""How tensors of other systems hold ours, told once for both directions.

A layout pairs parts of our tensors with the parts of theirs that are the same numbers in the same shape, as views.
Importing copies one way along the pairs, exporting the other, so that each undoes the other.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from diffusionlm.config import ModelConfig

Layout = Literal["same", "transposed", "fused", "interleaved", "rows", "columns"]
Shape = tuple[int, ...]


def flat_shape(name: str, shape: Shape) -> Shape:
    """The shape of one layer of our parameter `name` as a vector, or as a matrix (inputs, outputs)."""
    last = name.rpartition("/")[2]
    if last in ("scale", "bias") or last.endswith("_bias"):
        return (math.prod(shape),)
    inputs = len(shape) - 1 if last == "o" else 1  # attention's output contracts heads and their width
    return (math.prod(shape[:inputs]), math.prod(shape[inputs:]))


def shape_of(layout: Layout, ours: Sequence[Shape], rows: int) -> Shape:
    """The shape of their tensor.

    Args:
      layout: how it holds ours.
      ours: shapes of ours, as `flat_shape` gives them.
      rows: of "rows" and "columns": how many of the vocabulary theirs has.
    """
    first = ours[0]
    if layout == "same":
        return first
    if layout == "transposed":
        return first[::-1]
    if layout == "fused":
        return (*first[:-1], sum(shape[-1] for shape in ours))
    if layout == "interleaved":
        return (sum(shape[1] for shape in ours), first[0])
    return (rows, first[1] if layout == "rows" else first[0])


def pairs(
    layout: Layout, ours: Sequence[np.ndarray], theirs: np.ndarray, cfg: ModelConfig
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Views of our tensors (vectors and matrices, inputs first) with the views of theirs that equal them."""
    first = ours[0]
    if layout == "same":
        yield first, theirs
    elif layout == "transposed":  # PyTorch's Linear: (outputs, inputs)
        yield first, theirs.T
    elif layout == "fused":  # GPT-2's: queries, keys and values side by side
        start = 0
        for one in ours:
            yield one, theirs[..., start : start + one.shape[-1]]
            start += one.shape[-1]
    elif layout == "interleaved":  # lit-gpt's: for each key/value head its queries, its key, its value; outputs first
        D, G, K = first.shape[0], cfg.n_kv_heads, cfg.head_dim
        R = cfg.n_heads // G
        groups_GxSxKxD = theirs.reshape(G, R + 2, K, D)
        q_DxHK, k_DxGK, v_DxGK = ours
        yield q_DxHK.reshape(D, G, R, K), groups_GxSxKxD[:, :R].transpose(3, 0, 1, 2)
        yield k_DxGK.reshape(D, G, K), groups_GxSxKxD[:, R].transpose(2, 0, 1)
        yield v_DxGK.reshape(D, G, K), groups_GxSxKxD[:, R + 1].transpose(2, 0, 1)
    elif layout == "rows":  # an embedding, without our padding
        yield first[: theirs.shape[0]], theirs
    else:  # a head, without our padding; outputs first
        yield first[:, : theirs.shape[0]], theirs.T
