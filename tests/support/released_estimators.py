"""Likelihood scores of released code that are no bounds, or not quite, to compare the package's estimators with."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm.likelihood.estimators import Estimator, Plan, PlanRequest, is_target, uniform_scores

DIFFULLAMA_DRAWS = 32


def dream(request: PlanRequest) -> Plan:
    """Plan as `iid` with times from 0.001 up and no reconstruction term, as Dream's evaluation.

    Its code also lets the model see an end-of-text token after the target, which is not scored; here the target ends
    the sequence.
    """
    key_time, key_masks = jax.random.split(request.key)
    r_D = jnp.arange(request.draws, dtype=jnp.float32)
    u_D = (jax.random.uniform(key_time) + r_D / request.draws) % 1.0
    t_D = 1e-3 + (1 - 1e-3) * (1.0 - u_D)
    masked_DxK = (uniform_scores(request, key_masks) < t_D[:, None]) & is_target(request)[None]
    return Plan(masked_DxK, jnp.where(masked_DxK, 1 / (t_D[:, None] * request.draws), 0.0))


def diffullama(request: PlanRequest) -> Plan:
    """Plan DiffuLLaMA's score of answers (arXiv 2410.17891, released code), which always takes 32 draws.

    Draw k of b masks each token with probability k/b; the score is the mean over draws of the mean cross-entropy of the
    masked tokens, without the weight 1/t. A draw that masks nothing counts as 0, so short answers look better: one
    token gets 0.52 of its cross-entropy, eight get 0.90.
    """
    t_D = jnp.arange(1, request.draws + 1, dtype=jnp.float32) / request.draws
    masked_DxK = (uniform_scores(request, request.key) < t_D[:, None]) & is_target(request)[None]
    count_D = jnp.maximum(masked_DxK.sum(-1), 1).astype(jnp.float32)
    return Plan(masked_DxK, jnp.where(masked_DxK, 1 / (count_D[:, None] * request.draws), 0.0))


RELEASED = {"dream": Estimator(dream), "diffullama": Estimator(diffullama)}


def llada_counts(n: int, draws: int, k: int) -> list[int]:
    """Return the mask counts of LLaDA's released likelihood code: round(k + r n / b), wrapped to 1..n."""
    steps = np.linspace(k, k + (draws - 1) * (n / draws), draws, dtype=np.float32)
    return [int((round(float(c)) - 1) % n) + 1 for c in steps]
