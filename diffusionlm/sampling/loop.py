"""The denoising loop as a pure function: from a canvas to tokens, on the device, without a host round trip per step.

What is masked is carried as a boolean array; a token's id never says so. Each row goes through its blocks at its own
pace, and its noise is a function of (key, row id, block, step of the block, position), so its tokens depend neither on
its batch mates nor on the padding of the canvas. Only shapes, the model, guidance (which doubles the batch) and the
trace are compiled in: all other settings are data.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm import schedules
from diffusionlm.config import ModelConfig
from diffusionlm.model import Transformer
from diffusionlm.sampling.canvas import Canvas
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.draw import draw
from diffusionlm.sampling.strategies import REMASKING, STRATEGIES, Decision, Rules, Step

# tokens, segment ids, masked (B, T) -> logits (B, T, V)
Denoiser = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Settings(NamedTuple):
    """What a generation may change without recompiling."""

    steps: Any  # int32: over all blocks of a row
    strategy: Any  # int32: an index into `STRATEGIES`
    temperature: Any  # float32
    top_k: Any  # int32
    top_p: Any  # float32
    rules: Rules
    guidance: Any  # float32
    growing: Any  # bool
    eos_penalty: Any  # float32
    eos_last: Any  # bool
    stop_at_eos: Any  # bool

    @classmethod
    def of(cls, sampling: SamplingConfig) -> "Settings":
        """Those of a resolved configuration."""
        return cls(
            steps=np.int32(sampling.steps),
            strategy=np.int32(list(STRATEGIES).index(sampling.strategy)),
            rules=Rules(*(np.float32(getattr(sampling, name)) for name in Rules._fields)),
            top_k=np.int32(sampling.top_k),
            **{name: np.float32(getattr(sampling, name)) for name in _NUMBERS},
            **{name: np.bool_(getattr(sampling, name)) for name in ("growing", "eos_last", "stop_at_eos")},
        )


_NUMBERS = ("temperature", "top_p", "guidance", "eos_penalty")


class Trace(NamedTuple):
    """Every state of a denoising; frame 0 is the start. (frames, B, T) on the device, (frames, B, length) for users."""

    tokens: Any  # int32; masked positions hold the mask id
    masked: Any  # bool
    confidence: Any = None  # float32: the un-tempered probability of a generated token when it was revealed; else 0


class State(NamedTuple):
    """What a step changes."""

    index: jax.Array  # int32: steps done, each one forward pass of the whole batch
    tokens_BxT: jax.Array  # int32
    masked_BxT: jax.Array  # bool: still to be revealed
    block_B: jax.Array  # int32: the active block
    step_B: jax.Array  # int32: steps done of the active block
    initial_B: jax.Array  # int32: masks of the active block before its first step
    nfe_B: jax.Array  # int32: forward passes that the row needed
    finite_B: jax.Array  # bool: no logits of a masked position have been NaN
    confidence_BxT: jax.Array | None  # float32, where there is a trace
    trace: Trace | None


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


def guided_denoiser(denoiser: Denoiser, given_BxT: jax.Array, mask_id: int, guidance: jax.Array) -> Denoiser:
    """Unsupervised classifier-free guidance: raw logits l_u + (1 + w)(l_c - l_u), u with all given tokens masked.

    One forward pass of twice the batch (SMDM, arXiv 2410.18514, Eq. 7; LLaDA's code has the same).
    """

    def logits(tokens_BxT: jax.Array, segment_ids_BxT: jax.Array, masked_BxT: jax.Array) -> jax.Array:
        B, T = tokens_BxT.shape
        without_BxT = jnp.where(given_BxT, jnp.int32(mask_id), tokens_BxT)
        # Interleaved, so that on a mesh every row stays with its twin.
        both = jnp.stack([tokens_BxT, without_BxT], axis=1).reshape(2 * B, T)
        twice = jnp.repeat(segment_ids_BxT, 2, axis=0), jnp.repeat(masked_BxT, 2, axis=0)
        logits_Bx2xTxV = denoiser(both, *twice).reshape(B, 2, T, -1)
        with_BxTxV, without_BxTxV = logits_Bx2xTxV[:, 0], logits_Bx2xTxV[:, 1]
        return without_BxTxV + (1 + guidance) * (with_BxTxV - without_BxTxV)

    return logits


def start(canvas: Canvas, frames: int = 0) -> State:
    """The state before the first step; `frames`: 0, or the static length of the recorded trace."""
    B = canvas.tokens_BxT.shape[0]
    zeros_B = jnp.zeros(B, jnp.int32)
    confidence_BxT = jnp.zeros(canvas.tokens_BxT.shape, jnp.float32) if frames else None
    trace = None
    if frames > 1:
        shape = (frames, *canvas.tokens_BxT.shape)
        trace = Trace(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))
        trace = _record(trace, jnp.int32(0), canvas.tokens_BxT, canvas.masked_BxT, confidence_BxT)
    initial_B = (canvas.masked_BxT & (canvas.block_BxT == 0)).sum(-1, dtype=jnp.int32)
    finite_B = jnp.ones(B, bool)
    masked_BxT = jnp.asarray(canvas.masked_BxT)
    return State(
        jnp.int32(0), jnp.asarray(canvas.tokens_BxT), masked_BxT, zeros_B, zeros_B, initial_B, zeros_B, finite_B,
        confidence_BxT, trace,
    )  # fmt: skip


def denoise(
    denoiser: Denoiser,
    schedule: schedules.Schedule,
    suppressed_V: jax.Array,
    canvas: Canvas,
    key: jax.Array,
    settings: Settings,
    frames: int = 0,
    eos_ids: Sequence[int] = (),
) -> State:
    """Reveals every masked position of a canvas; a pure function to be jitted.

    A block of S steps goes from time t = 1 - i/S to s = 1 - (i+1)/S in step i: it draws a token for every position from
    the denoiser's softmax(logits / temperature), and the strategy says which of the block's masked positions keep
    theirs. The last step reveals all that is left of the block; a block whose masks are all gone ends early, except
    under a strategy that may take tokens back.

    Args:
      denoiser: tokens, segment ids and masked (B, T) -> raw float32 logits (B, T, V).
      schedule: the alpha(t) that the model was trained with.
      suppressed_V: ids that are never drawn.
      canvas: the rows.
      key: the noise.
      settings: how.
      frames: 0, or the static length of the recorded trace, at least steps + 1.
      eos_ids: ids that end a text.
    """

    def unfinished(state: State) -> jax.Array:
        return working(canvas, state).any()

    def one_step(state: State) -> State:
        return advance(denoiser, schedule, suppressed_V, canvas, key, settings, state, eos_ids)

    return jax.lax.while_loop(unfinished, one_step, start(canvas, frames))


def advance(
    denoiser: Denoiser,
    schedule: schedules.Schedule,
    suppressed_V: jax.Array,
    canvas: Canvas,
    key: jax.Array,
    settings: Settings,
    state: State,
    eos_ids: Sequence[int] = (),
) -> State:
    """One step of every row that has masks; arguments as for `denoise`."""
    working_B = working(canvas, state)
    in_block_BxT = canvas.block_BxT == state.block_B[:, None]
    hidden_BxT = settings.growing & (canvas.block_BxT > state.block_B[:, None])
    segment_ids_BxT = jnp.where(hidden_BxT, 0, canvas.segment_ids_BxT)
    logits_BxTxV = denoiser(state.tokens_BxT, segment_ids_BxT, state.masked_BxT)
    active_BxT = state.masked_BxT & in_block_BxT
    nan_B = (jnp.isnan(logits_BxTxV).any(axis=-1) & active_BxT).any(axis=-1)
    logits_BxTxV = jnp.where(suppressed_V[None, None], -jnp.inf, logits_BxTxV)
    if eos_ids:
        logits_BxTxV = logits_BxTxV.at[..., list(eos_ids)].add(-settings.eos_penalty)

    steps_B = block_steps(canvas, settings.steps, state.block_B)
    keys_BxTx3 = _noise_keys(key, canvas.row_ids_B, state.block_B, state.step_B, state.tokens_BxT.shape[1])
    proposal_BxT = draw(keys_BxTx3[..., 0], logits_BxTxV, settings.temperature, settings.top_k, settings.top_p)
    is_eos_BxT = _is_eos(proposal_BxT, eos_ids)
    t_B = 1 - state.step_B.astype(jnp.float32) / steps_B.astype(jnp.float32)
    s_B = 1 - (state.step_B + 1).astype(jnp.float32) / steps_B.astype(jnp.float32)
    last_B = state.step_B == steps_B - 1
    step = Step(
        index_B=state.step_B,
        steps_B=steps_B,
        mask_probability_t_B=schedule.mask_probability(t_B),
        mask_probability_s_B=jnp.where(last_B, 0.0, schedule.mask_probability(s_B)),
        logits_BxTxV=logits_BxTxV,
        proposal_BxT=proposal_BxT,
        masked_BxT=active_BxT,
        revealed_BxT=canvas.masked_BxT & ~state.masked_BxT & in_block_BxT,
        initial_B=state.initial_B,
        demoted_BxT=is_eos_BxT & settings.eos_last,
        uniform_BxT=jax.vmap(jax.vmap(jax.random.uniform))(keys_BxTx3[..., 1]),
        gumbel_BxT=jax.vmap(jax.vmap(functools.partial(jax.random.gumbel, mode="high")))(keys_BxTx3[..., 2]),
        rules=Rules(*settings.rules),
    )
    decision: Decision = jax.lax.switch(settings.strategy, list(STRATEGIES.values()), step)
    revealed_BxT = active_BxT & (decision.reveal_BxT | last_B[:, None])
    remasked_BxT = step.revealed_BxT & decision.remask_BxT & ~last_B[:, None] & working_B[:, None]
    tokens_BxT = jnp.where(revealed_BxT, proposal_BxT, state.tokens_BxT)
    tokens_BxT = jnp.where(remasked_BxT, canvas.tokens_BxT, tokens_BxT)
    masked_BxT = (state.masked_BxT & ~revealed_BxT) | remasked_BxT

    # A block may be all revealed before its last step; its row goes on to the next one, if the strategy lets it.
    remasking = jnp.isin(settings.strategy, jnp.array([list(STRATEGIES).index(name) for name in REMASKING]))
    ended_B = ~(masked_BxT & in_block_BxT).any(-1) & (last_B | ~remasking)
    block_B = state.block_B + (ended_B & working_B).astype(jnp.int32)
    step_B = jnp.where(ended_B, 0, state.step_B + 1)
    initial_B = jnp.where(ended_B, (masked_BxT & (canvas.block_BxT == block_B[:, None])).sum(-1), state.initial_B)
    finished_B = settings.stop_at_eos & _text_is_complete(canvas, tokens_BxT, masked_BxT, eos_ids)
    if eos_ids:
        tokens_BxT = jnp.where(masked_BxT & finished_B[:, None], jnp.int32(eos_ids[0]), tokens_BxT)
        masked_BxT &= ~finished_B[:, None]
        block_B = jnp.where(finished_B, blocks(canvas), block_B)
    confidence_BxT = state.confidence_BxT
    if confidence_BxT is not None:
        log_p_BxTxV = jax.nn.log_softmax(logits_BxTxV, axis=-1)
        log_p_BxT = jnp.take_along_axis(log_p_BxTxV, proposal_BxT[..., None], axis=-1)[..., 0]
        confidence_BxT = jnp.where(revealed_BxT, jnp.exp(log_p_BxT), jnp.where(remasked_BxT, 0.0, confidence_BxT))
    return State(
        index=state.index + 1,
        tokens_BxT=tokens_BxT,
        masked_BxT=masked_BxT,
        block_B=block_B,
        step_B=step_B,
        initial_B=initial_B.astype(jnp.int32),
        nfe_B=state.nfe_B + working_B.astype(jnp.int32),
        finite_B=state.finite_B & ~nan_B,
        confidence_BxT=confidence_BxT,
        trace=_record(state.trace, state.index + 1, tokens_BxT, masked_BxT, confidence_BxT),
    )


def blocks(canvas: Canvas) -> jax.Array:
    """How many blocks each row has. int32 (B,)."""
    return jnp.asarray(canvas.block_BxT).max(-1) + 1


def working(canvas: Canvas, state: State) -> jax.Array:
    """The rows that still have a block to do. bool (B,)."""
    return state.block_B < blocks(canvas)


def block_steps(canvas: Canvas, steps: jax.Array, block_B: jax.Array) -> jax.Array:
    """Steps of a block: an even share of all, the remainder going first, and at least one. int32 (B,)."""
    blocks_B = jnp.maximum(blocks(canvas), 1)
    return jnp.maximum(steps // blocks_B + (block_B < steps % blocks_B).astype(jnp.int32), 1)


def _is_eos(tokens_BxT: jax.Array, eos_ids: Sequence[int]) -> jax.Array:
    return jnp.isin(tokens_BxT, jnp.asarray(list(eos_ids), jnp.int32))


def _text_is_complete(
    canvas: Canvas, tokens_BxT: jax.Array, masked_BxT: jax.Array, eos_ids: Sequence[int]
) -> jax.Array:
    """Whether a row has generated an end of text with no mask before it. bool (B,)."""
    ends_BxT = canvas.masked_BxT & ~masked_BxT & _is_eos(tokens_BxT, eos_ids)
    masks_before_BxT = jnp.cumsum(masked_BxT, axis=-1) - masked_BxT.astype(jnp.int32)
    # In a text with given tokens behind the gaps, an end of text in a gap is not the end of the row.
    given_after_BxT = jnp.cumsum((~canvas.masked_BxT & (canvas.segment_ids_BxT != 0))[:, ::-1], axis=-1)[:, ::-1]
    return (ends_BxT & (masks_before_BxT == 0) & (given_after_BxT == 0)).any(-1)


def _record(
    trace: Trace | None, frame: jax.Array, tokens_BxT: jax.Array, masked_BxT: jax.Array, confidence_BxT: Any
) -> Trace | None:
    if trace is None:
        return None
    now = (tokens_BxT, masked_BxT, confidence_BxT)
    return Trace(*(states.at[frame].set(x) for states, x in zip(trace, now, strict=True)))


def _noise_keys(key: jax.Array, row_ids_B: jax.Array, block_B: jax.Array, step_B: jax.Array, T: int) -> jax.Array:
    """Keys (B, T, 3) of the token draws, the strategy and its order, by (key, row, block, step, position)."""

    def one(row_id: jax.Array, block: jax.Array, step: jax.Array, position: jax.Array) -> jax.Array:
        address = key
        for part in (row_id, block, step, position):
            address = jax.random.fold_in(address, part)
        return jax.random.split(address, 3)

    over_positions = jax.vmap(one, in_axes=(None, None, None, 0))
    positions_T = jnp.arange(T, dtype=jnp.int32)
    return jax.vmap(over_positions, in_axes=(0, 0, 0, None))(row_ids_B, block_B, step_B, positions_T)
