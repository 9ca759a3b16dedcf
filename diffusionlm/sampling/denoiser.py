"""The model as the denoising loop calls it, with or without classifier-free guidance.

The memory makes a step cheap: nothing runs where nothing has changed, the vocabulary projection covers only the
positions that are asked for, and with a key/value cache a pass may cover only a window of the canvas.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from diffusionlm.config import ModelConfig
from diffusionlm.model.cache import Cache, Window, scatter_rows
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import Array
from diffusionlm.tree_types import Params


class View(NamedTuple):
    """The part of a canvas and its state that a model is shown."""

    tokens_BxT: jax.Array  # int32; masked positions hold the mask id
    segment_ids_BxT: jax.Array  # int32; 0: not to be attended to
    positions_BxT: jax.Array  # int32: real tokens before this one
    masked_BxT: jax.Array  # bool


class Memory(NamedTuple):
    """The results of the last passes over a canvas."""

    hidden_BxTxE: jax.Array  # the input of `logits`
    cache: Cache | None = None  # keys and values, where windows need them


class Denoiser(Protocol):
    """A model, or an oracle in a test."""

    def empty_memory(self, B: int, T: int) -> Memory:
        """Return zeros in the shapes of a memory."""
        ...

    def read(self, view: View) -> Memory:
        """Run the model on the whole canvas."""
        ...

    def reread(self, view: View, memory: Memory, indices_BxW: jax.Array) -> Memory:
        """Run the model on a window of positions, with the others as remembered; an index of T or more is none."""
        ...

    def logits(self, memory: Memory, positions_BxC: jax.Array) -> jax.Array:
        """Return raw float32 logits (B, C, V) of the tokens at some positions."""
        ...


class ModelDenoiser(NamedTuple):
    """A Transformer as a denoiser."""

    params: Params
    cfg: ModelConfig
    shifted: bool  # the hidden state at position i predicts token i + 1
    cached: bool  # keep keys and values for `reread`

    def empty_memory(self, B: int, T: int) -> Memory:
        """Return zeros in the shapes of a memory."""
        zeros_BxT = jnp.zeros((B, T), jnp.int32)
        memory = jax.eval_shape(self.read, View(zeros_BxT, zeros_BxT, zeros_BxT, zeros_BxT > 0))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory)

    def read(self, view: View) -> Memory:
        """Run the model on the whole canvas."""
        inputs = (view.tokens_BxT, view.segment_ids_BxT, view.positions_BxT)
        if not self.cached:
            return Memory(self._apply(*inputs))
        return Memory(*self._apply(*inputs, method=Transformer.refresh))

    def reread(self, view: View, memory: Memory, indices_BxW: jax.Array) -> Memory:
        """Run the model on a window of positions, with the others as remembered; an index of T or more is none."""
        window = Window(indices_BxW, view.segment_ids_BxT)
        hidden_BxWxD, cache = self._apply(
            view.tokens_BxT, view.positions_BxT, window, memory.cache, method=Transformer.extend
        )
        return Memory(scatter_rows(memory.hidden_BxTxE, indices_BxW, hidden_BxWxD), cache)

    def logits(self, memory: Memory, positions_BxC: jax.Array) -> jax.Array:
        """Return raw float32 logits (B, C, V) of the tokens at some positions."""
        predictors_BxC = predictor_positions(positions_BxC, self.shifted)
        hidden_BxCxD = jnp.take_along_axis(memory.hidden_BxTxE, predictors_BxC[..., None], axis=1)
        return self._apply(hidden_BxCxD, method=Transformer.head)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        return Transformer(self.cfg).apply({"params": self.params}, *args, **kwargs)


class Guided(NamedTuple):
    """A denoiser under classifier-free guidance: raw logits l_u + (1 + w)(l_c - l_u), where u lacks the given tokens.

    Unsupervised (SMDM, arXiv 2410.18514, Eq. 7; LLaDA's code has the same): in u all given tokens are masked. Standard
    (Ho and Salimans, arXiv 2207.12598): u leaves them out, for models that were trained with prompts left out. Either
    way both go through the network in one pass of twice the batch.
    """

    denoiser: Denoiser
    given_BxT: jax.Array  # bool: real tokens that are not generated
    segment_ids_BxT: jax.Array  # of the whole canvas
    mask_id: int
    guidance: Array  # float32: w
    standard: Array  # bool

    def empty_memory(self, B: int, T: int) -> Memory:
        """Return zeros in the shapes of a memory of both halves."""
        return self.denoiser.empty_memory(2 * B, T)

    def read(self, view: View) -> Memory:
        """Run the model on the whole canvas, with and without the given tokens."""
        return self.denoiser.read(self._both(view))

    def reread(self, view: View, memory: Memory, indices_BxW: jax.Array) -> Memory:
        """Run the model on a window of positions, with and without the given tokens."""
        return self.denoiser.reread(self._both(view), memory, jnp.repeat(indices_BxW, 2, axis=0))

    def logits(self, memory: Memory, positions_BxC: jax.Array) -> jax.Array:
        """Return guided float32 logits (B, C, V) of the tokens at some positions."""
        B, C = positions_BxC.shape
        logits_Bx2xCxV = self.denoiser.logits(memory, jnp.repeat(positions_BxC, 2, axis=0)).reshape(B, 2, C, -1)
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


def predictor_positions(positions_BxC: jax.Array, shifted: bool) -> jax.Array:
    """Return the positions whose hidden states predict the tokens at some positions. int32 (B, C)."""
    # Nothing predicts position 0 of a shifted model, so it keeps its own state (Dream's convention).
    return jnp.maximum(positions_BxC - 1, 0) if shifted else positions_BxC


def guide(with_BxCxV: jax.Array, without_BxCxV: jax.Array, guidance: Array) -> jax.Array:
    """Lead logits away from those without the given tokens: l_u + (1 + w)(l_c - l_u). float32 (B, C, V)."""
    return without_BxCxV + (1 + guidance) * (with_BxCxV - without_BxCxV)


def real_positions(segment_ids_BxT: Array) -> jax.Array:
    """Count the real tokens before each position, so that padding on either side moves nothing. int32 (B, T)."""
    real_BxT = jnp.asarray(segment_ids_BxT != 0).astype(jnp.int32)
    return jnp.maximum(jnp.cumsum(real_BxT, axis=-1, dtype=jnp.int32) - 1, 0)
