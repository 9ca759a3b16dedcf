"""From the parameters of one model to those that another begins with: autoregressive weights become a diffusion model.

All of the autoregressive model is kept (DiffuLLaMA, arXiv 2410.17891, Section 3). The rest of the method lies where
training is: attention that opens up in `train_step.annealed_attention`, the shift in `losses.mdm_targets`, adapters in
`lora`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from diffusionlm.config import ModelConfig
from diffusionlm.model import lora

# What may differ between a model and the one that begins with its weights, with the only change that has a meaning.
CONVERTIBLE = {"causal": (True, False), "mask_row": (False, True)}


def same_parameters(theirs: ModelConfig, ours: ModelConfig) -> bool:
    """Whether the trees of both models are alike, so that `convert_params` would change nothing."""
    return not theirs.lora_rank and not ours.lora_rank and theirs.mask_row == ours.mask_row


def convert_on_mesh(theirs: ModelConfig, ours: ModelConfig, params: Any, adapters: Any, shardings: Any) -> Any:
    """`convert_params` on a mesh, with as little memory besides `params`, which it consumes, as there can be.

    The first four arguments are those of `convert_params`; `shardings` are of the result.
    """
    wanted = jax.eval_shape(functools.partial(convert_params, theirs, ours), params, adapters)
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(wanted).items()}
    flat = traverse_util.flatten_dict(params)
    # Only what has a place in the result can be written over.
    kept = {path: leaf for path, leaf in flat.items() if shapes.get(path) == leaf.shape}
    others = {path: leaf for path, leaf in flat.items() if path not in kept}

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def program(kept: dict, others: dict, adapters: Any) -> Any:
        return convert_params(theirs, ours, traverse_util.unflatten_dict(kept | others), adapters)

    return program(kept, others, adapters)


def convert_params(theirs: ModelConfig, ours: ModelConfig, params: Any, adapters: Any) -> Any:
    """The parameters that `ours` begins with, from those of `theirs`.

    The row of [MASK], where it is new, begins as the mean of all others; its column in the head is never looked at.
    Adapters of `theirs` go into its weights.

    Args:
      theirs: the model of `params`; it differs from `ours` in nothing but `CONVERTIBLE` and `lora_rank`.
      ours: the model that is asked for.
      params: the parameters of `theirs`.
      adapters: those of `ours` that are adapters, as they are initialised.
    """
    params = lora.merge(params)
    V, padded = theirs.vocab_size, ours.padded_vocab_size
    if ours.mask_row and not theirs.mask_row:
        rows_VxD = params["embed"][:V]
        added_MxD = jnp.zeros((padded - V, ours.d_model), rows_VxD.dtype).at[0].set(rows_VxD.mean(axis=0))
        params = params | {"embed": jnp.concatenate([rows_VxD, added_MxD])}
        if not ours.tied_head:
            params["head"] = jnp.pad(params["head"][:, :V], ((0, 0), (0, padded - V)))
    return lora.join(params, adapters)
