"""Greedy decoding of a target, which gives the accuracy of tasks such as LAMBADA."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.pairs import PairBatch, check_pairs, in_batches, longest_shape
from diffusionlm.likelihood.predictor import TargetPredictor
from diffusionlm.model.spec import ModelSpec
from diffusionlm.parallel.bits import in_32_bits
from diffusionlm.parallel.mesh import rows_per_device
from diffusionlm.sampling.draw import argmax
from diffusionlm.sampling.propose import log_odds
from diffusionlm.tree_types import Params


def is_greedy(
    params: Params,
    cfg: ModelSpec,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    settings: LikelihoodConfig | None = None,
) -> list[bool]:
    """Tell for each (prefix, target) pair of token ids if greedy decoding after the prefix gives the target.

    A masked diffusion model starts from as many masks as the target has tokens, and each forward pass reveals the
    likeliest token where it is most probable, of equal ones the leftmost (SMDM's evaluation, arXiv 2410.18514, released
    code). Of an autoregressive model each token must be the likeliest one after those before it.

    Args:
      params: the parameters of `Transformer(cfg.model)`; for a mesh, call this under `jax.set_mesh`.
      cfg: the model.
      pairs: prefixes, which may be empty for a masked diffusion model, and targets.
      settings: only `guidance` and `rows` count, as nothing here is random; None: the defaults.

    Raises:
      UserError: a setting without meaning, or a pair that this model cannot score.
    """
    settings = settings or LikelihoodConfig()
    checked = check_pairs(cfg, pairs, settings)
    predictor = TargetPredictor.of(params, cfg, settings.guidance)
    with predictor.room_for(settings.rows, longest_shape(cfg, checked)):
        return in_batches(cfg, checked, settings.rows, lambda batch, K: _matches(predictor, batch, K=K))


def most_passes(cfg: ModelSpec, target: Sequence[int], settings: LikelihoodConfig | None = None) -> int:
    """Return the most forward passes that `is_greedy` takes for a target; a wrong token ends them earlier."""
    if cfg.autoregressive:
        return 1
    return len(target) * (2 if settings and settings.guidance else 1)


@in_32_bits
@functools.partial(jax.jit, static_argnames=("K",))
def _matches(predictor: TargetPredictor, batch: PairBatch, *, K: int) -> jax.Array:
    """Compare greedy decoding with the target of each row; bool (E,)."""
    k_K = jnp.arange(K)
    is_target_ExK = k_K[None] < batch.n_E[:, None]
    label_ExK = batch.labels(K)
    if predictor.autoregressive:
        token_ExK, _ = _likeliest(predictor, batch, jnp.zeros_like(is_target_ExK))
        return ((token_ExK == label_ExK) | ~is_target_ExK).all(-1)

    # Up to its first wrong token a row's revealed tokens are those of the target; after it, nothing about it matters.
    def undecided(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        masked_ExK, matches_E = state
        return (masked_ExK.any(-1) & matches_E).any()

    def reveal(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        masked_ExK, matches_E = state
        token_ExK, log_odds_ExK = _likeliest(predictor, batch, masked_ExK)
        surest_E = jnp.argmax(jnp.where(masked_ExK, log_odds_ExK, -jnp.inf), axis=-1)
        revealed_ExK = masked_ExK & (k_K[None] == surest_E[:, None])
        matches_E &= ~(revealed_ExK & (token_ExK != label_ExK)).any(-1)
        return masked_ExK & ~revealed_ExK, matches_E

    return jax.lax.while_loop(undecided, reveal, (is_target_ExK, jnp.ones(len(label_ExK), bool)))[1]


def _likeliest(predictor: TargetPredictor, batch: PairBatch, masked_ExK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the likeliest token of each place, int32 (E, K), and its log-odds, float32 (E, K)."""
    E, K = masked_ExK.shape

    def project(hidden_ExCxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_ExCxV = jnp.where(predictor.suppressed_V[None, None], -jnp.inf, predictor.logits(hidden_ExCxD))
        token_ExC = argmax(logits_ExCxV)
        return token_ExC, log_odds(logits_ExCxV, token_ExC)

    # In chunks, so that the logits of many tokens never exist together; both sizes are powers of two.
    C = min(K, 1 << (max(1, predictor.model_cfg.head_chunk // rows_per_device(E)).bit_length() - 1))
    hidden_SxExCxD = predictor.hidden(batch, masked_ExK).reshape(E, K // C, C, -1).swapaxes(0, 1)
    token_SxExC, log_odds_SxExC = jax.lax.map(project, hidden_SxExCxD)
    return token_SxExC.swapaxes(0, 1).reshape(E, K), log_odds_SxExC.swapaxes(0, 1).reshape(E, K)
