"""The compiled programs of a generation: which part of a request is data, which is compiled in, and how they run."""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm.config import ModelConfig
from diffusionlm.diffusion import schedules
from diffusionlm.parallel.bits import in_32_bits
from diffusionlm.parallel.device_memory import room_for
from diffusionlm.parallel.mesh import Array, row_ways
from diffusionlm.sampling import loop, propose
from diffusionlm.sampling.canvas import Canvas
from diffusionlm.sampling.denoiser import Denoiser, Guided, Memory, ModelDenoiser
from diffusionlm.sampling.device_settings import Settings
from diffusionlm.sampling.kv_cache import Windows
from diffusionlm.sampling.state import Job, State, has_work, initial_state
from diffusionlm.tree_types import Params, PyTree


class Inputs(NamedTuple):
    """The data that a generation gives to the device besides the parameters; another value does not recompile."""

    suppressed_V: Array
    canvas: Canvas
    key: jax.Array
    settings: Settings


class Structure(NamedTuple):
    """The static settings that a generation is compiled for, besides shapes."""

    model: ModelConfig
    schedule: schedules.Schedule
    shifted: bool
    mask_id: int | None
    eos_ids: tuple[int, ...]
    guided: bool
    windows: Windows


@functools.partial(jax.jit, static_argnames="structure")
def denoise(params: Params, inputs: Inputs, state: State, leave: jax.Array, *, structure: Structure) -> State:
    """Run the denoising loop until at most `leave` rows have work."""
    return loop.denoise(_job(params, inputs, structure), state, leave)


@in_32_bits
@functools.partial(jax.jit, static_argnames="structure")
def step(params: Params, inputs: Inputs, state: State, memory: Memory, *, structure: Structure) -> tuple[State, Memory]:
    """Run one step of the denoising loop; the first takes an empty memory."""
    return loop.advance(_job(params, inputs, structure), state, memory)


@in_32_bits
@functools.partial(jax.jit, static_argnames="structure")
def empty_memory(params: Params, inputs: Inputs, *, structure: Structure) -> Memory:
    """Return the memory before the first step."""
    return _job(params, inputs, structure).denoiser.empty_memory(*inputs.canvas.tokens_BxT.shape)


def needs(canvas: Canvas, structure: Structure, frames: int = 0) -> dict[str, int]:
    """Return the bytes that a generation needs beside the parameters, by part; at least.

    The memory of the loop, the logits of one turn and the trace are counted, and not what a forward pass needs.
    """
    B, T = canvas.tokens_BxT.shape
    model, passes = structure.model, 2 if structure.guided else 1
    bytes_per_value = passes * B * T * jnp.dtype(model.dtype).itemsize
    positions = propose.positions_at_a_time(B, T, structure.windows)
    cached = structure.windows.cache != "none"
    return {
        "hidden states": model.d_model * bytes_per_value,
        "cache": 2 * model.n_layers * model.n_kv_heads * model.head_dim * bytes_per_value if cached else 0,
        "logits": passes * B * positions * model.embedding_rows * 4,
        "trace": frames * B * T * 9 if frames > 1 else 0,  # int32, bool and float32: see `Trace`
    }


@in_32_bits
def run(
    params: Params, inputs: Inputs, structure: Structure, *, frames: int = 0, compact: bool = False
) -> tuple[State, float]:
    """Denoise a canvas.

    Args:
      params: the parameters.
      inputs: the canvas and the settings.
      structure: what to compile for.
      frames: as in `initial_state`.
      compact: let the rows that still have work continue in a smaller batch, unless a trace is recorded.

    Returns:
      The final state, fetched to the host, and the seconds on the device, without compilation.

    Raises:
      UserError: it cannot fit into the memory.
    """
    what = "generating {} rows of {} tokens at a time".format(*inputs.canvas.tokens_BxT.shape)
    fix = "generate fewer or shorter rows at a time, or without a trace or a cache"
    with room_for(what, params, needs(inputs.canvas, structure, frames), fix):
        return _denoise(params, inputs, structure, frames, compact)


def _denoise(params: Params, inputs: Inputs, structure: Structure, frames: int, compact: bool) -> tuple[State, float]:
    compact = compact and frames <= 1
    state, seconds = _run_timed(params, inputs, structure, initial_state(inputs.canvas, frames), compact)
    while compact and (working_B := np.asarray(has_work(inputs.canvas, state))).any():
        rows = _rows_to_keep(working_B, row_ways())
        smaller = inputs._replace(canvas=_take_rows(inputs.canvas, rows))
        result, more_seconds = _run_timed(params, smaller, structure, _take_rows(state, rows), True)
        seconds += more_seconds
        state = jax.tree.map(functools.partial(_put_rows, rows), state, result)
    return state, seconds


def _run_timed(
    params: Params, inputs: Inputs, structure: Structure, state: State, compact: bool
) -> tuple[State, float]:
    leave = np.int32(_smaller_batch(len(inputs.canvas.row_ids_B), row_ways()) if compact else 0)
    program = functools.partial(denoise, params, structure=structure, leave=leave)
    idle = inputs.canvas._replace(block_BxT=np.full_like(inputs.canvas.block_BxT, -1))
    jax.block_until_ready(program(inputs._replace(canvas=idle), state))  # compiles, and takes no step
    began = time.perf_counter()
    result = jax.device_get(program(inputs, state))
    return result, time.perf_counter() - began


def _smaller_batch(B: int, ways: int) -> int:
    """Return the next smaller batch than B rows, a power of two on each of `ways` devices; 0: there is none."""
    return (1 << (-(-B // ways) - 1).bit_length()) // 2 * ways


def _rows_to_keep(working_B: np.ndarray, ways: int) -> np.ndarray:
    """Return the indices of the rows that have work, and of others that fill them up to a power of two per device."""
    working_first_B = np.argsort(~working_B, kind="stable")
    return working_first_B[: ways << (-(-int(working_B.sum()) // ways) - 1).bit_length()]


def _take_rows(tree: PyTree, rows: np.ndarray) -> PyTree:
    return jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, tree)


def _put_rows(rows: np.ndarray, x: Array, new: Array) -> Array:
    if not np.ndim(x):
        return new
    x = np.array(x)
    x[rows] = new
    return x


def _job(params: Params, inputs: Inputs, structure: Structure) -> Job:
    canvas, settings, windows = inputs.canvas, inputs.settings, structure.windows
    denoiser: Denoiser = ModelDenoiser(params, structure.model, structure.shifted, cached=windows.cache != "none")
    if structure.guided:
        assert structure.mask_id is not None  # `SamplingConfig.resolve` refuses to guide an autoregressive model
        segment_ids_BxT = jnp.asarray(canvas.segment_ids_BxT)
        given_BxT = jnp.asarray(~canvas.masked_BxT) & (segment_ids_BxT != 0)
        scale, standard = settings.guidance, settings.standard_guidance
        denoiser = Guided(denoiser, given_BxT, segment_ids_BxT, structure.mask_id, scale, standard)
    return Job(
        denoiser=denoiser,
        schedule=structure.schedule,
        suppressed_V=inputs.suppressed_V,
        canvas=canvas,
        key=inputs.key,
        settings=settings,
        eos_ids=structure.eos_ids,
        windows=windows,
    )
