"""A denoiser whose predictions a test knows; it stands in for a model."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusionlm.sampling.denoiser import Memory, View


class Oracle(NamedTuple):
    """A denoiser without windows that predicts what a function says."""

    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # tokens, segment ids, masked -> logits (B, T, V)
    V: int

    def empty_memory(self, B: int, T: int) -> Memory:
        return Memory(jnp.zeros((B, T, self.V)))

    def read(self, view: View) -> Memory:
        return Memory(self.function(view.tokens_BxT, view.segment_ids_BxT, view.masked_BxT))

    def logits(self, memory: Memory, places_BxC: jax.Array) -> jax.Array:
        return jnp.take_along_axis(memory.hidden_BxTxE, places_BxC[..., None], axis=1)
