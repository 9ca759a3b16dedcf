"""The layouts in which foreign tensors hold our parameters; one description serves import and export.

A layout pairs views of our parameters with the views of the tensor that hold the same numbers in the same shape.
Importing copies along the pairs one way and exporting the other, so each undoes the other.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from diffusionlm.config import ModelConfig

Layout = Literal["same", "transposed", "fused", "interleaved", "rows", "columns"]
Shape = tuple[int, ...]


def flat_shape(name: str, shape: Shape) -> Shape:
    """Return one layer's shape of the parameter `name`, flattened to a vector or to a matrix (inputs, outputs)."""
    last = name.rpartition("/")[2]
    if last in ("scale", "bias") or last.endswith("_bias"):
        return (math.prod(shape),)
    inputs = len(shape) - 1 if last == "o" else 1  # the output projection contracts heads and head_dim
    return (math.prod(shape[:inputs]), math.prod(shape[inputs:]))


def tensor_shape(layout: Layout, parameters: Sequence[Shape], rows: int) -> Shape:
    """Return the shape of the tensor.

    Args:
      layout: the arrangement.
      parameters: the shapes of our parameters, from `flat_shape`.
      rows: the number of vocabulary entries in the tensor, for "rows" and "columns".
    """
    first = parameters[0]
    if layout == "same":
        return first
    if layout == "transposed":
        return first[::-1]
    if layout == "fused":
        return (*first[:-1], sum(shape[-1] for shape in parameters))
    if layout == "interleaved":
        return (sum(shape[1] for shape in parameters), first[0])
    return (rows, first[1] if layout == "rows" else first[0])


def paired_views(
    layout: Layout, parameters: Sequence[np.ndarray], tensor: np.ndarray, cfg: ModelConfig
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs of equal views: of our parameters (vectors or matrices, inputs first), and of the tensor."""
    first = parameters[0]
    if layout == "same":
        yield first, tensor
    elif layout == "transposed":  # PyTorch's Linear: (outputs, inputs)
        yield first, tensor.T
    elif layout == "fused":  # GPT-2: queries, keys and values side by side
        start = 0
        for parameter in parameters:
            yield parameter, tensor[..., start : start + parameter.shape[-1]]
            start += parameter.shape[-1]
    elif layout == "interleaved":  # lit-gpt: each key/value head has its queries, its key and its value; outputs first
        D, G, K = first.shape[0], cfg.n_kv_heads, cfg.head_dim
        R = cfg.n_heads // G
        groups_GxSxKxD = tensor.reshape(G, R + 2, K, D)
        q_DxHK, k_DxGK, v_DxGK = parameters
        yield q_DxHK.reshape(D, G, R, K), groups_GxSxKxD[:, :R].transpose(3, 0, 1, 2)
        yield k_DxGK.reshape(D, G, K), groups_GxSxKxD[:, R].transpose(2, 0, 1)
        yield v_DxGK.reshape(D, G, K), groups_GxSxKxD[:, R + 1].transpose(2, 0, 1)
    elif layout == "rows":  # an embedding, without our padding rows
        yield first[: tensor.shape[0]], tensor
    else:  # a head, without our padding rows; outputs first
        yield first[:, : tensor.shape[0]], tensor.T
