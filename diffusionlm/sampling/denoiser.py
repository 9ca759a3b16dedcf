"""A model as the denoising loop sees it: a pass over the canvas that is remembered, and logits at chosen positions.

What is remembered makes a step cheap: nothing runs where nothing has changed, the vocabulary projection sees only the
positions that are asked for, and with key/value caches a pass may cover a window of the canvas and no more.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusionlm.config import ModelConfig
from diffusionlm.model.transformer import Transformer, Window, put


class View(NamedTuple):
    """What a model is shown of a canvas."""

    tokens_BxT: jax.Array  # int32; masked positions hold the mask id
    segment_ids_BxT: jax.Array  # int32; 0: not to be seen
    positions_BxT: jax.Array  # int32: real tokens before this one
    masked_BxT: jax.Array  # bool


class Memory(NamedTuple):
    """What the last passes over a canvas left."""

    hidden_BxTxE: jax.Array  # what `logits` starts from
    cache: Any = None  # keys and values, where windows need them


class Denoiser(Protocol):
    """A model, or an oracle in a test."""

    def forget(self, B: int, T: int) -> Memory:
        """Zeros, in the shapes of a memory."""

    def read(self, view: View) -> Memory:
        """A pass over the whole canvas."""

    def reread(self, view: View, memory: Memory, places_BxW: jax.Array) -> Memory:
        """A pass over some of the positions only, the others as they are remembered; T or more: nowhere."""

    def logits(self, memory: Memory, places_BxC: jax.Array) -> jax.Array:
        """Raw float32 logits (B, C, V) of the tokens at some positions."""


class ModelDenoiser(NamedTuple):
    """A Transformer as a denoiser."""

    params: Any
    cfg: ModelConfig
    shifted: bool  # the hidden state at position i predicts token i + 1
    cached: bool  # `reread` is wanted

    def forget(self, B: int, T: int) -> Memory:
        view = View(*(jax.ShapeDtypeStruct((B, T), dtype) for dtype in (jnp.int32, jnp.int32, jnp.int32, jnp.bool_)))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(self.read, view))

    def read(self, view: View) -> Memory:
        seen = (view.tokens_BxT, view.segment_ids_BxT, view.positions_BxT)
        if not self.cached:
            return Memory(self._apply(*seen))
        return Memory(*self._apply(*seen, method=Transformer.refresh))

    def reread(self, view: View, memory: Memory, places_BxW: jax.Array) -> Memory:
        window = Window(places_BxW, view.segment_ids_BxT)
        hidden_BxWxD, cache = self._apply(
            view.tokens_BxT, view.positions_BxT, window, memory.cache, method=Transformer.extend
        )
        return Memory(put(memory.hidden_BxTxE, places_BxW, hidden_BxWxD), cache)

    def logits(self, memory: Memory, places_BxC: jax.Array) -> jax.Array:
        at_BxC = predictors(places_BxC, self.shifted)
        hidden_BxCxD = jnp.take_along_axis(memory.hidden_BxTxE, at_BxC[..., None], axis=1)
        return self._apply(hidden_BxCxD, method=Transformer.head)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        return Transformer(self.cfg).apply({"params": self.params}, *args, **kwargs)


class Guided(NamedTuple):
    """Classifier-free guidance: raw logits l_u + (1 + w)(l_c - l_u), u without what was given.

    Unsupervised (SMDM, arXiv 2410.18514, Eq. 7; LLaDA's code has the same): u has all given tokens masked. Standard
    (Ho and Salimans, arXiv 2207.12598): u has none of them, for models that were trained with prompts left out. Either
    way both go through the network in one pass of twice the batch.
    """

    denoiser: Denoiser
    given_BxT: jax.Array  # bool: real tokens that are not generated
    segment_ids_BxT: jax.Array  # of the whole canvas
    mask_id: int
    guidance: jax.Array  # float32: w
    standard: jax.Array  # bool

    def forget(self, B: int, T: int) -> Memory:
        return self.denoiser.forget(2 * B, T)

    def read(self, view: View) -> Memory:
        return self.denoiser.read(self._both(view))

    def reread(self, view: View, memory: Memory, places_BxW: jax.Array) -> Memory:
        return self.denoiser.reread(self._both(view), memory, jnp.repeat(places_BxW, 2, axis=0))

    def logits(self, memory: Memory, places_BxC: jax.Array) -> jax.Array:
        B, C = places_BxC.shape
        logits_Bx2xCxV = self.denoiser.logits(memory, jnp.repeat(places_BxC, 2, axis=0)).reshape(B, 2, C, -1)
        return guide(logits_Bx2xCxV[:, 0], logits_Bx2xCxV[:, 1], self.guidance)

    def _both(self, view: View) -> View:
        dropped_BxT = self.given_BxT & self.standard
        positions_BxT = jnp.where(
            self.standard, real_positions(jnp.where(dropped_BxT, 0, self.segment_ids_BxT)), view.positions_BxT
        )
        without = View(
            tokens_BxT=jnp.where(self.given_BxT, jnp.int32(self.mask_id), view.tokens_BxT),
            segment_ids_BxT=jnp.where(dropped_BxT, 0, view.segment_ids_BxT),
            positions_BxT=positions_BxT,
            masked_BxT=view.masked_BxT,
        )
        B, T = view.tokens_BxT.shape
        # Interleaved, so that on a mesh every row stays with its twin.
        return View(*(jnp.stack(pair, axis=1).reshape(2 * B, T) for pair in zip(view, without, strict=True)))


def predictors(places_BxC: jax.Array, shifted: bool) -> jax.Array:
    """The positions whose hidden states predict the tokens at some places. int32 (B, C)."""
    # Nothing predicts position 0 of a shifted model, so it keeps its own state (Dream's convention).
    return jnp.maximum(places_BxC - 1, 0) if shifted else places_BxC


def guide(with_BxCxV: jax.Array, without_BxCxV: jax.Array, guidance: jax.Array) -> jax.Array:
    """Logits led away from those without what was given: l_u + (1 + w)(l_c - l_u). float32 (B, C, V)."""
    return without_BxCxV + (1 + guidance) * (with_BxCxV - without_BxCxV)


def real_positions(segment_ids_BxT: jax.Array) -> jax.Array:
    """How many real tokens come before each position: padding on either side moves nothing. int32 (B, T)."""
    real_BxT = (segment_ids_BxT != 0).astype(jnp.int32)
    return jnp.maximum(jnp.cumsum(real_BxT, axis=-1, dtype=jnp.int32) - 1, 0)
