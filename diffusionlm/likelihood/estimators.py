"""Choose the target tokens that each pass masks, and their weights; `monte_carlo` averages the passes.

A masked diffusion model bounds -log p(target | prefix) by a mean, over random masks of the target, of the weighted
cross-entropy of the masked tokens. An estimator is a pure function that plans a number of forward passes; a new one is
one function and one entry in `ESTIMATORS`. Random estimators work in *passes*: the draws of one pass share an offset,
which spreads them evenly and makes them dependent, so a pass is one sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Plan(NamedTuple):
    """The target tokens that each of D forward passes hides, and the weight of each cross-entropy in the sum."""

    masked_DxK: jax.Array  # bool
    weight_DxK: jax.Array  # float32


class PlanRequest(NamedTuple):
    """The input of an estimator: rows `first` to `first + draws - 1` of a target of `n` tokens in K places."""

    n: jax.Array  # int32 scalar, at least 1
    K: int
    draws: int  # D
    first: jax.Array  # int32 scalar; used by exact estimators alone, which go through their rows in order
    key: jax.Array  # the key of the pass; used by random estimators alone


@dataclass(frozen=True)
class Estimator:
    """A way to draw masks.

    Attributes:
      plan: a pure function of a `PlanRequest`.
      rows: the number of forward passes that an exact estimator takes for n tokens; None for a random one.
    """

    plan: Callable[[PlanRequest], Plan]
    rows: Callable[[int], int] | None = None


def exact_count(request: PlanRequest) -> Plan:
    """Mask exactly c of the n tokens, c stratified over 1..n, with weight n/c (LLaDA, arXiv 2502.09992, Eq. 14).

    Draw r of b has c_r = 1 + (k - 1 + round(r n / b)) mod n for one uniform k in 1..n, so each c_r is uniform. LLaDA's
    code rounds k + r n / b half to even instead, which makes even counts likelier wherever r n / b ends in one half,
    and its mean is then not the bound.
    """
    key_count, key_masks = jax.random.split(request.key)
    k = jax.random.randint(key_count, (), 1, request.n + 1)
    r_D = jnp.arange(request.draws)
    shift_D = (2 * r_D * request.n + request.draws) // (2 * request.draws)
    count_D = (k - 1 + shift_D) % request.n + 1
    masked_DxK = _lowest(uniform_scores(request, key_masks), request.n, count_D)
    weight_D = request.n.astype(jnp.float32) / count_D.astype(jnp.float32) / request.draws
    return Plan(masked_DxK, jnp.where(masked_DxK, weight_D[:, None], 0.0))


def iid(request: PlanRequest) -> Plan:
    """Mask each token with probability t, at weight 1/t, t stratified by one shared offset (MDLM, SMDM, MD4).

    The variance is infinite, if barely (the integral of 1/t over (0, 1)): rarely, a token is masked at a time close to
    0. So on targets of a few tokens intervals are somewhat too narrow; `exact_count` has no weight above n.
    """
    key_time, key_masks = jax.random.split(request.key)
    r_D = jnp.arange(request.draws, dtype=jnp.float32)
    u_D = (jax.random.uniform(key_time) + r_D / request.draws) % 1.0
    t_D = 1.0 - u_D  # never 0
    masked_DxK = (uniform_scores(request, key_masks) < t_D[:, None]) & is_target(request)[None]
    return Plan(masked_DxK, jnp.where(masked_DxK, 1 / (t_D[:, None] * request.draws), 0.0))


def chain_rule(request: PlanRequest) -> Plan:
    """Predict the tokens from left to right, each with all later ones masked: exact, in n forward passes (SMDM)."""
    i_D = request.first + jnp.arange(request.draws)
    k_K = jnp.arange(request.K)
    target_K = is_target(request)
    masked_DxK = (k_K[None] >= i_D[:, None]) & target_K[None]
    weight_DxK = ((k_K[None] == i_D[:, None]) & target_K[None]).astype(jnp.float32)
    return Plan(masked_DxK, weight_DxK)


def any_order(request: PlanRequest) -> Plan:
    """Sum the bound itself, the mean over all orders, in 2**n - 1 forward passes: every set of masks with its weight.

    A set of c tokens has probability 1 / (n C(n, c)) under exact-count masking, and weight n/c.
    """
    subset_D = request.first + jnp.arange(request.draws) + 1  # the binary digits say which are masked
    k_K = jnp.arange(request.K)
    masked_DxK = ((subset_D[:, None] >> k_K[None]) & 1).astype(bool) & is_target(request)[None]
    masked_DxK &= (subset_D < (1 << request.n))[:, None]
    count_D = jnp.maximum(masked_DxK.sum(-1), 1).astype(jnp.float32)
    n = request.n.astype(jnp.float32)
    log_choose_D = jax.lax.lgamma(n + 1) - jax.lax.lgamma(count_D + 1) - jax.lax.lgamma(n - count_D + 1)
    return Plan(masked_DxK, jnp.where(masked_DxK, (jnp.exp(-log_choose_D) / count_D)[:, None], 0.0))


def teacher_forced(request: PlanRequest) -> Plan:
    """Mask nothing: one forward pass of an autoregressive model scores every token."""
    shape = (request.draws, request.K)
    first_D = request.first + jnp.arange(request.draws) == 0
    return Plan(jnp.zeros(shape, bool), (first_D[:, None] & is_target(request)[None]).astype(jnp.float32))


ESTIMATORS: dict[str, Estimator] = {
    "exact_count": Estimator(exact_count),
    "iid": Estimator(iid),
    "chain_rule": Estimator(chain_rule, rows=lambda n: n),
    "any_order": Estimator(any_order, rows=lambda n: 2**n - 1),
    "autoregressive": Estimator(teacher_forced, rows=lambda n: 1),
}


def is_target(request: PlanRequest) -> jax.Array:
    """Mark the places that hold tokens of the target, bool (K,)."""
    return jnp.arange(request.K) < request.n


def uniform_scores(request: PlanRequest, key: jax.Array) -> jax.Array:
    """Draw uniform noise (D, K), each element a function of (key, draw, place), so that K does not matter."""

    def score(d: jax.Array, k: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, d), k))

    over_places = jax.vmap(score, in_axes=(None, 0))
    return jax.vmap(over_places, in_axes=(0, None))(jnp.arange(request.draws), jnp.arange(request.K))


def _lowest(scores_DxK: jax.Array, n: jax.Array, count_D: jax.Array) -> jax.Array:
    """Mark the `count_D` of the first n places with the lowest scores."""
    K = scores_DxK.shape[1]
    scores_DxK = jnp.where((jnp.arange(K) < n)[None], scores_DxK, 2.0)
    rank_DxK = jnp.argsort(jnp.argsort(scores_DxK, axis=-1), axis=-1)
    return rank_DxK < count_D[:, None]
