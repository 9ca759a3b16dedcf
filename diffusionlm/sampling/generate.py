"""From prompts or templates of token ids to new tokens: the host's side of the denoising loop."""

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm import schedules
from diffusionlm.errors import UserError
from diffusionlm.model import suppression
from diffusionlm.sampling import loop
from diffusionlm.sampling.canvas import Canvas, Template, build
from diffusionlm.sampling.config import ModelSpec, SamplingConfig
from diffusionlm.sampling.loop import Settings, State, Trace


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
      nfe: int32 (B,), forward passes that each row needed.
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
      nfe: int32 (B,), forward passes that each row needed.
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
    one token a step from left to right, each a full forward pass over the canvas (there is no key/value cache yet).
    More steps than new tokens is allowed: "ancestral" uses them all unless it is done before, the others stop after
    `length` forward passes.

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
    sampling, canvas, settings, static, key = _prepare(cfg, templates, sampling, key, row_ids)
    result, seconds = _timed(params, cfg, sampling, canvas, settings, static, key, trace)
    recorded = None
    if trace:
        recorded = Trace(*(states[: result.index + 1, *new] for states in result.trace))
    return GenerationResult(result.tokens_BxT[new], result.nfe_B, seconds, recorded)


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
    """Fills the gaps (None) of each template, given all of its tokens; the lengths of the gaps are the templates'.

    Tokens may be pinned anywhere, so this also generates under constraints. `sampling.length` counts for nothing, but
    that `sampling.steps`, where it is None, is the number of gap positions of the longest.

    Raises:
      UserError: as `generate`, or tokens after a gap for an autoregressive model.
    """
    gaps = max((sum(token is None for token in template) for template in templates), default=1)
    sampling = replace(sampling, length=max(gaps, 1))
    sampling, canvas, settings, static, key = _prepare(cfg, templates, sampling, key, row_ids)
    result, seconds = _timed(params, cfg, sampling, canvas, settings, static, key, trace)
    rows = [result.tokens_BxT[r, : len(template)].tolist() for r, template in enumerate(templates)]
    recorded = Trace(*(states[: result.index + 1] for states in result.trace)) if trace else None
    return Infilling(rows, result.nfe_B, seconds, recorded)


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
    sampling, canvas, settings, static, key = _prepare(cfg, templates, sampling, key, row_ids)
    suppressed_V = suppression(cfg.model, cfg.suppressed_ids)
    state = jax.tree.map(jnp.asarray, loop.start(Canvas(*map(jnp.asarray, canvas)), 1))
    while True:
        shown = jax.device_get(state)
        _check_finite(shown)
        yield Frame(
            int(shown.index),
            shown.tokens_BxT[new],
            shown.masked_BxT[new],
            shown.confidence_BxT[new],
        )
        if not jax.device_get(loop.working(canvas, state)).any():
            return
        state = _step(params, suppressed_V, canvas, key, settings, state, **static)


def _completions(
    prompts: Sequence[Sequence[int]], sampling: SamplingConfig
) -> tuple[list[Template], tuple[np.ndarray, np.ndarray]]:
    """The templates of prompts with `length` places behind them, and the index of these places in (B, T) arrays."""
    sampling.validate()
    templates = [[*prompt, *[None] * sampling.length] for prompt in prompts]
    first_Bx1 = np.array([len(prompt) for prompt in prompts], np.int64)[:, None]
    return templates, (np.arange(len(prompts))[:, None], first_Bx1 + np.arange(sampling.length))


def _prepare(
    cfg: ModelSpec,
    templates: Sequence[Template],
    sampling: SamplingConfig,
    key: jax.Array | None,
    row_ids: Sequence[int] | None,
) -> tuple[SamplingConfig, Canvas, Settings, dict[str, Any], jax.Array]:
    sampling = sampling.resolve(autoregressive=cfg.autoregressive)
    canvas = build(cfg, templates, sampling.block_length, range(len(templates)) if row_ids is None else row_ids)
    static = {
        "spec": cfg,
        "schedule": schedules.build(cfg.diffusion),
        "guided": sampling.guidance > 0,
    }
    key = jax.random.key(sampling.seed) if key is None else key
    return sampling, canvas, Settings.of(sampling), static, key


def _timed(
    params: Any,
    cfg: ModelSpec,
    sampling: SamplingConfig,
    canvas: Canvas,
    settings: Settings,
    static: dict[str, Any],
    key: jax.Array,
    trace: bool,
) -> tuple[State, float]:
    # A power of two, so that a trace of other steps rarely compiles anew. A row with more blocks than steps takes one
    # step a block.
    most = max(sampling.steps, int(canvas.block_BxT.max()) + 1)
    frames = 1 << most.bit_length() if trace else 0
    suppressed_V = suppression(cfg.model, cfg.suppressed_ids)
    run = functools.partial(_run, params, suppressed_V, key=key, settings=settings, frames=frames, **static)
    nothing = canvas._replace(block_BxT=np.full_like(canvas.block_BxT, -1))
    jax.block_until_ready(run(canvas=nothing))  # compiles, and runs nothing
    began = time.perf_counter()
    result = jax.device_get(run(canvas=canvas))
    seconds = time.perf_counter() - began
    _check_finite(result)
    return result, seconds


def _check_finite(state: State) -> None:
    if not state.finite_B.all():
        raise UserError(
            f"the model gives NaN logits for prompt {int(np.argmin(state.finite_B))}: its parameters are damaged"
        )


_STATIC = ("spec", "schedule", "guided")


@functools.partial(jax.jit, static_argnames=(*_STATIC, "frames"))
def _run(
    params: Any,
    suppressed_V: jax.Array,
    *,
    canvas: Canvas,
    key: jax.Array,
    settings: Settings,
    spec: ModelSpec,
    schedule: schedules.Schedule,
    guided: bool,
    frames: int,
) -> State:
    denoiser = _denoiser(params, canvas, settings, spec, guided)
    return loop.denoise(denoiser, schedule, suppressed_V, canvas, key, settings, frames, spec.eos_ids)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _step(
    params: Any,
    suppressed_V: jax.Array,
    canvas: Canvas,
    key: jax.Array,
    settings: Settings,
    state: State,
    *,
    spec: ModelSpec,
    schedule: schedules.Schedule,
    guided: bool,
) -> State:
    denoiser = _denoiser(params, canvas, settings, spec, guided)
    return loop.advance(denoiser, schedule, suppressed_V, canvas, key, settings, state, spec.eos_ids)


def _denoiser(params: Any, canvas: Canvas, settings: Settings, spec: ModelSpec, guided: bool) -> loop.Denoiser:
    denoiser = loop.model_denoiser(params, spec.model, shifted=spec.shifted)
    if not guided:
        return denoiser
    return loop.guided_denoiser(denoiser, ~canvas.masked_BxT, spec.mask_id, settings.guidance)
