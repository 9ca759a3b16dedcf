"""The denoising loop: one compiled program on the device, from prompts to tokens, without a host round trip per step.

A row of the canvas is its prompt, then `length` masked positions, then padding (segment id 0, attended by nobody), so
positions count real tokens. What is masked is carried as a boolean array; a token's id never says so.

The noise of a position is a function of (key, row id, step, position), so a row's tokens do not depend on its batch
mates, nor on the padding of the canvas. Only shapes and the model are compiled in: steps, strategy, temperature and
noise are data.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm import schedules
from diffusionlm.config import ModelConfig
from diffusionlm.errors import UserError
from diffusionlm.model import Transformer, suppression
from diffusionlm.sampling.config import ModelSpec, SamplingConfig
from diffusionlm.sampling.strategies import STRATEGIES, Step

CANVAS_MULTIPLE = 64  # canvases are padded to a multiple of this, so that prompts of similar lengths share a program

# tokens, segment ids, masked (B, T) -> logits (B, T, V)
Denoiser = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Canvas(NamedTuple):
    """The rows to be denoised."""

    tokens_BxT: jax.Array  # int32; masked positions hold the mask id
    masked_BxT: jax.Array  # bool: to be generated
    segment_ids_BxT: jax.Array  # int32: 1, or 0 for padding
    row_ids_B: jax.Array  # int32: what the noise of a row is keyed by


class Settings(NamedTuple):
    """What a generation may change without recompiling."""

    steps: jax.Array  # int32
    strategy: jax.Array  # int32: an index into `STRATEGIES`
    temperature: jax.Array  # float32


class Trace(NamedTuple):
    """Every state of a denoising; frame 0 is the start. (frames, B, T) on the device, (frames, B, length) for users."""

    tokens: Any  # int32; masked positions hold the mask id
    masked: Any  # bool


class State(NamedTuple):
    """What a step changes."""

    index: jax.Array  # int32: steps done, each one forward pass of the whole batch
    tokens_BxT: jax.Array  # int32
    masked_BxT: jax.Array  # bool: still to be revealed
    nfe_B: jax.Array  # int32: forward passes that the row still had masks for
    finite_B: jax.Array  # bool: no logits of a masked position have been NaN
    trace: Trace | None


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
    sampling = sampling.resolve(autoregressive=cfg.autoregressive)
    row_ids = range(len(prompts)) if row_ids is None else row_ids
    canvas = _canvas(cfg, prompts, sampling.length, row_ids)
    settings = Settings(
        steps=np.int32(sampling.steps),
        strategy=np.int32(list(STRATEGIES).index(sampling.strategy)),
        temperature=np.float32(sampling.temperature),
    )
    key = jax.random.key(sampling.seed) if key is None else key
    run = functools.partial(
        _run,
        params,
        suppression(cfg.model, cfg.suppressed_ids),
        canvas,
        key,
        model_cfg=cfg.model,
        shifted=cfg.shifted,
        schedule=schedules.build(cfg.diffusion),
        # A power of two, so that a trace of other steps rarely compiles anew.
        frames=1 << sampling.steps.bit_length() if trace else 0,
    )
    jax.block_until_ready(run(settings._replace(steps=np.int32(0))))  # compiles, and runs nothing
    start = time.perf_counter()
    result = jax.device_get(run(settings))
    seconds = time.perf_counter() - start
    if not result.finite_B.all():
        raise UserError(
            f"the model gives NaN logits for prompt {int(np.argmin(result.finite_B))}: its parameters are damaged"
        )
    new_BxN = np.array([len(prompt) for prompt in prompts])[:, None] + np.arange(sampling.length)
    rows_Bx1 = np.arange(len(prompts))[:, None]
    recorded = None
    if trace:
        recorded = Trace(*(states[: result.index + 1, rows_Bx1, new_BxN] for states in result.trace))
    return GenerationResult(result.tokens_BxT[rows_Bx1, new_BxN], result.nfe_B, seconds, recorded)


def _canvas(cfg: ModelSpec, prompts: Sequence[Sequence[int]], length: int, row_ids: Sequence[int]) -> Canvas:
    """The padded canvas of a batch of prompts, checked."""
    if not len(prompts):
        raise UserError("no prompts to complete; give at least one (an empty prompt samples unconditionally)")
    for r, prompt in enumerate(prompts):
        ids = np.asarray(prompt, np.int64).reshape(-1)
        if cfg.mask_id is not None and (ids == cfg.mask_id).any():
            raise UserError(
                f"prompt {r} holds the mask token (id {cfg.mask_id}), which only stands for new tokens; remove it"
            )
        if ((ids < 0) | (ids >= cfg.model.vocab_size)).any():
            raise UserError(
                f"prompt {r} holds an id outside the vocabulary, [0, {cfg.model.vocab_size}); use the model's tokenizer"
            )
        if cfg.autoregressive and not len(ids):
            raise UserError(f"prompt {r} is empty: an autoregressive model needs a first token, such as BOS")
        if len(ids) + length > cfg.max_length:
            raise UserError(
                f"length={length} after prompt {r}, of {len(ids)} tokens with any start token, exceeds the model's "
                f"context of {cfg.max_length}; use a length of at most {max(cfg.max_length - len(ids), 0)}, or a "
                "shorter prompt"
            )
    B, longest = len(prompts), max(len(prompt) for prompt in prompts) + length
    T = min(-(-longest // CANVAS_MULTIPLE) * CANVAS_MULTIPLE, cfg.max_length)
    canvas = Canvas(
        tokens_BxT=np.zeros((B, T), np.int32),
        masked_BxT=np.zeros((B, T), bool),
        segment_ids_BxT=np.zeros((B, T), np.int32),
        row_ids_B=np.asarray(row_ids, np.int32),
    )
    for r, prompt in enumerate(prompts):
        new = slice(len(prompt), len(prompt) + length)
        canvas.tokens_BxT[r, : len(prompt)] = prompt
        canvas.tokens_BxT[r, new] = cfg.mask_id or 0  # causal attention never sees what is not generated yet
        canvas.masked_BxT[r, new] = True
        canvas.segment_ids_BxT[r, : new.stop] = 1
    return canvas


@functools.partial(jax.jit, static_argnames=("model_cfg", "shifted", "schedule", "frames"))
def _run(
    params: Any,
    suppressed_V: jax.Array,
    canvas: Canvas,
    key: jax.Array,
    settings: Settings,
    *,
    model_cfg: ModelConfig,
    shifted: bool,
    schedule: schedules.Schedule,
    frames: int,
) -> State:
    denoiser = model_denoiser(params, model_cfg, shifted=shifted)
    return denoise(denoiser, schedule, suppressed_V, canvas, key, settings, frames)


def model_denoiser(params: Any, cfg: ModelConfig, *, shifted: bool) -> Denoiser:
    """A Transformer as a denoiser; `shifted` where the hidden state at position i predicts token i + 1."""
    model = Transformer(cfg)

    def logits(tokens_BxT: jax.Array, segment_ids_BxT: jax.Array, masked_BxT: jax.Array) -> jax.Array:
        del masked_BxT  # the mask id in tokens_BxT says it
        hidden_BxTxD = model.apply({"params": params}, tokens_BxT, segment_ids_BxT)
        if shifted:  # nothing predicts position 0, so it keeps its own state (Dream's convention)
            hidden_BxTxD = jnp.concatenate([hidden_BxTxD[:, :1], hidden_BxTxD[:, :-1]], axis=1)
        return model.apply({"params": params}, hidden_BxTxD, method=Transformer.head)

    return logits


def denoise(
    denoiser: Denoiser,
    schedule: schedules.Schedule,
    suppressed_V: jax.Array,
    canvas: Canvas,
    key: jax.Array,
    settings: Settings,
    frames: int = 0,
) -> State:
    """Reveals every masked position of a canvas; a pure function to be jitted.

    Step i of S goes from time t = 1 - i/S to s = 1 - (i+1)/S: it draws a token for every position from the denoiser's
    softmax(logits / temperature), and the strategy says which of the masked positions keep theirs. Kept tokens never
    change. The last step reveals all that is left; the loop ends early once nothing is masked.

    Args:
      denoiser: tokens, segment ids and masked (B, T) -> raw float32 logits (B, T, V).
      schedule: the alpha(t) that the model was trained with.
      suppressed_V: ids that are never drawn.
      canvas: the rows.
      key: the noise.
      settings: how.
      frames: 0, or the static length of the recorded trace, at least steps + 1.
    """
    initial_B = canvas.masked_BxT.sum(axis=-1, dtype=jnp.int32)

    def unfinished(state: State) -> jax.Array:
        return (state.index < settings.steps) & state.masked_BxT.any()

    def advance(state: State) -> State:
        logits_BxTxV = denoiser(state.tokens_BxT, canvas.segment_ids_BxT, state.masked_BxT)
        nan_B = (jnp.isnan(logits_BxTxV).any(axis=-1) & state.masked_BxT).any(axis=-1)
        logits_BxTxV = jnp.where(suppressed_V[None, None], -jnp.inf, logits_BxTxV)
        token_keys_BxT, reveal_keys_BxT = _noise_keys(key, canvas.row_ids_B, state.index, state.tokens_BxT.shape[1])
        step = Step(
            index=state.index,
            steps=settings.steps,
            reveal_probability=_reveal_probability(schedule, state.index, settings.steps),
            logits_BxTxV=logits_BxTxV,
            proposal_BxT=_draw(token_keys_BxT, logits_BxTxV, settings.temperature),
            masked_BxT=state.masked_BxT,
            initial_B=initial_B,
            uniform_BxT=jax.vmap(jax.vmap(jax.random.uniform))(reveal_keys_BxT),
        )
        chosen_BxT = jax.lax.switch(settings.strategy, list(STRATEGIES.values()), step)
        revealed_BxT = state.masked_BxT & (chosen_BxT | (state.index == settings.steps - 1))
        tokens_BxT = jnp.where(revealed_BxT, step.proposal_BxT, state.tokens_BxT)
        masked_BxT = state.masked_BxT & ~revealed_BxT
        return State(
            index=state.index + 1,
            tokens_BxT=tokens_BxT,
            masked_BxT=masked_BxT,
            nfe_B=state.nfe_B + state.masked_BxT.any(axis=-1).astype(jnp.int32),
            finite_B=state.finite_B & ~nan_B,
            trace=_record(state.trace, state.index + 1, tokens_BxT, masked_BxT),
        )

    trace = None
    if frames:
        shape = (frames, *canvas.tokens_BxT.shape)
        trace = Trace(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))
        trace = _record(trace, jnp.int32(0), canvas.tokens_BxT, canvas.masked_BxT)
    nfe_B, finite_B = jnp.zeros_like(initial_B), jnp.ones_like(initial_B, dtype=bool)
    start = State(jnp.int32(0), canvas.tokens_BxT, canvas.masked_BxT, nfe_B, finite_B, trace)
    return jax.lax.while_loop(unfinished, advance, start)


def _reveal_probability(schedule: schedules.Schedule, index: jax.Array, steps: jax.Array) -> jax.Array:
    """(alpha(s) - alpha(t)) / (1 - alpha(t)) of a step from t to s, in a form that stays accurate near alpha = 1."""
    t = 1 - index.astype(jnp.float32) / steps.astype(jnp.float32)
    s = 1 - (index + 1).astype(jnp.float32) / steps.astype(jnp.float32)
    return 1 - schedule.mask_probability(s) / schedule.mask_probability(t)


def _record(trace: Trace | None, frame: jax.Array, tokens_BxT: jax.Array, masked_BxT: jax.Array) -> Trace | None:
    if trace is None:
        return None
    return Trace(trace.tokens.at[frame].set(tokens_BxT), trace.masked.at[frame].set(masked_BxT))


def _noise_keys(key: jax.Array, row_ids_B: jax.Array, step: jax.Array, T: int) -> tuple[jax.Array, jax.Array]:
    """Keys (B, T) for the token draws and for the strategy, addressed by (key, row id, step, position)."""

    def one(row_id: jax.Array, position: jax.Array) -> jax.Array:
        address = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, row_id), step), position)
        return jax.random.split(address)

    over_positions = jax.vmap(one, in_axes=(None, 0))
    keys_BxTx2 = jax.vmap(over_positions, in_axes=(0, None))(row_ids_B, jnp.arange(T, dtype=jnp.int32))
    return keys_BxTx2[..., 0], keys_BxTx2[..., 1]


def _draw(keys_BxT: jax.Array, logits_BxTxV: jax.Array, temperature: jax.Array) -> jax.Array:
    """One token per position from softmax(logits / temperature), int32 (B, T).

    By the Gumbel-max trick, argmax(logits + temperature * noise), which needs no division, so that 0 is the argmax. The
    high-resolution noise keeps the tail: float32's usual uniforms have nothing below 1e-7, which acts like a lower
    temperature (arXiv 2409.02908).
    """
    V = logits_BxTxV.shape[-1]

    def noisy() -> jax.Array:
        gumbel = functools.partial(jax.random.gumbel, shape=(V,), dtype=jnp.float32, mode="high")
        return logits_BxTxV + temperature * jax.vmap(jax.vmap(gumbel))(keys_BxT)

    scores_BxTxV = jax.lax.cond(temperature > 0, noisy, lambda: logits_BxTxV)
    return jnp.argmax(scores_BxTxV, axis=-1).astype(jnp.int32)
