"""Exact categorical sampling in float32; temperature, top-k and top-p are data, not compiled in.

The vocabulary is divided into 128 parts: first a part is drawn, then an id in it. That is the same law, and takes noise
for 128 + V/128 numbers instead of V, which would cost more than the network. Parts are cut so that a vocabulary that is
split over devices stays split.
"""

import functools

import jax
import jax.numpy as jnp

from diffusionlm.parallel.mesh import Array

PARTS = 128  # vocabularies are padded to a multiple of this
COLDEST = 1e-6  # temperatures up to this count as 0


def draw(
    keys_BxT: jax.Array,
    logits_BxTxV: jax.Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    nucleus_of_all: Array | bool = False,
) -> jax.Array:
    """Draw one token per position from softmax(logits / temperature), cut to the top k and then to the nucleus p.

    The Gumbel-max trick chooses among the parts' total probabilities and then within a part. High-resolution noise
    keeps the tail: float32's usual uniforms have nothing below 1e-7, which acts like a lower temperature (arXiv
    2409.02908).

    Args:
      keys_BxT: the keys of the noise.
      logits_BxTxV: float32; -inf where a token must not be drawn.
      temperature: float32 scalar; 0 takes the likeliest token, of equal ones the first.
      top_k: int32 scalar; 0: all. Tokens that tie with the k-th are kept.
      top_p: float32 scalar; 1: all. The fewest likeliest tokens with at least this much of the tempered probability,
        and those that tie with the last of them (Holtzman et al., arXiv 1904.09751).
      nucleus_of_all: bool scalar; True: the nucleus holds its share of the probability of all tokens, as in Dream's
        released code, and not of the top k alone.

    Returns:
      int32 (B, T).
    """

    def noisy() -> jax.Array:
        cuts = (top_k > 0) | (top_p < 1)
        kept_BxTxV = jax.lax.cond(
            cuts, lambda: _cut(logits_BxTxV, temperature, top_k, top_p, nucleus_of_all), lambda: logits_BxTxV
        )
        parts_BxTxPxI = _in_parts(kept_BxTxV / temperature)
        keys_BxTx2 = jax.vmap(jax.vmap(jax.random.split))(keys_BxT)
        total_BxTxP = jax.nn.logsumexp(parts_BxTxPxI, axis=-1)
        part_BxT = jnp.argmax(total_BxTxP + _gumbel(keys_BxTx2[..., 0], total_BxTxP.shape[-1]), axis=-1)
        inside_BxTxI = _part(parts_BxTxPxI, part_BxT)
        size = inside_BxTxI.shape[-1]
        return part_BxT * size + jnp.argmax(inside_BxTxI + _gumbel(keys_BxTx2[..., 1], size), axis=-1)

    return jax.lax.cond(temperature > COLDEST, noisy, lambda: argmax(logits_BxTxV)).astype(jnp.int32)


def drawn_logits(
    logits_BxTxV: jax.Array, temperature: Array, top_k: Array, top_p: Array, nucleus_of_all: Array | bool = False
) -> jax.Array:
    """Return the logits of the distribution that `draw` draws from; at temperature 0, cut as at temperature 1."""
    temperature = jnp.where(temperature > COLDEST, temperature, 1.0)
    return _cut(logits_BxTxV, temperature, top_k, top_p, nucleus_of_all) / temperature


def argmax(x_BxTxV: jax.Array) -> jax.Array:
    """Return the index of the largest element, int32 (B, T); several times as fast on CPUs as `jnp.argmax`.

    Of equal elements the first counts.
    """
    parts_BxTxPxI = _in_parts(x_BxTxV)
    part_BxT = jnp.argmax(parts_BxTxPxI.max(-1), axis=-1)
    inside_BxT = jnp.argmax(_part(parts_BxTxPxI, part_BxT), axis=-1)
    return (part_BxT * parts_BxTxPxI.shape[-1] + inside_BxT).astype(jnp.int32)


def _in_parts(x_BxTxV: jax.Array) -> jax.Array:
    B, T, V = x_BxTxV.shape
    parts = min(V, PARTS)
    padding = -V % parts
    if padding:
        x_BxTxV = jnp.pad(x_BxTxV, ((0, 0), (0, 0), (0, padding)), constant_values=-jnp.inf)
    return x_BxTxV.reshape(B, T, parts, -1)


def _part(parts_BxTxPxI: jax.Array, part_BxT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(parts_BxTxPxI, part_BxT[..., None, None], axis=2)[:, :, 0]


def _gumbel(keys_BxT: jax.Array, size: int) -> jax.Array:
    noise = functools.partial(jax.random.gumbel, shape=(size,), dtype=jnp.float32, mode="high")
    return jax.vmap(jax.vmap(noise))(keys_BxT)


def _cut(
    logits_BxTxV: jax.Array, temperature: Array, top_k: Array, top_p: Array, nucleus_of_all: Array | bool
) -> jax.Array:
    """Return the logits with -inf for the ids that top-k and top-p leave out."""
    ones_BxTxV = jnp.ones_like(logits_BxTxV)
    V = logits_BxTxV.shape[-1]
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V).astype(jnp.float32)
    least_BxT = smallest_kept(logits_BxTxV, ones_BxTxV, jnp.broadcast_to(k, logits_BxTxV.shape[:-1]))
    all_BxTxV, logits_BxTxV = logits_BxTxV, jnp.where(logits_BxTxV >= least_BxT[..., None], logits_BxTxV, -jnp.inf)
    p_BxTxV = jax.nn.softmax(jnp.where(nucleus_of_all, all_BxTxV, logits_BxTxV) / temperature, axis=-1)
    # A sum of all probabilities may fall short of 1 by rounding, so p = 1 keeps all; p that rounds to 0 keeps the best.
    mass = jnp.where(top_p < 1, jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny), 0.0)
    least_BxT = smallest_kept(logits_BxTxV, p_BxTxV, jnp.broadcast_to(mass, logits_BxTxV.shape[:-1]))
    kept_BxTxV = (logits_BxTxV >= least_BxT[..., None]) | (top_p >= 1)
    return jnp.where(kept_BxTxV, logits_BxTxV, -jnp.inf)


def smallest_kept(x_BxTxV: jax.Array, mass_BxTxV: jax.Array, least_mass_BxT: jax.Array) -> jax.Array:
    """Return the largest threshold for which the elements of `x` at or above it have at least the given mass.

    The search bisects the 32 bits of a float and needs no sort over the vocabulary: its cost is 32 sums, and the
    vocabulary may be split over devices (MD4's released sampler finds its nucleus in the same way).

    Returns:
      float32 (B, T), an element of `x`.
    """
    order_BxTxV = _ordered(x_BxTxV)

    def set_bit(i: jax.Array, threshold_BxT: jax.Array) -> jax.Array:
        candidate_BxT = threshold_BxT | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        kept_BxTxV = order_BxTxV >= candidate_BxT[..., None]
        enough_BxT = jnp.where(kept_BxTxV, mass_BxTxV, 0.0).sum(-1) >= least_mass_BxT
        return jnp.where(enough_BxT, candidate_BxT, threshold_BxT)

    threshold_BxT = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(least_mass_BxT.shape, jnp.uint32))
    return jnp.where(order_BxTxV >= threshold_BxT[..., None], x_BxTxV, jnp.inf).min(-1)


def _ordered(x: jax.Array) -> jax.Array:
    """Map float32 to uint32 in the same order: the bits, with those of negative numbers flipped."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign != 0, ~bits, bits | sign)
