"""A function as a denoiser of the sampling loop, and random parameters with clear preferences."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffusionlm.config import ModelConfig
from diffusionlm.model import Transformer
from diffusionlm.sampling.denoiser import Memory, View


class Oracle(NamedTuple):
    """tokens, segment ids, masked (B, T) -> logits (B, T, V), without windows."""

    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    V: int

    def forget(self, B: int, T: int) -> Memory:
        return Memory(jnp.zeros((B, T, self.V)))

    def read(self, view: View) -> Memory:
        return Memory(self.function(view.tokens_BxT, view.segment_ids_BxT, view.masked_BxT))

    def logits(self, memory: Memory, places_BxC: jax.Array) -> jax.Array:
        return jnp.take_along_axis(memory.hidden_BxTxE, places_BxC[..., None], axis=1)


def make_params(cfg: ModelConfig):
    """Random parameters, sharpened so that the likeliest tokens and positions are clearly apart."""
    params = nn.unbox(jax.jit(Transformer(cfg).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return {**params, "head": params["head"] * 8}
