"""The confidence of a masked diffusion model in a whole target at once, from one forward pass."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffusionlm.diffusion.cross_entropy import cross_entropy
from diffusionlm.errors import UserError
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.pairs import PairBatch, check_pairs, in_batches, longest_shape
from diffusionlm.likelihood.predictor import TargetPredictor
from diffusionlm.model.spec import ModelSpec
from diffusionlm.parallel.bits import in_32_bits
from diffusionlm.tree_types import Params


def confidences(
    params: Params,
    cfg: ModelSpec,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    settings: LikelihoodConfig | None = None,
) -> list[float]:
    """Return the sum over the target's tokens of log p(token | prefix, all of the target masked), nats, of each pair.

    For a target of one token this is its exact log-likelihood. For a longer one it is no bound of it: each token is
    predicted without the others. It is our reading of the confidence by which iLLaDA (arXiv 2606.25331) answers
    multiple-choice questions.

    Args:
      params: the parameters of `Transformer(cfg.model)`; for a mesh, call this under `jax.set_mesh`.
      cfg: the model.
      pairs: prefixes, which may be empty, and targets.
      settings: only `guidance` and `rows` count, as nothing here is random; None: the defaults.

    Raises:
      UserError: an autoregressive model, a setting without meaning, or a pair that this model cannot score.
    """
    settings = settings or LikelihoodConfig()
    if cfg.autoregressive:
        raise UserError("confidences need a masked diffusion model; this one is autoregressive: score by likelihoods")
    checked = check_pairs(cfg, pairs, settings)
    predictor = TargetPredictor.of(params, cfg, settings.guidance)
    with predictor.room_for(settings.rows, longest_shape(cfg, checked)):
        return in_batches(cfg, checked, settings.rows, lambda batch, K: _log_p(predictor, batch, K=K))


@in_32_bits
@functools.partial(jax.jit, static_argnames=("K",))
def _log_p(predictor: TargetPredictor, batch: PairBatch, *, K: int) -> jax.Array:
    """Return the summed log-probabilities of the tokens of each target, float32 (E,)."""
    is_target_ExK = jnp.arange(K)[None] < jnp.asarray(batch.n_E)[:, None]
    hidden_ExKxD = predictor.hidden(batch, is_target_ExK)
    chunk = predictor.model_cfg.head_chunk
    nll_ExK = cross_entropy(predictor.logits, hidden_ExKxD, batch.labels(K), predictor.suppressed_V, chunk)
    # A place beyond the target may hold a token that is never predicted, which costs infinity.
    return -jnp.where(is_target_ExK, nll_ExK, 0.0).sum(-1)
