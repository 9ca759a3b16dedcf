"""A token for every position that a step may reveal, and how sure of it the model is.

The vocabulary is the largest axis there is, so logits are made for a few positions of each row at a time, and only
where the active block has masks: how many turns that takes is data, so it costs no compilation.
"""

import jax
import jax.numpy as jnp

from diffusionlm.sampling.denoiser import Denoiser, Memory
from diffusionlm.sampling.draw import draw
from diffusionlm.sampling.settings import Settings
from diffusionlm.sampling.strategies import Proposal

# Logits are made for about this many positions of the batch at a time, and for 8 to 32 of each row.
HEAD_POSITIONS = 256
LEAST, MOST = 8, 32


def propose(
    denoiser: Denoiser,
    memory: Memory,
    wanted_BxT: jax.Array,
    suppressed_V: jax.Array,
    eos_penalty_V: jax.Array,
    keys_BxT: jax.Array,
    settings: Settings,
    scored: jax.Array,
) -> tuple[Proposal, jax.Array]:
    """Draws a token for every wanted position.

    Args:
      denoiser: gives the logits.
      memory: of the canvas as it is.
      wanted_BxT: bool.
      suppressed_V: bool, ids that are never drawn.
      eos_penalty_V: float32, nats to be taken off each logit.
      keys_BxT: noise.
      settings: temperature, top-k, top-p.
      scored: bool scalar, whether anyone looks at the scores.

    Returns:
      The proposal, 0 where nothing is wanted; and which rows had NaN among their logits, bool (B,).
    """
    B, T = wanted_BxT.shape
    C = min(T, MOST, max(LEAST, HEAD_POSITIONS // B))
    places_BxN, count_B = _wanted_first(wanted_BxT, C)
    row_Bx1 = jnp.arange(B, dtype=jnp.int32)[:, None]

    def turn(j: jax.Array, so_far: tuple[Proposal, jax.Array]) -> tuple[Proposal, jax.Array]:
        found, nan_B = so_far
        places_BxC = jax.lax.dynamic_slice_in_dim(places_BxN, j * C, C, axis=1)
        at_BxC = jnp.minimum(places_BxC, T - 1)
        logits_BxCxV = denoiser.logits(memory, at_BxC)
        nan_B |= (jnp.isnan(logits_BxCxV).any(axis=-1) & (places_BxC < T)).any(axis=-1)
        logits_BxCxV = jnp.where(suppressed_V[None, None], -jnp.inf, logits_BxCxV - eos_penalty_V[None, None])
        token_BxC = draw(keys_BxT[row_Bx1, at_BxC], logits_BxCxV, settings.temperature, settings.top_k, settings.top_p)
        nothing_BxC = jnp.zeros(token_BxC.shape, jnp.float32)
        new = jax.lax.cond(
            scored,
            lambda: scores(logits_BxCxV, token_BxC),
            lambda: Proposal(token_BxC, nothing_BxC, nothing_BxC, nothing_BxC),
        )
        pairs = zip(found, new, strict=True)
        return Proposal(*(x.at[row_Bx1, places_BxC].set(y, mode="drop") for x, y in pairs)), nan_B

    nothing_BxT = jnp.zeros((B, T), jnp.float32)
    nothing = Proposal(jnp.zeros((B, T), jnp.int32), nothing_BxT, nothing_BxT, nothing_BxT)
    turns = (count_B.max() + C - 1) // C
    return jax.lax.fori_loop(0, turns, turn, (nothing, jnp.zeros(B, bool)))


def scores(logits_BxCxV: jax.Array, token_BxC: jax.Array) -> Proposal:
    """How sure the un-tempered distributions are of some tokens, and in themselves.

    Log-odds have the same order as probabilities but do not saturate: in float32 all probabilities above 1 - 6e-8 are
    equal, and ties would then reveal confident positions from left to right.

    Args:
      logits_BxCxV: float32; -inf where a token cannot be.
      token_BxC: int32.
    """
    V = logits_BxCxV.shape[-1]
    v_1x1xV = jnp.arange(V, dtype=jnp.int32)[None, None]
    chosen_BxC = jnp.take_along_axis(logits_BxCxV, token_BxC[..., None], axis=-1)[..., 0]
    is_chosen_BxCxV = v_1x1xV == token_BxC[..., None]
    others_BxC = jax.nn.logsumexp(jnp.where(is_chosen_BxCxV, -jnp.inf, logits_BxCxV), axis=-1)
    log_p_BxCxV = jax.nn.log_softmax(logits_BxCxV, axis=-1)
    p_BxCxV = jnp.exp(log_p_BxCxV)
    entropy_BxC = -jnp.where(jnp.isfinite(log_p_BxCxV), p_BxCxV * log_p_BxCxV, 0.0).sum(-1)
    is_best_BxCxV = v_1x1xV == jnp.argmax(logits_BxCxV, axis=-1)[..., None]
    margin_BxC = p_BxCxV.max(-1) - jnp.where(is_best_BxCxV, 0.0, p_BxCxV).max(-1)
    return Proposal(token_BxC, chosen_BxC - others_BxC, entropy_BxC, margin_BxC)


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
