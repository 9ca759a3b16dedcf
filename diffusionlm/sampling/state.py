"""The inputs of the denoising loop (`Job`), and the state that it carries."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusionlm.diffusion import schedules
from diffusionlm.parallel.mesh import Array
from diffusionlm.sampling.canvas import Canvas
from diffusionlm.sampling.denoiser import Denoiser
from diffusionlm.sampling.device_settings import Settings
from diffusionlm.sampling.kv_cache import Windows


@dataclass(frozen=True)
class Job:
    """The inputs that stay the same during a denoising.

    Attributes:
      denoiser: the model.
      schedule: the alpha(t) that it was trained with.
      suppressed_V: bool, ids that are never drawn.
      canvas: the rows.
      key: the root key of the noise.
      settings: the settings of the generation.
      eos_ids: ids that end a text.
      windows: the structure of the key/value cache.
    """

    denoiser: Denoiser
    schedule: schedules.Schedule
    suppressed_V: Array
    canvas: Canvas
    key: jax.Array
    settings: Settings
    eos_ids: tuple[int, ...] = ()
    windows: Windows = Windows()


class Trace(NamedTuple):
    """Every state of a denoising; frame 0 is the start. (frames, B, T) on the device, (frames, B, length) for users."""

    tokens: Array  # int32; masked positions hold the mask id
    masked: Array  # bool
    confidence: Array | None = (
        None  # float32: a token's probability, as `confidence` says, when it was revealed; 0 elsewhere
    )


class State(NamedTuple):
    """The part of a generation that a step changes."""

    index: jax.Array  # int32: steps done by the batch
    warm: jax.Array  # bool: the memory belongs to this canvas
    tokens_BxT: jax.Array  # int32
    masked_BxT: jax.Array  # bool: still to be revealed
    block_B: jax.Array  # int32: the active block
    step_B: jax.Array  # int32: steps done of the active block
    initial_B: jax.Array  # int32: masks of the active block before its first step
    changed_B: jax.Array  # bool: the canvas has changed since the network last saw it
    nfe_B: jax.Array  # int32: forward passes that the row needed
    finite_B: jax.Array  # bool: no logits of a masked position have been NaN
    confidence_BxT: jax.Array | None  # float32, where there is a trace
    trace: Trace | None


def initial_state(canvas: Canvas, frames: int = 0) -> State:
    """Return the state before the first step.

    Args:
      canvas: the rows.
      frames: 0 records nothing, 1 the confidences alone, and more a trace of that length.
    """
    B = canvas.tokens_BxT.shape[0]
    zeros_B = jnp.zeros(B, jnp.int32)
    confidence_BxT = jnp.zeros(canvas.tokens_BxT.shape, jnp.float32) if frames else None
    trace = None
    if frames > 1:
        shape = (frames, *canvas.tokens_BxT.shape)
        trace = Trace(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))
        trace = record(trace, jnp.int32(0), Trace(canvas.tokens_BxT, canvas.masked_BxT, confidence_BxT))
    return State(
        index=jnp.int32(0),
        warm=jnp.bool_(False),
        tokens_BxT=jnp.asarray(canvas.tokens_BxT),
        masked_BxT=jnp.asarray(canvas.masked_BxT),
        block_B=zeros_B,
        step_B=zeros_B,
        initial_B=(jnp.asarray(canvas.masked_BxT) & (canvas.block_BxT == 0)).sum(-1, dtype=jnp.int32),
        changed_B=jnp.ones(B, bool),
        nfe_B=zeros_B,
        finite_B=jnp.ones(B, bool),
        confidence_BxT=confidence_BxT,
        trace=trace,
    )


def record(trace: Trace | None, frame: jax.Array, now: Trace) -> Trace | None:
    """Return the trace with the (B, T) arrays of `now` as one of its frames."""
    if trace is None:
        return None
    return Trace(*(jnp.asarray(states).at[frame].set(x) for states, x in zip(trace, now, strict=True)))


def is_followed(canvas: Canvas) -> jax.Array:
    """Mark the positions with given tokens after them, so that a text does not end there. bool (B, T)."""
    given_BxT = jnp.asarray(~canvas.masked_BxT & (canvas.segment_ids_BxT != 0))
    return jnp.cumsum(given_BxT[:, ::-1], axis=-1, dtype=jnp.int32)[:, ::-1] > 0


def block_counts(canvas: Canvas) -> jax.Array:
    """Return how many blocks each row has. int32 (B,)."""
    return jnp.asarray(canvas.block_BxT).max(-1) + 1


def has_work(canvas: Canvas, state: State) -> jax.Array:
    """Mark the rows that still have a block to do. bool (B,)."""
    return state.block_B < block_counts(canvas)


def block_steps(canvas: Canvas, steps: Array, block_B: Array) -> jax.Array:
    """Return the steps of a block: an even share of all, the remainder going first, and at least one. int32 (B,)."""
    blocks_B = jnp.maximum(block_counts(canvas), 1)
    return jnp.maximum(steps // blocks_B + (block_B < steps % blocks_B).astype(jnp.int32), 1)
