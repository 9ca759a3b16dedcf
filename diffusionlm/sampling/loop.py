"""The denoising loop as a pure function: from a canvas to tokens, on the device, without a host round trip per step.

What is masked is carried as a boolean array; a token's id never says so. Each row goes through its blocks at its own
pace, and its noise is a function of (key, row id, block, step of the block, position), so its tokens depend neither on
its batch mates nor on the padding of the canvas. Only shapes, the model, guidance (which doubles the batch), a cache's
windows and the trace are compiled in: all other settings are data.

A step looks (`_look`: the network, where something has changed), proposes a token for every open position (`propose`),
decides which to keep (`_decide`: the strategy) and writes them down (`_commit`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusionlm.diffusion import schedules
from diffusionlm.sampling.canvas import Canvas
from diffusionlm.sampling.denoiser import Denoiser, Memory, View, real_positions
from diffusionlm.sampling.device_settings import Settings
from diffusionlm.sampling.kv_cache import Windows, members, places
from diffusionlm.sampling.propose import propose
from diffusionlm.sampling.strategies import REMASKING, SCORES, STRATEGIES, Decision, Proposal, Scores, Step


@dataclass(frozen=True)
class Job:
    """All that stays the same during a denoising.

    Attributes:
      denoiser: the model.
      schedule: the alpha(t) that it was trained with.
      suppressed_V: bool, ids that are never drawn.
      canvas: the rows.
      key: the noise.
      settings: how.
      eos_ids: ids that end a text.
      windows: the cache.
    """

    denoiser: Denoiser
    schedule: schedules.Schedule
    suppressed_V: jax.Array
    canvas: Canvas
    key: jax.Array
    settings: Settings
    eos_ids: tuple[int, ...] = ()
    windows: Windows = Windows()


class Trace(NamedTuple):
    """Every state of a denoising; frame 0 is the start. (frames, B, T) on the device, (frames, B, length) for users."""

    tokens: Any  # int32; masked positions hold the mask id
    masked: Any  # bool
    confidence: Any = None  # float32: the un-tempered probability of a generated token when it was revealed; else 0


class State(NamedTuple):
    """What a step changes."""

    index: jax.Array  # int32: steps done by the batch
    warm: jax.Array  # bool: the memory is of this canvas
    tokens_BxT: jax.Array  # int32
    masked_BxT: jax.Array  # bool: still to be revealed
    block_B: jax.Array  # int32: the active block
    step_B: jax.Array  # int32: steps done of the active block
    initial_B: jax.Array  # int32: masks of the active block before its first step
    changed_B: jax.Array  # bool: the canvas has changed since it was last looked at
    nfe_B: jax.Array  # int32: forward passes that the row needed
    finite_B: jax.Array  # bool: no logits of a masked position have been NaN
    confidence_BxT: jax.Array | None  # float32, where there is a trace
    trace: Trace | None


def start(canvas: Canvas, frames: int = 0) -> State:
    """The state before the first step; `frames`: 0, 1 for confidences alone, or the length of the recorded trace."""
    B = canvas.tokens_BxT.shape[0]
    zeros_B = jnp.zeros(B, jnp.int32)
    confidence_BxT = jnp.zeros(canvas.tokens_BxT.shape, jnp.float32) if frames else None
    trace = None
    if frames > 1:
        shape = (frames, *canvas.tokens_BxT.shape)
        trace = Trace(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))
        trace = _record(trace, jnp.int32(0), canvas.tokens_BxT, canvas.masked_BxT, confidence_BxT)
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


def denoise(job: Job, state: State, leave: jax.Array | int = 0) -> State:
    """Reveals every masked position of a canvas; a pure function to be jitted.

    A block of S steps goes from time t = 1 - i/S to s = 1 - (i+1)/S in step i: it draws a token for every masked
    position of the block from the denoiser's softmax(logits / temperature), and the strategy says which of them keep
    theirs. The last step reveals all that is left of the block; a block whose masks are all gone ends early, except
    under a strategy that may take tokens back.

    Args:
      job: what, and how.
      state: from `start`, or the rows of an earlier call that had work left.
      leave: returns once no more rows than this have work left, with caches at the end of a block.
    """

    def unfinished(carry: tuple[State, Memory]) -> jax.Array:
        working_B = working(job.canvas, carry[0])
        inside_a_block = job.windows.lockstep & (working_B & (carry[0].step_B > 0)).any()
        return (working_B.sum() > leave) | (working_B.any() & inside_a_block)

    B, T = state.tokens_BxT.shape
    carry = (state._replace(warm=jnp.bool_(False)), job.denoiser.forget(B, T))
    return jax.lax.while_loop(unfinished, lambda carry: advance(job, *carry), carry)[0]


def advance(job: Job, state: State, memory: Memory) -> tuple[State, Memory]:
    """One step of every row that has masks."""
    canvas, settings = job.canvas, job.settings
    stepping_B = working(canvas, state)
    if job.windows.lockstep:  # the rows that are ahead wait
        stepping_B &= state.block_B == jnp.where(stepping_B, state.block_B, jnp.iinfo(jnp.int32).max).min()
    in_block_BxT = canvas.block_BxT == state.block_B[:, None]
    active_BxT = state.masked_BxT & in_block_BxT & stepping_B[:, None]

    memory, counted_B = _look(job, state, memory, stepping_B)
    keys_BxTx3 = _noise_keys(job.key, canvas, state)
    bias_V = jnp.where(job.suppressed_V, -jnp.inf, 0.0)
    if job.eos_ids:
        bias_V = bias_V.at[jnp.asarray(job.eos_ids)].add(-settings.eos_penalty)
    scores = jnp.array([SCORES[name] for name in STRATEGIES], jnp.int32)[settings.strategy]
    if state.confidence_BxT is not None:
        scores = jnp.maximum(scores, Scores.LOG_ODDS)
    most = 1 if job.windows.cache == "causal" else None
    proposal, nan_B = propose(job.denoiser, memory, active_BxT, bias_V, keys_BxTx3[..., 0], settings, scores, most)
    state = state._replace(
        warm=jnp.bool_(True),
        changed_B=state.changed_B & ~stepping_B,
        nfe_B=state.nfe_B + counted_B.astype(jnp.int32),
        finite_B=state.finite_B & ~nan_B,
    )
    decision, last_B = _decide(job, state, active_BxT, in_block_BxT & stepping_B[:, None], proposal, keys_BxTx3)
    return _commit(job, state, stepping_B, last_B, decision, proposal), memory


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


# --- the parts of a step


def _look(job: Job, state: State, memory: Memory, stepping_B: jax.Array) -> tuple[Memory, jax.Array]:
    """The memory of the canvas as it is, and which rows needed a forward pass for it, bool (B,)."""
    canvas, settings, windows = job.canvas, job.settings, job.windows
    hidden_BxT = settings.growing & (canvas.block_BxT > state.block_B[:, None])
    segment_ids_BxT = jnp.where(hidden_BxT, 0, canvas.segment_ids_BxT)
    view = View(state.tokens_BxT, segment_ids_BxT, real_positions(canvas.segment_ids_BxT), state.masked_BxT)
    counted_B = stepping_B & state.changed_B  # what a row needs for itself
    cold_B = stepping_B & ~state.warm

    def keep() -> Memory:
        return memory

    def read() -> Memory:
        return job.denoiser.read(view)

    if windows.cache == "none":
        return jax.lax.cond((counted_B | cold_B).any(), read, keep), counted_B

    refreshed_B = cold_B
    if windows.lockstep:
        due_B = (settings.refresh > 0) & (state.step_B % jnp.maximum(settings.refresh, 1) == 0)
        due_B = stepping_B & (due_B | (state.step_B == 0))
        counted_B, refreshed_B = counted_B | due_B, refreshed_B | due_B
    needed_B = counted_B | refreshed_B
    # A row that needs nothing must not be touched because of its mates.
    members_BxT = members(windows, canvas, state.block_B) & needed_B[:, None]

    def reread(width: int) -> Callable[[], Memory]:
        return lambda: job.denoiser.reread(view, memory, places(members_BxT, width))

    widths = jnp.array(windows.widths, jnp.int32)
    window = (widths < members_BxT.sum(-1, dtype=jnp.int32).max()[None]).sum(dtype=jnp.int32)
    choice = jnp.where(refreshed_B.any(), 1, jnp.where(needed_B.any(), 2 + window, 0))
    return jax.lax.switch(choice, [keep, read, *map(reread, windows.widths)]), counted_B


def _decide(
    job: Job,
    state: State,
    active_BxT: jax.Array,
    in_block_BxT: jax.Array,
    proposal: Proposal,
    keys_BxTx3: jax.Array,
) -> tuple[Decision, jax.Array]:
    """What the strategy wants, within the active block; and which rows are at the last step of theirs, bool (B,)."""
    settings = job.settings
    steps_B = block_steps(job.canvas, settings.steps, state.block_B)
    t_B = 1 - state.step_B.astype(jnp.float32) / steps_B.astype(jnp.float32)
    s_B = 1 - (state.step_B + 1).astype(jnp.float32) / steps_B.astype(jnp.float32)
    last_B = state.step_B == steps_B - 1
    step = Step(
        index_B=state.step_B,
        steps_B=steps_B,
        mask_probability_t_B=job.schedule.mask_probability(t_B),
        mask_probability_s_B=jnp.where(last_B, 0.0, job.schedule.mask_probability(s_B)),
        proposal=proposal,
        masked_BxT=active_BxT,
        revealed_BxT=job.canvas.masked_BxT & ~state.masked_BxT & in_block_BxT,
        initial_B=state.initial_B,
        demoted_BxT=_is_eos(proposal.token_BxT, job.eos_ids) & settings.eos_last,
        uniform_BxT=jax.vmap(jax.vmap(jax.random.uniform))(keys_BxTx3[..., 1]),
        gumbel_BxT=jax.vmap(jax.vmap(functools.partial(jax.random.gumbel, mode="high")))(keys_BxTx3[..., 2]),
        rules=settings.rules,
    )
    decision: Decision = jax.lax.switch(settings.strategy, list(STRATEGIES.values()), step)
    return (
        Decision(
            reveal_BxT=active_BxT & (decision.reveal_BxT | last_B[:, None]),
            remask_BxT=step.revealed_BxT & decision.remask_BxT & ~last_B[:, None],
        ),
        last_B,
    )


def _commit(
    job: Job, state: State, stepping_B: jax.Array, last_B: jax.Array, decision: Decision, proposal: Proposal
) -> State:
    """The state after a decision: tokens written, blocks that are done left behind, texts that are complete closed."""
    canvas, settings = job.canvas, job.settings
    tokens_BxT = jnp.where(decision.reveal_BxT, proposal.token_BxT, state.tokens_BxT)
    tokens_BxT = jnp.where(decision.remask_BxT, canvas.tokens_BxT, tokens_BxT)
    masked_BxT = (state.masked_BxT & ~decision.reveal_BxT) | decision.remask_BxT

    # A block may be all revealed before its last step; its row goes on to the next one, if the strategy lets it.
    done_B = ~(masked_BxT & (canvas.block_BxT == state.block_B[:, None])).any(-1)
    remasking = jnp.isin(settings.strategy, jnp.array([list(STRATEGIES).index(name) for name in REMASKING], jnp.int32))
    ended_B = stepping_B & done_B & (last_B | ~remasking)
    block_B = state.block_B + ended_B.astype(jnp.int32)
    masks_B = (masked_BxT & (canvas.block_BxT == block_B[:, None])).sum(-1, dtype=jnp.int32)
    changed_B = ended_B | (tokens_BxT != state.tokens_BxT).any(-1) | (masked_BxT != state.masked_BxT).any(-1)
    if job.eos_ids:
        complete_B = settings.stop_at_eos & _text_is_complete(canvas, tokens_BxT, masked_BxT, job.eos_ids)
        tokens_BxT = jnp.where(masked_BxT & complete_B[:, None], jnp.int32(job.eos_ids[0]), tokens_BxT)
        masked_BxT &= ~complete_B[:, None]
        block_B = jnp.where(complete_B, blocks(canvas), block_B)
    confidence_BxT = state.confidence_BxT
    if confidence_BxT is not None:
        kept_BxT = jnp.where(decision.remask_BxT, 0.0, confidence_BxT)
        confidence_BxT = jnp.where(decision.reveal_BxT, jax.nn.sigmoid(proposal.log_odds_BxT), kept_BxT)
    return state._replace(
        index=state.index + 1,
        tokens_BxT=tokens_BxT,
        masked_BxT=masked_BxT,
        block_B=block_B,
        step_B=jnp.where(ended_B, 0, state.step_B + stepping_B.astype(jnp.int32)),
        initial_B=jnp.where(ended_B, masks_B, state.initial_B),
        changed_B=state.changed_B | changed_B,
        confidence_BxT=confidence_BxT,
        trace=_record(state.trace, state.index + 1, tokens_BxT, masked_BxT, confidence_BxT),
    )


def _is_eos(tokens_BxT: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    return jnp.isin(tokens_BxT, jnp.asarray(eos_ids, jnp.int32))


def _text_is_complete(
    canvas: Canvas, tokens_BxT: jax.Array, masked_BxT: jax.Array, eos_ids: tuple[int, ...]
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


def _noise_keys(key: jax.Array, canvas: Canvas, state: State) -> jax.Array:
    """Keys (B, T, 3) of the token draws, the strategy and its order, by (key, row, block, step, position)."""

    def one(row_id: jax.Array, block: jax.Array, step: jax.Array, position: jax.Array) -> jax.Array:
        address = key
        for part in (row_id, block, step, position):
            address = jax.random.fold_in(address, part)
        return jax.random.split(address, 3)

    over_positions = jax.vmap(one, in_axes=(None, None, None, 0))
    rows = (jnp.asarray(canvas.row_ids_B), state.block_B, state.step_B)
    return jax.vmap(over_positions)(*rows, real_positions(canvas.segment_ids_BxT))
