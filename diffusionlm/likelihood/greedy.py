"""Whether greedy decoding gives a target: the accuracy of tasks such as LAMBADA."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm.config import ModelConfig
from diffusionlm.likelihood.monte_carlo import LikelihoodConfig, Scored, buckets, checked
from diffusionlm.model.spec import ModelSpec
from diffusionlm.model.transformer import Transformer, suppression
from diffusionlm.parallel.mesh import rows_per_device
from diffusionlm.sampling.denoiser import guide, predictors
from diffusionlm.sampling.draw import argmax
from diffusionlm.sampling.propose import log_odds


def is_greedy(
    params: Any,
    cfg: ModelSpec,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    settings: LikelihoodConfig | None = None,
) -> list[bool]:
    """Whether greedy decoding after the prefix gives the target, of each (prefix, target) pair of token ids.

    A masked diffusion model starts from as many masks as the target has tokens, and each forward pass reveals the
    likeliest token where it is most probable, of equal ones the leftmost (SMDM's evaluation, arXiv 2410.18514, released
    code). Of an autoregressive model each token must be the likeliest one after those before it.

    Args:
      params: the parameters of `Transformer(cfg.model)`; for a mesh, call this under `jax.set_mesh`.
      cfg: the model.
      pairs: prefixes, which may be empty for a masked diffusion model, and targets.
      settings: its `guidance` and `rows`, as nothing here is random; None: the defaults.

    Raises:
      UserError: a setting without meaning, or a pair that this model cannot score.
    """
    settings = settings or LikelihoodConfig()
    pairs = checked(cfg, pairs, settings)
    suppressed_V = jnp.asarray(suppression(cfg.model, cfg.suppressed_ids))
    found: dict[int, bool] = {}
    for (T, K), members in buckets(cfg, pairs, range(len(pairs))).items():
        for i in range(0, len(members), settings.rows):
            some = members[i : i + settings.rows]
            greedy_E = _is_greedy(
                params,
                suppressed_V,
                Scored.of([pairs[r] for r in some], T, settings.rows),
                np.int32(cfg.mask_id or 0),
                np.float32(settings.guidance),
                model_cfg=cfg.model,
                shifted=cfg.shifted,
                autoregressive=cfg.autoregressive,
                K=K,
                guided=settings.guidance > 0,
            )
            found.update(zip(some, np.asarray(greedy_E).tolist(), strict=False))  # the batch is filled up
    return [found[r] for r in range(len(pairs))]


@functools.partial(jax.jit, static_argnames=("model_cfg", "shifted", "autoregressive", "K", "guided"))
def _is_greedy(
    params: Any,
    suppressed_V: jax.Array,
    batch: Scored,
    mask_id: jax.Array,
    guidance: jax.Array,
    *,
    model_cfg: ModelConfig,
    shifted: bool,
    autoregressive: bool,
    K: int,
    guided: bool,
) -> jax.Array:
    """Of each row of a batch; bool (E,)."""
    E, T = batch.tokens_ExT.shape
    k_K = jnp.arange(K)
    is_target_ExK = k_K[None] < batch.n_E[:, None]
    # Places beyond a target may lie beyond the sequence: they are clipped to its end, and never looked at.
    place_ExK = jnp.minimum(batch.start_E[:, None] + k_K[None], T - 1)
    label_ExK = jnp.take_along_axis(batch.tokens_ExT, place_ExK, axis=1)
    at_ExK = predictors(place_ExK, shifted)
    position_ExT = jnp.arange(T)[None] - batch.start_E[:, None]
    model, D = Transformer(model_cfg), model_cfg.d_model

    def hidden_at_places(tokens_ExT: jax.Array) -> jax.Array:
        hidden_ExTxD = model.apply({"params": params}, tokens_ExT, batch.segment_ids_ExT)
        return jnp.take_along_axis(hidden_ExTxD, at_ExK[..., None], axis=1)

    def likeliest(hidden_ExCxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The likeliest tokens and their log-odds."""
        logits_ExCxV = model.apply({"params": params}, hidden_ExCxD[..., :D], method=Transformer.head)
        if guided:  # SMDM, Eq. 7
            without_ExCxV = model.apply({"params": params}, hidden_ExCxD[..., D:], method=Transformer.head)
            logits_ExCxV = guide(logits_ExCxV, without_ExCxV, guidance)
        logits_ExCxV = jnp.where(suppressed_V[None, None], -jnp.inf, logits_ExCxV)
        token_ExC = argmax(logits_ExCxV)
        return token_ExC, log_odds(logits_ExCxV, token_ExC)

    def predict(masked_ExK: jax.Array) -> tuple[jax.Array, jax.Array]:
        masked_ExT = jnp.take_along_axis(masked_ExK, jnp.clip(position_ExT, 0, K - 1), axis=1)
        masked_ExT &= (position_ExT >= 0) & (position_ExT < K)
        tokens_ExT = jnp.where(masked_ExT, mask_id, batch.tokens_ExT)
        hidden_ExKxD = hidden_at_places(tokens_ExT)
        if guided:  # beside it, the states without the prompt
            without_prompt_ExT = jnp.where(position_ExT < 0, mask_id, tokens_ExT)
            hidden_ExKxD = jnp.concatenate([hidden_ExKxD, hidden_at_places(without_prompt_ExT)], axis=-1)
        # In chunks, so that the logits of many tokens never exist together; both sizes are powers of two.
        C = min(K, 1 << (max(1, model_cfg.head_chunk // rows_per_device(E)).bit_length() - 1))
        hidden_SxExCxD = hidden_ExKxD.reshape(E, K // C, C, -1).swapaxes(0, 1)
        token_SxExC, log_odds_SxExC = jax.lax.map(likeliest, hidden_SxExCxD)
        return token_SxExC.swapaxes(0, 1).reshape(E, K), log_odds_SxExC.swapaxes(0, 1).reshape(E, K)

    if autoregressive:
        token_ExK, _ = predict(jnp.zeros((E, K), bool))
        return ((token_ExK == label_ExK) | ~is_target_ExK).all(-1)

    # Up to its first wrong token a row's revealed tokens are those of the target; after it, nothing about it matters.
    def undecided(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        masked_ExK, right_E = state
        return (masked_ExK.any(-1) & right_E).any()

    def reveal(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        masked_ExK, right_E = state
        token_ExK, log_odds_ExK = predict(masked_ExK)
        surest_E = jnp.argmax(jnp.where(masked_ExK, log_odds_ExK, -jnp.inf), axis=-1)
        revealed_ExK = masked_ExK & (k_K[None] == surest_E[:, None])
        right_E &= ~(revealed_ExK & (token_ExK != label_ExK)).any(-1)
        return masked_ExK & ~revealed_ExK, right_E

    return jax.lax.while_loop(undecided, reveal, (is_target_ExK, jnp.ones(E, bool)))[1]
