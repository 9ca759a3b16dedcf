"""Convert a model's parameters into the initial ones of another, such as autoregressive to diffusion.

The diffusion model begins with all weights of the autoregressive model (DiffuLLaMA, arXiv 2410.17891, Section 3). The
other parts of that method are elsewhere: `attention.annealed_mask`, the shift in `diffusion.objectives.mdm_targets`,
adapters in `lora`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from diffusionlm.config import ModelConfig
from diffusionlm.model import lora
from diffusionlm.tree_types import Params, Shardings

# The fields that may differ between source and target, with the only change that has a meaning.
CONVERTIBLE = {"causal": (True, False), "mask_row": (False, True)}


def is_convertible(field: str, before: Any, after: Any) -> bool:
    """Return True if the value of a field may change so; full attention replaces a causal window of any width."""
    return CONVERTIBLE.get(field) == (before, after) or (field == "sliding_window" and after == 0)


def same_parameters(source: ModelConfig, target: ModelConfig) -> bool:
    """Return True if both models have the same parameters, so that `convert_params` would change nothing."""
    return not source.lora_rank and not target.lora_rank and source.mask_row == target.mask_row


def convert_on_mesh(
    source: ModelConfig, target: ModelConfig, params: Params, adapters: Params, shardings: Shardings
) -> Params:
    """Run `convert_params` on a mesh; it consumes `params`, so that it needs little memory besides.

    The first four arguments are those of `convert_params`; `shardings` place the result.
    """
    result: dict[Any, Any] = traverse_util.flatten_dict(
        jax.eval_shape(functools.partial(convert_params, source, target), params, adapters)
    )
    shapes = {path: leaf.shape for path, leaf in result.items()}
    flat: dict[Any, Any] = traverse_util.flatten_dict(params)
    # JAX can write a result over an argument of the same shape only.
    donated = {path: leaf for path, leaf in flat.items() if shapes.get(path) == leaf.shape}
    others = {path: leaf for path, leaf in flat.items() if path not in donated}

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def program(donated: dict[Any, jax.Array], others: dict[Any, jax.Array], adapters: Params) -> Params:
        return convert_params(source, target, traverse_util.unflatten_dict(donated | others), adapters)

    return program(donated, others, adapters)


def convert_params(source: ModelConfig, target: ModelConfig, params: Params, adapters: Params) -> Params:
    """Return the parameters that a model begins with, from those of another.

    A new row of [MASK] begins as the mean of all other rows; nothing ever reads its column in the head. Adapters of the
    source are merged into its weights.

    Args:
      source: the model of `params`; it differs from `target` in `lora_rank` and what `is_convertible` at most.
      target: the model of the result.
      params: the parameters of `source`.
      adapters: the parameters of `target` that are adapters, freshly initialised.
    """
    merged = lora.merge(params)
    V, padded = source.vocab_size, target.padded_vocab_size
    if target.mask_row and not source.mask_row:
        rows_VxD = merged["embed"][:V]
        added_MxD = jnp.zeros((padded - V, target.d_model), rows_VxD.dtype).at[0].set(rows_VxD.mean(axis=0))
        merged["embed"] = jnp.concatenate([rows_VxD, added_MxD])
        if not target.tied_head:
            merged["head"] = jnp.pad(merged["head"][:, :V], ((0, 0), (0, padded - V)))
    return lora.join(merged, adapters)
