"""The forward process: it masks tokens and weights their cross-entropy for the bound.

Noise is addressed, not streamed: the noise of an example is a function of (seed, batch index, position of the example
in the global batch) alone, so masks are the same on any mesh, host count or micro-batch split. Masks are carried as
booleans and never read back from ids.
"""

import jax
import jax.numpy as jnp
from flax import struct

from diffusionlm.config import DiffusionConfig
from diffusionlm.config_data import PROMPT
from diffusionlm.diffusion import schedules
from diffusionlm.diffusion.noise import evaluation_keys, example_keys


@struct.dataclass
class Corrupted:
    """A corrupted batch."""

    tokens_BxT: jax.Array  # int32; masked positions hold the mask id
    masked_BxT: jax.Array  # bool, the masked positions
    scored_BxT: jax.Array  # bool, the positions that the bound covers: real, maskable and not cut off
    segment_ids_BxT: jax.Array  # int32; 0 at padding and in a cut-off tail
    weight_B: jax.Array  # float32, the weight of a masked token's cross-entropy


def corrupt(
    cfg: DiffusionConfig,
    mask_id: int,
    tokens_BxT: jax.Array,
    segment_ids_BxT: jax.Array,
    maskable_BxT: jax.Array | None,
    key: jax.Array,
) -> Corrupted:
    """Mask a global batch (SMDM, arXiv 2410.18514, Section 2; LLaDA, arXiv 2502.09992, Algorithms 1 and 2).

    Args:
      cfg: the forward process.
      mask_id: the id written into masked positions.
      tokens_BxT: clean int32 ids of the whole global batch; B is even for antithetic times.
      segment_ids_BxT: int32, 0 at padding, which is never masked or scored.
      maskable_BxT: bool, False at positions that stay clean and unscored (a prompt); None: all are maskable.
      key: the key of the batch, from `noise_key`.
    """
    B, T = tokens_BxT.shape
    key_times, _, key_examples = jax.random.split(key, 3)  # splitting in two would change all noise
    keys_B = example_keys(key_examples, jnp.arange(B))
    length_keys_B, time_keys_B, mask_keys_B = jax.vmap(lambda k: jax.random.split(k, 3), out_axes=1)(keys_B)

    if cfg.random_length:
        kept_BxT = _kept(cfg, T, length_keys_B)
        segment_ids_BxT = jnp.where(kept_BxT, segment_ids_BxT, 0)
    scored_BxT = segment_ids_BxT != 0
    if maskable_BxT is not None:
        scored_BxT &= maskable_BxT

    u_B = sample_u(cfg, key_times, time_keys_B)
    scores_BxT = jax.vmap(lambda k: jax.random.uniform(k, (T,)))(mask_keys_B)
    if cfg.mask_sampling == "exact_count":
        masked_BxT, weight_B = _mask_exact_count(scored_BxT, scores_BxT, u_B)
    else:
        probability_B, weight_B = mask_probability_and_weight(cfg, u_B)
        masked_BxT = scored_BxT & (scores_BxT < probability_B[:, None])
    noisy_BxT = jnp.where(masked_BxT, jnp.int32(mask_id), tokens_BxT)
    return Corrupted(noisy_BxT, masked_BxT, scored_BxT, segment_ids_BxT, weight_B)


def corrupt_held_out(
    mask_id: int,
    tokens_BxT: jax.Array,
    segment_ids_BxT: jax.Array,
    maskable_BxT: jax.Array,
    record_B: jax.Array,
    draw: jax.Array,
) -> Corrupted:
    """Mask held-out records with noise that is a function of (record, draw) only, however they are batched.

    Exactly n positions of a record are masked, n uniform: the mean is the continuous-time bound of every schedule, with
    no reconstruction term left over, at a lower variance than independent masks (LLaDA, arXiv 2502.09992, Eq. 14). The
    times of one draw are a Kronecker sequence over the records (steps of the golden ratio) from a random start: each is
    uniform, times are evenly spread over any stretch of records, and draws are independent of each other.

    Args:
      mask_id: the id written into masked positions.
      tokens_BxT: clean int32 ids.
      segment_ids_BxT: int32, 0 at padding, which is never masked or scored.
      maskable_BxT: bool, False at positions that stay clean and unscored.
      record_B: int32 indices of the records in their split.
      draw: int32 index of the draw.
    """
    key_times, key_masks = evaluation_keys(draw)
    turns_B = record_B.astype(jnp.uint32) * jnp.uint32(_GOLDEN) + jax.random.bits(key_times, dtype=jnp.uint32)
    u_B = ((turns_B >> 8) + 1).astype(jnp.float32) / (1 << 24)  # 24 bits are exact in float32; never 0
    keys_B = example_keys(key_masks, record_B)
    scores_BxT = jax.vmap(lambda k: jax.random.uniform(k, tokens_BxT.shape[1:]))(keys_B)
    scored_BxT = (segment_ids_BxT != 0) & maskable_BxT
    masked_BxT, weight_B = _mask_exact_count(scored_BxT, scores_BxT, u_B)
    noisy_BxT = jnp.where(masked_BxT, jnp.int32(mask_id), tokens_BxT)
    return Corrupted(noisy_BxT, masked_BxT, scored_BxT, segment_ids_BxT, weight_B)


_GOLDEN = 0x9E3779B9  # the fractional part of the golden ratio, in units of 2**-32


def sample_u(cfg: DiffusionConfig, key_batch: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Draw a time in (0, 1] for each example; each is marginally uniform for every `cfg.time_sampling`.

    iid: times are independent. stratified: there is one in each of B equal strata, and a random permutation deals them
    to the examples. antithetic: the same with pairs (u, 1-u) on examples (2i, 2i+1), where u is in one of B/2 strata of
    the lower half and a coin decides which example gets u; the loss is monotonic in u, so the errors of a pair cancel.

    Args:
      cfg: the forward process.
      key_batch: the key of the permutation and the coins.
      keys_B: the keys of the examples.
    """
    B = keys_B.shape[0]
    jitter_B = 1.0 - jax.vmap(jax.random.uniform)(keys_B)
    if cfg.time_sampling == "iid":
        return jitter_B
    if cfg.time_sampling == "stratified":
        return (jax.random.permutation(key_batch, B).astype(jnp.float32) + jitter_B) / B
    pairs = B // 2
    key_order, key_swap = jax.random.split(key_batch)
    low = (jax.random.permutation(key_order, pairs).astype(jnp.float32) + jitter_B[::2]) / B
    swap = jax.random.bernoulli(key_swap, shape=(pairs,))
    # 1 - low would be 0 only for low = 1, which pairs * jitter / B = 1/2 excludes.
    return jnp.stack([jnp.where(swap, 1.0 - low, low), jnp.where(swap, low, 1.0 - low)], axis=1).reshape(B)


def mask_probability_and_weight(cfg: DiffusionConfig, u_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the probability of a mask, and the weight with which the mean over uniform `u` is the bound.

    Continuous time (MDLM, arXiv 2406.07524, Eq. 10; MD4, arXiv 2406.04329, Eq. 4): times below t_min become one
    reconstruction step from t_min to clean data. Their share of the draws is t_min and the reconstruction term has
    weight 1, so those draws have weight 1/t_min; the mean over u is then the bound with its reconstruction term, in one
    forward pass.

    Discrete time with T steps (MD4, Eq. 2): t = ceil(u T)/T, and weight T (alpha_s - alpha_t) / (1 - alpha_t) with
    s = t - 1/T. The last step ends in clean data (alpha_0 taken as 1), so it is the reconstruction term.
    """
    schedule = schedules.build(cfg)
    if cfg.timesteps:
        index_B = jnp.ceil(u_B * cfg.timesteps)
        t_B, s_B = index_B / cfg.timesteps, (index_B - 1) / cfg.timesteps
        masked_t_B = schedule.mask_probability(t_B)
        masked_s_B = jnp.where(index_B == 1, 0.0, schedule.mask_probability(s_B))
        return masked_t_B, cfg.timesteps * (masked_t_B - masked_s_B) / masked_t_B
    t_B = jnp.maximum(u_B, cfg.t_min)
    weight_B = jnp.where(u_B < cfg.t_min, 1 / cfg.t_min, schedule.weight(t_B))
    return schedule.mask_probability(t_B), weight_B


def _mask_exact_count(scored_BxT: jax.Array, scores_BxT: jax.Array, u_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mask exactly n of the N scored positions, n uniform on 1..N, with weight N/n (LLaDA, Eq. 14)."""
    total_B = scored_BxT.sum(-1)
    share_B = u_B * total_B.astype(jnp.float32)
    count_B = jnp.clip(jnp.ceil(share_B).astype(jnp.int32), 1, jnp.maximum(total_B, 1))
    order_BxT = jnp.argsort(jnp.where(scored_BxT, scores_BxT, 2.0), axis=-1)
    rank_BxT = jnp.argsort(order_BxT, axis=-1)
    masked_BxT = scored_BxT & (rank_BxT < count_B[:, None])
    return masked_BxT, total_B.astype(jnp.float32) / count_B.astype(jnp.float32)


def _kept(cfg: DiffusionConfig, T: int, keys_B: jax.Array) -> jax.Array:
    """Return the positions that random lengths keep, bool (B, T).

    A fraction `cfg.random_length` of the examples is cut to a uniform length in 1..T (SMDM, Section 5).
    """

    def length(key: jax.Array) -> jax.Array:
        key_cut, key_length = jax.random.split(key)
        cut = jax.random.bernoulli(key_cut, cfg.random_length)
        return jnp.where(cut, jax.random.randint(key_length, (), 1, T + 1), T)

    return jnp.arange(T)[None] < jax.vmap(length)(keys_B)[:, None]


def pad_to_longest(parts_BxT: jax.Array, group: int = 0) -> tuple[jax.Array, jax.Array]:
    """Return segments that end with the longest example of a batch of prompts with answers, and the answers' places.

    LLaDA (arXiv 2502.09992, Appendix B.1) pads with EOS to the longest example of a mini-batch and counts the padding
    as part of the answer, from which a model learns where to end. Shapes stay the same: positions beyond are in segment
    0, which nothing attends to and nothing scores. The result depends on the global batch only, not on the mesh.

    Args:
      parts_BxT: int32 PROMPT, ANSWER (with the EOS that ends it), and 0 at the EOS padding after them.
      group: the number of consecutive rows that are padded to one length; 0: the whole batch; -1: all rows are padded
        to the end (SMDM's GSM8K, DiffuGPT).

    Returns:
      Segment ids, int32 (B, T), 1 up to the longest example of the group and 0 after it; and the answers with their
      padding, bool (B, T).
    """
    B, T = parts_BxT.shape
    if group == -1:
        return jnp.ones_like(parts_BxT), parts_BxT != PROMPT
    longest_G = (parts_BxT != 0).sum(-1).reshape(-1, group or B).max(-1)
    seen_BxT = jnp.arange(T)[None] < jnp.repeat(longest_G, group or B)[:, None]
    return seen_BxT.astype(jnp.int32), seen_BxT & (parts_BxT != PROMPT)


def dropped_prompts(fraction: float, segment_ids_BxT: jax.Array, prompt_BxT: jax.Array, key: jax.Array) -> jax.Array:
    """Return the tokens of the prompts that are hidden from the model, bool (B, T).

    Each prompt is hidden whole, with probability `fraction` and apart from all others. SMDM's released code decides
    once for each micro-batch; a prompt has the same chance, and the noise does not depend on how a batch is split.

    Args:
      fraction: of the prompts.
      segment_ids_BxT: int32, a number for each example of a row.
      prompt_BxT: bool, the tokens of prompts.
      key: the key of the batch, from `prompts_key`.
    """
    B, T = segment_ids_BxT.shape
    keys_B = example_keys(key, jnp.arange(B))
    draws_BxS = jax.vmap(lambda k: jax.random.uniform(k, (T + 1,)))(keys_B)  # one for each segment that there may be
    return prompt_BxT & (jnp.take_along_axis(draws_BxS, segment_ids_BxT, axis=1) < fraction)
