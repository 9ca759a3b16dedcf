"""From prompts or templates of token ids to new tokens: the host's side of the denoising loop."""

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusionlm.diffusion import schedules
from diffusionlm.errors import UserError
from diffusionlm.model.spec import ModelSpec
from diffusionlm.model.transformer import suppression
from diffusionlm.sampling import kv_cache as caches
from diffusionlm.sampling import loop
from diffusionlm.sampling.canvas import Canvas, Template, build, candidates
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.denoiser import Denoiser, Guided, Memory, ModelDenoiser
from diffusionlm.sampling.device_settings import Settings
from diffusionlm.sampling.kv_cache import Windows
from diffusionlm.sampling.loop import Job, State, Trace


class Frame(NamedTuple):
    """One state of a denoising, as `stream` gives it: (B, length) arrays."""

    step: int
    tokens: np.ndarray  # int32; masked positions hold the mask id
    masked: np.ndarray  # bool
    confidence: np.ndarray  # float32: of the revealed tokens when they were revealed


@dataclass(frozen=True)
class GenerationResult:
    """New tokens, one row a prompt.

    Attributes:
      tokens: int32 (B, length), nothing cut at the end of text.
      nfe: int32 (B,), forward passes that each row needed; with guidance each counts twice.
      seconds: wall time of the whole batch, without compilation.
      trace: every state of the denoising, as arrays (frames, B, length), if it was asked for.
    """

    tokens: np.ndarray
    nfe: np.ndarray
    seconds: float
    trace: Trace | None


@dataclass(frozen=True)
class Infilling:
    """Rows whose gaps are filled, one a template.

    Attributes:
      rows: all ids of each row, given and new.
      nfe: int32 (B,), forward passes that each row needed; with guidance each counts twice.
      seconds: wall time of the whole batch, without compilation.
      trace: every state of the denoising, as arrays (frames, B, T) of whole rows padded on the right, if asked for.
    """

    rows: list[list[int]]
    nfe: np.ndarray
    seconds: float
    trace: Trace | None


def generate(
    params: Any,
    cfg: ModelSpec,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    key: jax.Array | None = None,
    *,
    row_ids: Sequence[int] | None = None,
    trace: bool = False,
) -> GenerationResult:
    """Generates `sampling.length` new tokens after each prompt.

    Runs wherever `params` live; for a mesh, call it under `jax.set_mesh`. An autoregressive model takes the same road:
    one token a step from left to right, with a key/value cache. More steps than new tokens is allowed, and a step that
    follows one in which nothing was revealed needs no forward pass.

    Args:
      params: the parameters of `Transformer(cfg.model)`.
      cfg: the model; `ModelSpec.of(config)` for one that was just trained.
      prompts: token ids, of any lengths; an empty prompt samples unconditionally (masked diffusion models only).
      sampling: the settings.
      key: the noise; None: `jax.random.key(sampling.seed)`.
      row_ids: what the noise of each row is keyed by; None: its index. Equal prompts and ids give equal tokens.
      trace: also record every state of the denoising.

    Raises:
      UserError: no prompts, a prompt that is too long or holds the mask token or an unknown id, settings that the model
        does not support, or NaN logits.
    """
    templates, new = _completions(prompts, sampling)
    request = _prepare(cfg, templates, sampling, key, row_ids)
    result, seconds = _timed(params, request, frames=_frames(request) if trace else 0)
    recorded = None
    if trace:
        recorded = Trace(*(states[: result.index + 1, *new] for states in result.trace))
    return GenerationResult(result.tokens_BxT[new], _nfe(request, result), seconds, recorded)


def infill(
    params: Any,
    cfg: ModelSpec,
    templates: Sequence[Template],
    sampling: SamplingConfig,
    key: jax.Array | None = None,
    *,
    row_ids: Sequence[int] | None = None,
    trace: bool = False,
) -> Infilling:
    """Fills the gaps of each template, given all of its tokens: None is one token, a `Span` some.

    Tokens may be pinned anywhere, so this also generates under constraints. A model says nothing of lengths, so a row
    with spans is filled in every length, all as rows of one batch, and the filling that the model was surest of is
    kept: by the mean over the tokens that it revealed of log p at that time. `sampling.length` counts for nothing, but
    that `sampling.steps`, where it is None, is the number of gap positions of the longest.

    Raises:
      UserError: as `generate`, tokens after a gap for an autoregressive model, or spans of too many lengths.
    """
    rows = [candidates(r, template) for r, template in enumerate(templates)]
    whose = [r for r, several in enumerate(rows) for _ in several]
    flat = [row for several in rows for row in several]
    gaps = max((row.count(None) for row in flat), default=1)
    sampling = replace(sampling, length=max(gaps, 1))
    ids = range(len(templates)) if row_ids is None else row_ids
    if len(ids) != len(templates):
        raise UserError(f"{len(ids)} row_ids for {len(templates)} rows; give one for each")
    request = _prepare(cfg, flat, sampling, key, [ids[r] for r in whose], whose)
    chosen = len(flat) > len(templates)
    result, seconds = _timed(params, request, frames=_frames(request) if trace else int(chosen))
    best = list(range(len(flat)))
    if chosen:
        revealed_BxT = result.confidence_BxT > 0  # not the places behind an end of text
        log_p_BxT = np.log(np.where(revealed_BxT, result.confidence_BxT, 1.0))
        sureness_B = log_p_BxT.sum(-1) / np.maximum(revealed_BxT.sum(-1), 1)
        best = [max((b for b in best if whose[b] == r), key=lambda b: sureness_B[b]) for r in range(len(templates))]
    nfe = np.bincount(whose, weights=_nfe(request, result)).astype(np.int32)
    recorded = Trace(*(states[: result.index + 1, best] for states in result.trace)) if trace else None
    return Infilling([result.tokens_BxT[b, : len(flat[b])].tolist() for b in best], nfe, seconds, recorded)


def stream(
    params: Any,
    cfg: ModelSpec,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    key: jax.Array | None = None,
    *,
    row_ids: Sequence[int] | None = None,
) -> Iterator[Frame]:
    """The states that `generate` goes through, one by one as they come; the last holds its tokens.

    Every step is a call to the device of its own, so this is for watching, not for speed. Arguments and errors are
    those of `generate`.
    """
    templates, new = _completions(prompts, sampling)
    request = _prepare(cfg, templates, sampling, key, row_ids)
    state, memory = loop.start(request.data.canvas, 1), None
    while True:
        shown = jax.device_get(state)
        _check_finite(shown, request.whose)
        yield Frame(
            int(shown.index),
            shown.tokens_BxT[new],
            shown.masked_BxT[new],
            shown.confidence_BxT[new],
        )
        if not jax.device_get(loop.working(request.data.canvas, state)).any():
            return
        state, memory = _step(params, request.data, state, memory, static=request.static)


def lower(
    params: Any, cfg: ModelSpec, prompts: Sequence[Sequence[int]], sampling: SamplingConfig
) -> jax.stages.Lowered:
    """The program of `generate`, lowered and not run; `params` may be abstract.

    Raises:
      UserError: as of `generate`.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    request = _prepare(cfg, _completions(prompts, sampling)[0], sampling, key, None)
    state = jax.eval_shape(loop.start, request.data.canvas)
    return _run.lower(params, request.data, state, jax.ShapeDtypeStruct((), np.int32), static=request.static)


def _completions(
    prompts: Sequence[Sequence[int]], sampling: SamplingConfig
) -> tuple[list[Template], tuple[np.ndarray, np.ndarray]]:
    """The templates of prompts with `length` places behind them, and the index of these places in (B, T) arrays."""
    sampling.validate()
    templates = [[*prompt, *[None] * sampling.length] for prompt in prompts]
    first_Bx1 = np.array([len(prompt) for prompt in prompts], np.int64)[:, None]
    return templates, (np.arange(len(prompts))[:, None], first_Bx1 + np.arange(sampling.length))


class _Data(NamedTuple):
    """What a generation gives to the device besides the parameters."""

    suppressed_V: Any
    canvas: Canvas
    key: jax.Array
    settings: Settings


class _Static(NamedTuple):
    """What a generation is compiled for."""

    spec: ModelSpec
    schedule: schedules.Schedule
    guided: bool
    windows: Windows


class _Request(NamedTuple):
    data: _Data
    static: _Static
    compact: bool
    whose: Sequence[int]


def _prepare(
    cfg: ModelSpec,
    templates: Sequence[Template],
    sampling: SamplingConfig,
    key: jax.Array | None,
    row_ids: Sequence[int] | None,
    whose: Sequence[int] | None = None,
) -> _Request:
    sampling = sampling.resolve(autoregressive=cfg.autoregressive)
    if sampling.guidance and sampling.guidance_kind == "standard" and cfg.shifted:
        raise UserError(
            "guidance_kind=standard leaves the prompt out, but this model predicts each token from the position before "
            "it; use guidance_kind=unsupervised"
        )
    # An autoregressive row goes on by one position at a time, which is all that a step with a cache computes.
    block_length = 1 if cfg.autoregressive else sampling.block_length
    whose = range(len(templates)) if whose is None else whose  # what the user calls each row
    canvas = build(cfg, templates, block_length, range(len(templates)) if row_ids is None else row_ids, whose)
    static = _Static(
        spec=cfg,
        schedule=schedules.build(cfg.diffusion),
        guided=sampling.guidance > 0,
        windows=caches.plan(sampling.cache, cfg.shifted, canvas),
    )
    data = _Data(
        suppressed_V=suppression(cfg.model, cfg.suppressed_ids),
        canvas=canvas,
        key=jax.random.key(sampling.seed) if key is None else key,
        settings=Settings.of(sampling),
    )
    return _Request(data, static, sampling.compact, whose)


def _frames(request: _Request) -> int:
    """Frames enough for every step: a power of two, so that a trace of other steps rarely compiles anew."""
    canvas, steps = request.data.canvas, int(request.data.settings.steps)
    blocks = range(int(canvas.block_BxT.max()) + 1)
    most = max(steps, len(blocks))  # a row with more blocks than steps takes one step a block
    if request.static.windows.lockstep:  # the slowest row of each block counts
        B = len(canvas.row_ids_B)
        most = sum(int(loop.block_steps(canvas, steps, np.full(B, b, np.int32)).max()) for b in blocks)
    return 1 << most.bit_length()


def _timed(params: Any, request: _Request, frames: int = 0) -> tuple[State, float]:
    """The final state, and the seconds without compilation."""
    state, seconds = _run_timed(params, request, loop.start(request.data.canvas, frames), frames <= 1)
    while request.compact and frames <= 1 and (working_B := _working(request, state)).any():
        rows = _bucket_of(working_B)
        part = request._replace(data=request.data._replace(canvas=_rows(request.data.canvas, rows)))
        done, more = _run_timed(params, part, _rows(state, rows), True)
        seconds += more
        state = jax.tree.map(lambda whole, some, rows=rows: _with_rows(whole, some, rows), state, done)
    _check_finite(state, request.whose)
    return state, seconds


def _run_timed(params: Any, request: _Request, state: State, may_leave: bool) -> tuple[State, float]:
    B = len(request.data.canvas.row_ids_B)
    leave = np.int32((1 << (B - 1).bit_length()) // 2 if request.compact and may_leave and B > 1 else 0)
    run = functools.partial(_run, params, static=request.static, leave=leave)
    nothing = request.data.canvas._replace(block_BxT=np.full_like(request.data.canvas.block_BxT, -1))
    jax.block_until_ready(run(request.data._replace(canvas=nothing), state))  # compiles, and runs nothing
    began = time.perf_counter()
    result = jax.device_get(run(request.data, state))
    return result, time.perf_counter() - began


def _nfe(request: _Request, state: State) -> np.ndarray:
    """Forward passes of each row; a guided one counts twice."""
    return state.nfe_B * (2 if request.static.guided else 1)


def _working(request: _Request, state: State) -> np.ndarray:
    return np.asarray(loop.working(request.data.canvas, state))


def _bucket_of(working_B: np.ndarray) -> np.ndarray:
    """The rows that have work left, filled up to a power of two with rows that have none."""
    first_B = np.argsort(~working_B, kind="stable")
    return first_B[: 1 << (int(working_B.sum()) - 1).bit_length()]


def _rows(tree: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, tree)


def _with_rows(whole: Any, some: Any, rows: np.ndarray) -> Any:
    if not np.ndim(whole):
        return some
    whole = np.array(whole)
    whole[rows] = some
    return whole


def _check_finite(state: State, whose: Sequence[int]) -> None:
    if not state.finite_B.all():
        damaged = whose[int(np.argmin(state.finite_B))]
        raise UserError(f"the model gives NaN logits for prompt {damaged}: its parameters are damaged")


@functools.partial(jax.jit, static_argnames="static")
def _run(params: Any, data: _Data, state: State, leave: jax.Array, *, static: _Static) -> State:
    return loop.denoise(_job(params, data, static), state, leave)


@functools.partial(jax.jit, static_argnames="static")
def _step(params: Any, data: _Data, state: State, memory: Memory | None, *, static: _Static) -> tuple[State, Memory]:
    job = _job(params, data, static)
    return loop.advance(job, state, job.denoiser.forget(*state.tokens_BxT.shape) if memory is None else memory)


def _job(params: Any, data: _Data, static: _Static) -> Job:
    spec, canvas = static.spec, data.canvas
    denoiser: Denoiser = ModelDenoiser(params, spec.model, spec.shifted, cached=static.windows.cache != "none")
    if static.guided:
        given_BxT = ~canvas.masked_BxT & (canvas.segment_ids_BxT != 0)
        denoiser = Guided(
            denoiser,
            given_BxT,
            canvas.segment_ids_BxT,
            spec.mask_id,
            data.settings.guidance,
            data.settings.standard_guidance,
        )
    schedule, windows = static.schedule, static.windows
    return Job(denoiser, schedule, data.suppressed_V, canvas, data.key, data.settings, spec.eos_ids, windows)
