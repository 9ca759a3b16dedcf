"""The entry point of sampling: prompts or templates of token ids in, new tokens out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np

from diffusionlm.errors import UserError
from diffusionlm.model.spec import ModelSpec
from diffusionlm.parallel.bits import in_32_bits
from diffusionlm.sampling import programs
from diffusionlm.sampling.canvas import Template, expand_spans, span_lengths
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.request import Request, prepare
from diffusionlm.sampling.state import State, Trace, has_work, initial_state
from diffusionlm.tree_types import Params


class Frame(NamedTuple):
    """One state of a denoising, as `stream` yields it: (B, length) arrays."""

    step: int
    tokens: np.ndarray  # int32; masked positions hold the mask id
    masked: np.ndarray  # bool
    confidence: np.ndarray  # float32: the probability of each revealed token when it was revealed


@dataclass(frozen=True)
class GenerationResult:
    """New tokens, one row per prompt.

    Attributes:
      tokens: int32 (B, length), not cut at the end of text.
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
    """Rows whose gaps are filled, one per template.

    Attributes:
      rows: all ids of each row, given and new.
      span_lengths: the tokens that each `Span` of a template was filled with, in order.
      nfe: int32 (B,), forward passes that each row needed; with guidance each counts twice.
      seconds: wall time of the whole batch, without compilation.
      trace: every state of the denoising, as arrays (frames, B, T) of whole rows padded on the right, if asked for.
    """

    rows: list[list[int]]
    span_lengths: list[tuple[int, ...]]
    nfe: np.ndarray
    seconds: float
    trace: Trace | None


def generate(
    params: Params,
    cfg: ModelSpec,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    key: jax.Array | None = None,
    *,
    row_ids: Sequence[int] | None = None,
    trace: bool = False,
) -> GenerationResult:
    """Generate `sampling.length` new tokens after each prompt.

    Runs wherever `params` live; for a mesh, call it under `jax.set_mesh`. An autoregressive model takes the same road:
    one token a step from left to right, with a key/value cache. More steps than new tokens are allowed, and a step that
    follows one in which nothing was revealed needs no forward pass. Batches are padded with idle rows to 1, 2, 4 or a
    multiple of 8, so that batches of similar sizes share a program; on a mesh, to a multiple of its data and fsdp ways.

    Args:
      params: the parameters of `Transformer(cfg.model)`.
      cfg: the model; `ModelSpec.of(config)` for one that was just trained.
      prompts: token ids, of any lengths; an empty prompt samples unconditionally (masked diffusion models only).
      sampling: the settings.
      key: the root key of the noise; None: `jax.random.key(sampling.seed)`.
      row_ids: the numbers that key the noise of the rows; None: their indices. Equal prompts and ids give equal tokens.
      trace: also record every state of the denoising.

    Raises:
      UserError: no prompts, a prompt that is too long or holds the mask token or an unknown id, settings that the model
        does not support, or NaN logits.
    """
    templates, new = _completion_templates(prompts, sampling)
    request = prepare(cfg, templates, sampling, key, row_ids)
    state, seconds = _run(params, request, request.trace_frames() if trace else 0)
    tokens = np.asarray(state.tokens_BxT)[new]
    return GenerationResult(tokens, request.nfe(state), seconds, _recorded(state, new) if trace else None)


def infill(
    params: Params,
    cfg: ModelSpec,
    templates: Sequence[Template],
    sampling: SamplingConfig,
    key: jax.Array | None = None,
    *,
    row_ids: Sequence[int] | None = None,
    trace: bool = False,
) -> Infilling:
    """Fill the gaps of each template, given all of its tokens: None is one token, a `Span` several.

    Tokens may be pinned anywhere, so this also generates under constraints. A model of this kind says nothing about
    lengths, so a row with spans is filled in every length, all as rows of one batch, and the filling in which the model
    was most confident is kept: by the mean of log p over the tokens that it revealed, at the time when it revealed
    them. `sampling.length` is ignored; where `sampling.steps` is None, it is the number of gap positions of the longest
    row.

    Raises:
      UserError: as `generate`, tokens after a gap for an autoregressive model, or spans of too many lengths.
    """
    candidates = [(r, lengths) for r, template in enumerate(templates) for lengths in span_lengths(r, template)]
    owners = [r for r, _ in candidates]  # the template of each candidate
    rows = [expand_spans(templates[r], lengths) for r, lengths in candidates]
    sampling = _with_length_of(rows, sampling)
    ids = range(len(templates)) if row_ids is None else row_ids
    if len(ids) != len(templates):
        raise UserError(f"{len(ids)} row_ids for {len(templates)} rows; give one for each")
    request = prepare(cfg, rows, sampling, key, [ids[r] for r in owners], owners)
    spans = len(rows) > len(templates)
    state, seconds = _run(params, request, request.trace_frames() if trace else int(spans))
    best = _most_confident(state, owners) if spans else list(range(len(rows)))
    nfe = np.bincount(owners, weights=request.nfe(state)).astype(np.int32)
    recorded = _recorded(state, (best,)) if trace else None
    filled = [state.tokens_BxT[b, : len(rows[b])].tolist() for b in best]
    return Infilling(filled, [candidates[b][1] for b in best], nfe, seconds, recorded)


def stream(
    params: Params,
    cfg: ModelSpec,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    key: jax.Array | None = None,
    *,
    row_ids: Sequence[int] | None = None,
) -> Iterator[Frame]:
    """Yield the states that `generate` goes through, as they come; the last holds its tokens.

    Every step is a call to the device of its own, so this is for watching, not for speed. Arguments and errors are
    those of `generate`.
    """
    templates, new = _completion_templates(prompts, sampling)
    for step, *states in stream_rows(params, cfg, templates, sampling, key, row_ids=row_ids):
        yield Frame(step, *(x_BxT[new] for x_BxT in states))


def stream_rows(
    params: Params,
    cfg: ModelSpec,
    templates: Sequence[Template],
    sampling: SamplingConfig,
    key: jax.Array | None = None,
    *,
    row_ids: Sequence[int] | None = None,
) -> Iterator[Frame]:
    """Yield the states that `infill` goes through, as they come; the last holds its rows, padded on the right.

    Arguments and errors are those of `infill`.

    Raises:
      UserError: a span may have several lengths, all of which `infill` fills as rows of their own.
    """
    lengths = [span_lengths(r, template) for r, template in enumerate(templates)]
    for r, choices in enumerate(lengths):
        if len(choices) > 1:
            raise UserError(
                f"row {r} has a gap of several lengths, which are filled as rows of their own; use `infill`"
            )
    rows = [expand_spans(template, choices[0]) for template, choices in zip(templates, lengths, strict=True)]
    request = prepare(cfg, rows, _with_length_of(rows, sampling), key, row_ids)
    state = initial_state(request.inputs.canvas, frames=1)
    memory = programs.empty_memory(params, request.inputs, structure=request.structure)
    while True:
        fetched = jax.device_get(state)
        request.check_finite(fetched)
        yield Frame(int(fetched.index), fetched.tokens_BxT, fetched.masked_BxT, fetched.confidence_BxT)
        if not np.asarray(has_work(request.inputs.canvas, state)).any():
            return
        state, memory = programs.step(params, request.inputs, state, memory, structure=request.structure)


def lower(
    params: Params, cfg: ModelSpec, prompts: Sequence[Sequence[int]], sampling: SamplingConfig
) -> jax.stages.Lowered:
    """Lower the program of `generate` without running it; `params` may be abstract.

    Raises:
      UserError: as `generate`.
    """
    templates, _ = _completion_templates(prompts, sampling)
    return lower_request(params, prepare(cfg, templates, sampling, jax.eval_shape(lambda: jax.random.key(0))))


@in_32_bits
def lower_request(params: Params, request: Request) -> jax.stages.Lowered:
    """Lower the program of a request; `params` may be abstract."""
    state = jax.eval_shape(initial_state, request.inputs.canvas)
    leave = jax.ShapeDtypeStruct((), np.int32)
    return programs.denoise.lower(params, request.inputs, state, leave, structure=request.structure)


def _completion_templates(
    prompts: Sequence[Sequence[int]], sampling: SamplingConfig
) -> tuple[list[Template], tuple[np.ndarray, np.ndarray]]:
    """Return the prompts with `length` gap positions after them, and the index of these in (B, T) arrays."""
    sampling.validate()
    templates: list[Template] = [[*prompt, *[None] * sampling.length] for prompt in prompts]
    first_Bx1 = np.array([len(prompt) for prompt in prompts], np.int64)[:, None]
    return templates, (np.arange(len(prompts))[:, None], first_Bx1 + np.arange(sampling.length))


def _with_length_of(rows: Sequence[Template], sampling: SamplingConfig) -> SamplingConfig:
    """Return the settings with the number of gap positions of the longest row as their length."""
    return replace(sampling, length=max([row.count(None) for row in rows] + [1]))


def _run(params: Params, request: Request, frames: int) -> tuple[State, float]:
    state, seconds = programs.run(params, request.inputs, request.structure, frames=frames, compact=request.compact)
    request.check_finite(state)
    return state, seconds


def _recorded(state: State, index: tuple) -> Trace:
    """Return the frames of a trace that were written, at an index of their (B, T) arrays."""
    assert state.trace is not None
    return Trace(*(np.asarray(states)[: int(state.index) + 1, *index] for states in state.trace))


def _most_confident(state: State, owners: Sequence[int]) -> list[int]:
    """Return the candidate of each template whose revealed tokens have the highest mean log p."""
    confidence_BxT = np.asarray(state.confidence_BxT)[: len(owners)]
    revealed_BxT = confidence_BxT > 0  # not the positions after an end of text
    log_p_BxT = np.log(np.where(revealed_BxT, confidence_BxT, 1.0))
    mean_B = log_p_BxT.sum(-1) / np.maximum(revealed_BxT.sum(-1), 1)
    by_owner: dict[int, list[int]] = {}
    for b, owner in enumerate(owners):
        by_owner.setdefault(owner, []).append(b)
    return [max(by_owner[owner], key=lambda b: mean_B[b]) for owner in range(len(by_owner))]
