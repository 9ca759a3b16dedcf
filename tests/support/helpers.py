"""What tests of sampling and likelihood share: oracles, random parameters, a count of compilations."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffusionlm.config import ModelConfig
from diffusionlm.model.transformer import Transformer
from diffusionlm.sampling.denoiser import Memory, View


class Oracle(NamedTuple):
    """tokens, segment ids, masked (B, T) -> logits (B, T, V), without windows."""

    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    V: int

    def empty_memory(self, B: int, T: int) -> Memory:
        return Memory(jnp.zeros((B, T, self.V)))

    def read(self, view: View) -> Memory:
        return Memory(self.function(view.tokens_BxT, view.segment_ids_BxT, view.masked_BxT))

    def logits(self, memory: Memory, places_BxC: jax.Array) -> jax.Array:
        return jnp.take_along_axis(memory.hidden_BxTxE, places_BxC[..., None], axis=1)


def make_params(cfg: ModelConfig, sharpness: float = 8):
    """Random parameters, sharpened so that the likeliest tokens and positions are clearly apart."""
    params = nn.unbox(jax.jit(Transformer(cfg).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return {**params, "head": params["head"] * sharpness}


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that gets an entry for every compilation inside the block."""
    events = []

    def listen(event: str, duration: float, **kwargs) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
