"""Which tokens of a target a likelihood estimator masks, how often, and with what weights.

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
import numpy as np


class Plan(NamedTuple):
    """Which target tokens each of D forward passes hides, and the weight of each token's cross-entropy in the sum."""

    masked_DxK: jax.Array  # bool
    weight_DxK: jax.Array  # float32


class Request(NamedTuple):
    """What an estimator plans for: rows `first` to `first + draws - 1` of a target of `n` tokens in K places."""

    n: jax.Array  # int32 scalar, at least 1
    K: int
    draws: int  # D
    first: jax.Array  # int32 scalar; only exact estimators, which go through their rows in order, look at it
    key: jax.Array  # of the pass; only random estimators look at it


@dataclass(frozen=True)
class Estimator:
    """How masks are drawn.

    Attributes:
      plan: a pure function of a `Request`.
      rows: forward passes that an exact estimator takes for n tokens; None for a random one.
      draws: forward passes of one pass where the method prescribes them; None: as the caller asks.
      summed: whether it estimates a sum over the target's tokens; otherwise a score per token, and no likelihood.
    """

    plan: Callable[[Request], Plan]
    rows: Callable[[int], int] | None = None
    draws: int | None = None
    summed: bool = True


def exact_count(request: Request) -> Plan:
    """Masks exactly c of the n tokens, c stratified over 1..n, with weight n/c (LLaDA, arXiv 2502.09992, Eq. 14).

    Draw r of b has c_r = 1 + (k - 1 + round(r n / b)) mod n for one uniform k in 1..n, so each c_r is uniform. LLaDA's
    code rounds k + r n / b half to even instead, which makes even counts likelier wherever r n / b ends in one half,
    and its mean is then not the bound (`llada_counts`).
    """
    key_count, key_masks = jax.random.split(request.key)
    k = jax.random.randint(key_count, (), 1, request.n + 1)
    r_D = jnp.arange(request.draws)
    shift_D = (2 * r_D * request.n + request.draws) // (2 * request.draws)
    count_D = (k - 1 + shift_D) % request.n + 1
    masked_DxK = _lowest(_scores(request, key_masks), request.n, count_D)
    weight_D = request.n.astype(jnp.float32) / count_D.astype(jnp.float32) / request.draws
    return Plan(masked_DxK, jnp.where(masked_DxK, weight_D[:, None], 0.0))


def iid(request: Request) -> Plan:
    """Masks each token with probability t, at weight 1/t, t stratified by one shared offset (MDLM, SMDM, MD4).

    The variance is infinite, if barely (the integral of 1/t over (0, 1)): rarely, a token is masked at a time close to
    0. So on targets of a few tokens intervals are somewhat too narrow; `exact_count` has no weight above n.
    """
    return _iid(request, t_min=0.0)


def dream(request: Request) -> Plan:
    """`iid` with times from 0.001 up and no reconstruction term, as Dream's evaluation: not quite a bound; for parity.

    Its code also lets the model see an end-of-text token after the target, which is not scored; here the target ends
    the sequence.
    """
    return _iid(request, t_min=1e-3)


def diffullama(request: Request) -> Plan:
    """DiffuLLaMA's score of answers (arXiv 2410.17891, released code): for parity only; no bound, and no likelihood.

    Draw k of b masks each token with probability k/b; the score is the mean over draws of the mean cross-entropy of the
    masked tokens, without the weight 1/t. A draw that masks nothing counts as 0, so short answers look better: one
    token gets 0.52 of its cross-entropy, eight get 0.90.
    """
    t_D = jnp.arange(1, request.draws + 1, dtype=jnp.float32) / request.draws
    masked_DxK = (_scores(request, request.key) < t_D[:, None]) & _is_target(request)[None]
    count_D = jnp.maximum(masked_DxK.sum(-1), 1).astype(jnp.float32)
    return Plan(masked_DxK, jnp.where(masked_DxK, 1 / (count_D[:, None] * request.draws), 0.0))


def _iid(request: Request, t_min: float) -> Plan:
    key_time, key_masks = jax.random.split(request.key)
    r_D = jnp.arange(request.draws, dtype=jnp.float32)
    u_D = (jax.random.uniform(key_time) + r_D / request.draws) % 1.0
    t_D = t_min + (1 - t_min) * (1.0 - u_D)  # never 0
    masked_DxK = (_scores(request, key_masks) < t_D[:, None]) & _is_target(request)[None]
    return Plan(masked_DxK, jnp.where(masked_DxK, 1 / (t_D[:, None] * request.draws), 0.0))


def chain_rule(request: Request) -> Plan:
    """Predicts the tokens from left to right, each with all later ones masked: exact, in n forward passes (SMDM)."""
    i_D = request.first + jnp.arange(request.draws)
    k_K = jnp.arange(request.K)
    target_K = _is_target(request)
    masked_DxK = (k_K[None] >= i_D[:, None]) & target_K[None]
    weight_DxK = ((k_K[None] == i_D[:, None]) & target_K[None]).astype(jnp.float32)
    return Plan(masked_DxK, weight_DxK)


def any_order(request: Request) -> Plan:
    """The bound itself, the mean over all orders, in 2**n - 1 forward passes: every set of masks with its weight.

    A set of c tokens has probability 1 / (n C(n, c)) under exact-count masking, and weight n/c.
    """
    subset_D = request.first + jnp.arange(request.draws) + 1  # the binary digits say which are masked
    k_K = jnp.arange(request.K)
    masked_DxK = ((subset_D[:, None] >> k_K[None]) & 1).astype(bool) & _is_target(request)[None]
    masked_DxK &= (subset_D < (1 << request.n))[:, None]
    count_D = jnp.maximum(masked_DxK.sum(-1), 1).astype(jnp.float32)
    n = request.n.astype(jnp.float32)
    log_choose_D = jax.lax.lgamma(n + 1) - jax.lax.lgamma(count_D + 1) - jax.lax.lgamma(n - count_D + 1)
    return Plan(masked_DxK, jnp.where(masked_DxK, (jnp.exp(-log_choose_D) / count_D)[:, None], 0.0))


def _teacher_forced(request: Request) -> Plan:
    """Of autoregressive models: nothing is masked, and one forward pass scores every token."""
    shape = (request.draws, request.K)
    first_D = request.first + jnp.arange(request.draws) == 0
    return Plan(jnp.zeros(shape, bool), (first_D[:, None] & _is_target(request)[None]).astype(jnp.float32))


ESTIMATORS: dict[str, Estimator] = {
    "exact_count": Estimator(exact_count),
    "iid": Estimator(iid),
    "dream": Estimator(dream),
    "diffullama": Estimator(diffullama, draws=32, summed=False),
    "chain_rule": Estimator(chain_rule, rows=lambda n: n),
    "any_order": Estimator(any_order, rows=lambda n: 2**n - 1),
    "autoregressive": Estimator(_teacher_forced, rows=lambda n: 1),
}


def _is_target(request: Request) -> jax.Array:
    return jnp.arange(request.K) < request.n


def _scores(request: Request, key: jax.Array) -> jax.Array:
    """Uniform noise (D, K), each element a function of (key, draw, place): equal in every bucket."""

    def one(d: jax.Array, k: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, d), k))

    over_places = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(over_places, in_axes=(0, None))(jnp.arange(request.draws), jnp.arange(request.K))


def _lowest(scores_DxK: jax.Array, n: jax.Array, count_D: jax.Array) -> jax.Array:
    """The `count_D` of the first n places with the lowest scores."""
    K = scores_DxK.shape[1]
    scores_DxK = jnp.where((jnp.arange(K) < n)[None], scores_DxK, 2.0)
    rank_DxK = jnp.argsort(jnp.argsort(scores_DxK, axis=-1), axis=-1)
    return rank_DxK < count_D[:, None]


def llada_counts(n: int, draws: int, k: int) -> list[int]:
    """The mask counts of LLaDA's released likelihood code: round(k + r n / b), wrapped to 1..n.

    For parity with its numbers; `exact_count` has the counts that are uniform.
    """
    steps = np.linspace(k, k + (draws - 1) * (n / draws), draws, dtype=np.float32)
    return [int((round(float(c)) - 1) % n) + 1 for c in steps]
