"""A token for every position that a step may reveal, and how sure of it the model is.

The vocabulary is the largest axis there is, so logits are made for a few positions of each row at a time, and only
where the active block has masks: how many turns that takes is data, so it costs no compilation.
"""

import operator

import jax
import jax.numpy as jnp

from diffusionlm.model.transformer import put
from diffusionlm.parallel.mesh import rows_per_device
from diffusionlm.sampling.denoiser import Denoiser, Memory
from diffusionlm.sampling.device_settings import Settings
from diffusionlm.sampling.draw import argmax, draw
from diffusionlm.sampling.strategies import Proposal, Scores

# Logits are made for about this many positions on a device at a time, and for 8 to 32 of each row. The number does not
# depend on how many are wanted, so that the bits of a row do not depend on its mates.
HEAD_POSITIONS = 256
LEAST, MOST = 8, 32


def propose(
    denoiser: Denoiser,
    memory: Memory,
    wanted_BxT: jax.Array,
    bias_V: jax.Array,
    keys_BxT: jax.Array,
    settings: Settings,
    scores: jax.Array,
    most: int | None = None,
) -> tuple[Proposal, jax.Array]:
    """Draws a token for every wanted position.

    Args:
      denoiser: gives the logits.
      memory: of the canvas as it is.
      wanted_BxT: bool.
      bias_V: float32, added to the logits; -inf: never drawn.
      keys_BxT: noise.
      settings: temperature, top-k, top-p.
      scores: int32 scalar, which of `Scores` are looked at; the others are 0.
      most: of any row, where that is known.

    Returns:
      The proposal, 0 where nothing is wanted; and which rows had NaN among their logits, bool (B,).
    """
    B, T = wanted_BxT.shape
    C = min(T if most is None else most, MOST, max(LEAST, HEAD_POSITIONS // rows_per_device(B)))
    places_BxN, count_B = _wanted_first(wanted_BxT, C)

    def turn(j: jax.Array, so_far: tuple[Proposal, jax.Array]) -> tuple[Proposal, jax.Array]:
        found, nan_B = so_far
        places_BxC = jax.lax.dynamic_slice_in_dim(places_BxN, j * C, C, axis=1)
        at_BxC = jnp.minimum(places_BxC, T - 1)
        logits_BxCxV = denoiser.logits(memory, at_BxC)
        nan_B |= (jnp.isnan(logits_BxCxV).any(axis=-1) & (places_BxC < T)).any(axis=-1)
        logits_BxCxV += bias_V[None, None]
        keys_BxC = jax.vmap(operator.getitem)(keys_BxT, at_BxC)
        token_BxC = draw(keys_BxC, logits_BxCxV, settings.temperature, settings.top_k, settings.top_p)
        new = judge(logits_BxCxV, token_BxC, scores)
        pairs = zip(found, new, strict=True)
        return Proposal(*(put(x, places_BxC, y) for x, y in pairs)), nan_B

    nothing_BxT = jnp.zeros((B, T), jnp.float32)
    nothing = Proposal(jnp.zeros((B, T), jnp.int32), nothing_BxT, nothing_BxT, nothing_BxT)
    turns = (count_B.max() + C - 1) // C
    return jax.lax.fori_loop(0, turns, turn, (nothing, jnp.zeros(B, bool)))


def judge(logits_BxCxV: jax.Array, token_BxC: jax.Array, scores: jax.Array) -> Proposal:
    """How sure the un-tempered distributions are of some tokens, and in themselves.

    Args:
      logits_BxCxV: float32; -inf where a token cannot be.
      token_BxC: int32.
      scores: int32 scalar, of `Scores`.
    """
    nothing_BxC = jnp.zeros(token_BxC.shape, jnp.float32)
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

    some = {
        Scores.NONE: lambda: Proposal(token_BxC, nothing_BxC, nothing_BxC, nothing_BxC),
        Scores.LOG_ODDS: lambda: Proposal(token_BxC, log_odds(logits_BxCxV, token_BxC), nothing_BxC, nothing_BxC),
        Scores.ENTROPY: lambda: Proposal(token_BxC, log_odds(logits_BxCxV, token_BxC), entropy(), nothing_BxC),
        Scores.MARGIN: lambda: Proposal(token_BxC, log_odds(logits_BxCxV, token_BxC), nothing_BxC, margin()),
    }
    return jax.lax.switch(scores, [some[kind] for kind in Scores])


def log_odds(logits_BxCxV: jax.Array, token_BxC: jax.Array) -> jax.Array:
    """log(p / (1 - p)) of the probability p of some tokens, float32 (B, C).

    The same order as probabilities, but without saturation: in float32 all probabilities above 1 - 6e-8 are equal, and
    ties would then reveal confident positions from left to right.
    """
    v_1x1xV = jnp.arange(logits_BxCxV.shape[-1], dtype=jnp.int32)[None, None]
    chosen_BxC = jnp.take_along_axis(logits_BxCxV, token_BxC[..., None], axis=-1)[..., 0]
    others_BxCxV = jnp.where(v_1x1xV == token_BxC[..., None], -jnp.inf, logits_BxCxV)
    return chosen_BxC - jax.nn.logsumexp(others_BxCxV, axis=-1)


def _wanted_first(wanted_BxT: jax.Array, multiple: int) -> tuple[jax.Array, jax.Array]:
    """The wanted positions of each row in rising order and then T, up to a multiple of places; and how many there are.

    Returns:
      int32 (B, N), and int32 (B,).
    """
    T = wanted_BxT.shape[1]
    places_BxT = jnp.where(wanted_BxT, jnp.arange(T, dtype=jnp.int32)[None], T)
    padding = -(-T // multiple) * multiple - T
    places_BxN = jnp.pad(jnp.sort(places_BxT, axis=-1), ((0, 0), (0, padding)), constant_values=T)
    return places_BxN, wanted_BxT.sum(-1, dtype=jnp.int32)
