"""A proposal for every position that a step may reveal: a token, and how confident the model is in it.

The vocabulary is the largest axis there is, so logits are computed for a few positions of each row at a time, and only
where the active block has masks: how many turns that takes is data, so it costs no compilation.
"""

import operator

import jax
import jax.numpy as jnp

from diffusionlm.model.cache import scatter_rows
from diffusionlm.parallel.mesh import rows_per_device
from diffusionlm.sampling.denoiser import Memory
from diffusionlm.sampling.draw import argmax, draw, drawn_logits
from diffusionlm.sampling.kv_cache import Windows
from diffusionlm.sampling.state import Job, is_followed
from diffusionlm.sampling.strategies import Proposal, Scores

# Logits are computed for about this many positions on a device at a time, and for 8 to 32 of each row. The number does
# not depend on how many are asked for, so that the bits of a row do not depend on its mates.
HEAD_POSITIONS = 256
LEAST, MOST = 8, 32


def positions_at_a_time(B: int, T: int, windows: Windows) -> int:
    """Return the positions of each row whose logits are computed at a time."""
    most = 1 if windows.cache == "causal" else T  # a causal step opens one position of each row
    return min(most, MOST, max(LEAST, HEAD_POSITIONS // rows_per_device(B)))


def propose(
    job: Job, memory: Memory, wanted_BxT: jax.Array, keys_BxT: jax.Array, scores: jax.Array
) -> tuple[Proposal, jax.Array]:
    """Draw a token for every wanted position.

    Args:
      job: the denoiser, which gives the logits, and the settings of the draw.
      memory: the current memory of the canvas.
      wanted_BxT: bool.
      keys_BxT: the keys of the noise.
      scores: int32 scalar, the `Scores` to compute; the others are 0.

    Returns:
      The proposal, 0 where nothing is wanted; and which rows had NaN among their logits, bool (B,).
    """
    B, T = wanted_BxT.shape
    settings, bias_V, ends_V = job.settings, _logit_bias(job), _ends(job)
    followed_BxT = is_followed(job.canvas)
    C = positions_at_a_time(B, T, job.windows)
    indices_BxN, count_B = _sort_wanted(wanted_BxT, C)

    def turn(j: jax.Array, so_far: tuple[Proposal, jax.Array]) -> tuple[Proposal, jax.Array]:
        proposal, nan_B = so_far
        indices_BxC = jax.lax.dynamic_slice_in_dim(indices_BxN, j * C, C, axis=1)
        positions_BxC = jnp.minimum(indices_BxC, T - 1)
        logits_BxCxV = job.denoiser.logits(memory, positions_BxC)
        nan_B |= (jnp.isnan(logits_BxCxV).any(axis=-1) & (indices_BxC < T)).any(axis=-1)
        logits_BxCxV += bias_V[None, None]
        if job.eos_ids:  # no text ends where more of it is given
            followed_BxC = jnp.take_along_axis(followed_BxT, positions_BxC, axis=1)
            logits_BxCxV = jnp.where(followed_BxC[..., None] & ends_V[None, None], -jnp.inf, logits_BxCxV)
        keys_BxC = jax.vmap(operator.getitem)(keys_BxT, positions_BxC)
        law = (settings.temperature, settings.top_k, settings.top_p, settings.drawn_confidence)
        token_BxC = draw(keys_BxC, logits_BxCxV, *law)
        judged_BxCxV = jax.lax.cond(
            settings.drawn_confidence, lambda: drawn_logits(logits_BxCxV, *law), lambda: logits_BxCxV
        )
        pairs = zip(proposal, confidence_scores(judged_BxCxV, token_BxC, scores), strict=True)
        return Proposal(*(scatter_rows(x_BxT, indices_BxC, new_BxC) for x_BxT, new_BxC in pairs)), nan_B

    zeros_BxT = jnp.zeros((B, T), jnp.float32)
    nothing = Proposal(jnp.zeros((B, T), jnp.int32), zeros_BxT, zeros_BxT, zeros_BxT)
    turns = (count_B.max() + C - 1) // C
    return jax.lax.fori_loop(0, turns, turn, (nothing, jnp.zeros(B, bool)))


def confidence_scores(logits_BxCxV: jax.Array, token_BxC: jax.Array, scores: jax.Array) -> Proposal:
    """Score how confident some distributions are in some tokens, and in general.

    Args:
      logits_BxCxV: float32; -inf where a token cannot be.
      token_BxC: int32.
      scores: int32 scalar, the `Scores` to compute; the others are 0.
    """
    zeros_BxC = jnp.zeros(token_BxC.shape, jnp.float32)
    v_1x1xV = jnp.arange(logits_BxCxV.shape[-1], dtype=jnp.int32)[None, None]

    def entropy() -> jax.Array:
        log_p_BxCxV = jax.nn.log_softmax(logits_BxCxV, axis=-1)
        return -jnp.where(jnp.isfinite(log_p_BxCxV), jnp.exp(log_p_BxCxV) * log_p_BxCxV, 0.0).sum(-1)

    def margin() -> jax.Array:
        best_BxC = argmax(logits_BxCxV)
        first_BxC = jnp.take_along_axis(logits_BxCxV, best_BxC[..., None], axis=-1)[..., 0]
        second_BxC = jnp.where(v_1x1xV == best_BxC[..., None], -jnp.inf, logits_BxCxV).max(-1)
        total_BxC = jax.nn.logsumexp(logits_BxCxV, axis=-1)
        return jnp.exp(first_BxC - total_BxC) - jnp.exp(second_BxC - total_BxC)

    branches = {
        Scores.NONE: lambda: Proposal(token_BxC, zeros_BxC, zeros_BxC, zeros_BxC),
        Scores.LOG_ODDS: lambda: Proposal(token_BxC, log_odds(logits_BxCxV, token_BxC), zeros_BxC, zeros_BxC),
        Scores.ENTROPY: lambda: Proposal(token_BxC, log_odds(logits_BxCxV, token_BxC), entropy(), zeros_BxC),
        Scores.MARGIN: lambda: Proposal(token_BxC, log_odds(logits_BxCxV, token_BxC), zeros_BxC, margin()),
    }
    return jax.lax.switch(scores, [branches[kind] for kind in Scores])


def log_odds(logits_BxCxV: jax.Array, token_BxC: jax.Array) -> jax.Array:
    """Return log(p / (1 - p)) of the probability p of some tokens, float32 (B, C).

    Log-odds have the same order as probabilities, but do not saturate: in float32 all probabilities above 1 - 6e-8 are
    equal, and ties would then reveal confident positions from left to right.
    """
    v_1x1xV = jnp.arange(logits_BxCxV.shape[-1], dtype=jnp.int32)[None, None]
    chosen_BxC = jnp.take_along_axis(logits_BxCxV, token_BxC[..., None], axis=-1)[..., 0]
    others_BxCxV = jnp.where(v_1x1xV == token_BxC[..., None], -jnp.inf, logits_BxCxV)
    return chosen_BxC - jax.nn.logsumexp(others_BxCxV, axis=-1)


def _logit_bias(job: Job) -> jax.Array:
    """Return what is added to the logits, float32 (V,): -inf for suppressed ids, and the penalty on the end of text."""
    bias_V = jnp.where(job.suppressed_V, -jnp.inf, 0.0)
    if job.eos_ids:
        bias_V = bias_V.at[jnp.asarray(job.eos_ids)].add(-job.settings.eos_penalty)
    return bias_V


def _ends(job: Job) -> jax.Array:
    """Mark the ids that end a text. bool (V,)."""
    return jnp.zeros(job.suppressed_V.shape, bool).at[jnp.asarray(job.eos_ids, jnp.int32)].set(True)


def _sort_wanted(wanted_BxT: jax.Array, multiple: int) -> tuple[jax.Array, jax.Array]:
    """Return the wanted positions of each row in rising order, filled up with T; and how many there are.

    Returns:
      int32 (B, N), with N a multiple of `multiple`; and int32 (B,).
    """
    T = wanted_BxT.shape[1]
    indices_BxT = jnp.where(wanted_BxT, jnp.arange(T, dtype=jnp.int32)[None], T)
    padding = -(-T // multiple) * multiple - T
    indices_BxN = jnp.pad(jnp.sort(indices_BxT, axis=-1), ((0, 0), (0, padding)), constant_values=T)
    return indices_BxN, wanted_BxT.sum(-1, dtype=jnp.int32)
