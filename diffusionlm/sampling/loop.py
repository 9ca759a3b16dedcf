"""The denoising loop as a pure function: from a canvas to tokens, on the device, without a host round trip per step.

The masked positions are carried as a boolean array, never recognised by their token id. Each row goes through its
blocks at its own pace, and its noise is a function of (key, row id, block, step of the block, position), so its tokens
depend neither on its batch mates nor on the padding of the canvas. Only shapes, the model, guidance (which doubles the
batch), a cache's windows and the trace are compiled in: all other settings are data.

A step runs the network where the canvas has changed (`_refresh_memory`), proposes a token for every open position
(`propose`), decides which of them to keep (`_decide`: the strategy) and writes those down (`_commit`).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusionlm.sampling.canvas import Canvas
from diffusionlm.sampling.denoiser import Memory, View, real_positions
from diffusionlm.sampling.kv_cache import in_window, window_indices
from diffusionlm.sampling.propose import propose
from diffusionlm.sampling.state import Job, State, Trace, block_counts, block_steps, has_work, is_followed, record
from diffusionlm.sampling.strategies import REMASKING, SCORES, STRATEGIES, Decision, Proposal, Scores, Step


def denoise(job: Job, state: State, leave: jax.Array | int = 0) -> State:
    """Reveal every masked position of a canvas; a pure function to be jitted.

    A block of S steps goes from time t = 1 - i/S to s = 1 - (i+1)/S in step i: it draws a token for every masked
    position of the block from the denoiser's softmax(logits / temperature), and the strategy says which of them keep
    theirs. The last step reveals all that is still masked in the block; a block whose masks are all gone ends early,
    except under a strategy that may take tokens back.

    Args:
      job: the model, the canvas and the settings.
      state: the state from `initial_state`, or the rows of an earlier call that still had work.
      leave: return once no more rows than this have work, with caches at the end of a block.
    """

    def unfinished(carry: tuple[State, Memory]) -> jax.Array:
        state, _ = carry
        working_B = has_work(job.canvas, state)
        inside_a_block = job.windows.lockstep & (working_B & (state.step_B > 0)).any()
        return (working_B.sum() > leave) | (working_B.any() & inside_a_block)

    B, T = state.tokens_BxT.shape
    carry = (state._replace(warm=jnp.bool_(False)), job.denoiser.empty_memory(B, T))
    return jax.lax.while_loop(unfinished, lambda carry: advance(job, *carry), carry)[0]


def advance(job: Job, state: State, memory: Memory) -> tuple[State, Memory]:
    """Take one step with every row that has work."""
    stepping_B = has_work(job.canvas, state)
    if job.windows.lockstep:  # the rows that are ahead wait
        stepping_B &= state.block_B == jnp.where(stepping_B, state.block_B, jnp.iinfo(jnp.int32).max).min()
    in_block_BxT = (job.canvas.block_BxT == state.block_B[:, None]) & stepping_B[:, None]

    memory, counted_B = _refresh_memory(job, state, memory, stepping_B)
    keys_BxTx3 = _noise_keys(job.key, job.canvas, state)
    scores = jnp.array([SCORES[name] for name in STRATEGIES], jnp.int32)[job.settings.strategy]
    if state.confidence_BxT is not None:
        scores = jnp.maximum(scores, Scores.LOG_ODDS)
    proposal, nan_B = propose(job, memory, state.masked_BxT & in_block_BxT, keys_BxTx3[..., 0], scores)
    state = state._replace(
        warm=jnp.bool_(True),
        changed_B=state.changed_B & ~stepping_B,
        nfe_B=state.nfe_B + counted_B.astype(jnp.int32),
        finite_B=state.finite_B & ~nan_B,
    )
    decision, last_B = _decide(job, state, in_block_BxT, proposal, keys_BxTx3)
    return _commit(job, state, stepping_B, last_B, decision, proposal), memory


# --- the parts of a step


def _refresh_memory(job: Job, state: State, memory: Memory, stepping_B: jax.Array) -> tuple[Memory, jax.Array]:
    """Return the memory of the canvas as it is, and which rows needed a forward pass for it, bool (B,)."""
    canvas, settings, windows = job.canvas, job.settings, job.windows
    hidden_BxT = settings.growing & (canvas.block_BxT > state.block_B[:, None])
    segment_ids_BxT = jnp.where(hidden_BxT, 0, canvas.segment_ids_BxT)
    view = View(state.tokens_BxT, segment_ids_BxT, real_positions(canvas.segment_ids_BxT), state.masked_BxT)
    counted_B = stepping_B & state.changed_B  # the passes that a row needs for itself
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
    in_window_BxT = jnp.asarray(in_window(windows, canvas, state.block_B)) & needed_B[:, None]

    def reread(width: int, memory: Memory) -> Memory:
        return job.denoiser.reread(view, memory, window_indices(in_window_BxT, width))

    widths = jnp.array(windows.widths, jnp.int32)
    window = (widths < in_window_BxT.sum(-1, dtype=jnp.int32).max()[None]).sum(dtype=jnp.int32)
    refresh, extend = refreshed_B.any(), needed_B.any() & ~refreshed_B.any()
    memory = _update_if(refresh, lambda _: read(), memory)
    for i, width in enumerate(windows.widths):
        memory = _update_if(extend & (window == i), functools.partial(reread, width), memory)
    return memory, counted_B


def _update_if(condition: jax.Array, update: Callable[[Memory], Memory], memory: Memory) -> Memory:
    """Return `update(memory)` where a scalar condition holds, and `memory` itself otherwise.

    One `cond` for every update, each with the memory as its operand, is what XLA can do in place; a `switch` over all
    of them copies the whole cache several times in every step.
    """
    return jax.lax.cond(condition, update, lambda memory: memory, memory)


def _decide(
    job: Job, state: State, in_block_BxT: jax.Array, proposal: Proposal, keys_BxTx3: jax.Array
) -> tuple[Decision, jax.Array]:
    """Return the strategy's decision within the active blocks, and which rows are at their block's last step (B,)."""
    settings = job.settings
    masked_BxT = state.masked_BxT & in_block_BxT
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
        masked_BxT=masked_BxT,
        revealed_BxT=jnp.asarray(job.canvas.masked_BxT) & ~state.masked_BxT & in_block_BxT,
        initial_B=state.initial_B,
        demoted_BxT=_is_eos(proposal.token_BxT, job.eos_ids) & settings.eos_last,
        uniform_BxT=jax.vmap(jax.vmap(jax.random.uniform))(keys_BxTx3[..., 1]),
        gumbel_BxT=jax.vmap(jax.vmap(functools.partial(jax.random.gumbel, mode="high")))(keys_BxTx3[..., 2]),
        rules=settings.rules,
    )
    decision: Decision = jax.lax.switch(settings.strategy, list(STRATEGIES.values()), step)
    decision = Decision(
        reveal_BxT=masked_BxT & (decision.reveal_BxT | last_B[:, None]),
        remask_BxT=step.revealed_BxT & decision.remask_BxT & ~last_B[:, None],
    )
    return decision, last_B


def _commit(
    job: Job, state: State, stepping_B: jax.Array, last_B: jax.Array, decision: Decision, proposal: Proposal
) -> State:
    """Return the state after a decision: write the tokens, leave finished blocks, and close complete texts."""
    canvas, settings = job.canvas, job.settings
    tokens_BxT = jnp.where(decision.reveal_BxT, proposal.token_BxT, state.tokens_BxT)
    tokens_BxT = jnp.where(decision.remask_BxT, canvas.tokens_BxT, tokens_BxT)
    masked_BxT = (state.masked_BxT & ~decision.reveal_BxT) | decision.remask_BxT

    # A block may be all revealed before its last step; its row moves on to the next one, if the strategy lets it.
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
        block_B = jnp.where(complete_B, block_counts(canvas), block_B)
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
        trace=record(state.trace, state.index + 1, Trace(tokens_BxT, masked_BxT, confidence_BxT)),
    )


def _is_eos(tokens_BxT: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    return jnp.isin(tokens_BxT, jnp.asarray(eos_ids, jnp.int32))


def _text_is_complete(
    canvas: Canvas, tokens_BxT: jax.Array, masked_BxT: jax.Array, eos_ids: tuple[int, ...]
) -> jax.Array:
    """Mark the rows that have generated an end of text with no mask before it. bool (B,)."""
    ends_BxT = jnp.asarray(canvas.masked_BxT) & ~masked_BxT & _is_eos(tokens_BxT, eos_ids)
    masks_before_BxT = jnp.cumsum(masked_BxT, axis=-1) - masked_BxT.astype(jnp.int32)
    return (ends_BxT & (masks_before_BxT == 0) & ~is_followed(canvas)).any(-1)


def _noise_keys(key: jax.Array, canvas: Canvas, state: State) -> jax.Array:
    """Return keys (B, T, 3), by (key, row, block, step, position): for the token, the strategy and its order."""

    def position_keys(row_id: jax.Array, block: jax.Array, step: jax.Array, position: jax.Array) -> jax.Array:
        address = key
        for part in (row_id, block, step, position):
            address = jax.random.fold_in(address, part)
        return jax.random.split(address, 3)

    over_positions = jax.vmap(position_keys, in_axes=(None, None, None, 0))
    rows = (jnp.asarray(canvas.row_ids_B), state.block_B, state.step_B)
    return jax.vmap(over_positions)(*rows, real_positions(canvas.segment_ids_BxT))
