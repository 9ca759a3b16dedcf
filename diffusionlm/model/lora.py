"""Low-rank adapters (LoRA, arXiv 2106.09685): the parameters that are trained with them, and their merge into weights.

`transformer.Block` adds an adapter to the product with every matrix of a block. The embedding is trained as well, as
DiffuLLaMA (arXiv 2410.17891) does for its 7B model; otherwise the row of [MASK] would keep its initial values.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from diffusionlm.config import ModelConfig
from diffusionlm.tree_types import Params

DOWN, UP = "_lora_down", "_lora_up"  # suffixes of a weight's name: (layers, *inputs, R) and (layers, R, *outputs)
SCALE = 2.0  # alpha / R; alpha is twice the rank, as for DiffuLLaMA


def adapters(params: Params) -> Params:
    """Return the parameters that belong to adapters."""
    flat = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if path[-1].endswith((DOWN, UP))})


def split(cfg: ModelConfig, params: Params) -> tuple[Params, Params]:
    """Return the parameters that are trained, and all others, as two trees that `join` joins again."""
    if not cfg.lora_rank:
        return params, {}
    flat = traverse_util.flatten_dict(params)
    trained = {path: leaf for path, leaf in flat.items() if path[-1].endswith((DOWN, UP)) or path == ("embed",)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def join(trained: Params, frozen: Params) -> dict[str, Any]:
    """Return the whole tree of the two parts that `split` returned."""
    flat = traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen)
    return traverse_util.unflatten_dict(flat)


def merge(params: Params) -> dict[str, Any]:
    """Return parameters without adapters: each weight W becomes W + SCALE * down @ up, in its dtype."""
    flat: dict[Any, Any] = traverse_util.flatten_dict(params)
    merged = {}
    for path, weight in flat.items():
        *above, name = path
        if name.endswith((DOWN, UP)):
            continue
        if (*above, name + DOWN) in flat:
            weight = _merged(weight, flat[*above, name + DOWN], flat[*above, name + UP])
        merged[path] = weight
    return traverse_util.unflatten_dict(merged)


def _merged(weight_NxIxO: jax.Array, down_NxIxR: jax.Array, up_NxRxO: jax.Array) -> jax.Array:
    """Merge an adapter into its weight; I and O stand for one axis or two."""
    N, R = down_NxIxR.shape[0], down_NxIxR.shape[-1]
    down, up = down_NxIxR.reshape(N, -1, R).astype(jnp.float32), up_NxRxO.reshape(N, R, -1).astype(jnp.float32)
    added = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST).reshape(weight_NxIxO.shape)
    return (weight_NxIxO.astype(jnp.float32) + SCALE * added).astype(weight_NxIxO.dtype)
