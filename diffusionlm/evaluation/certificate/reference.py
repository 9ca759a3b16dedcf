"""Compute the exact costs of short targets: every set of masks is tried, in float64, by the plainest code there is.

Nothing here is shared with `diffusionlm.likelihood` but the network: rows are not padded, no noise is drawn, and the
costs of orders come from a recursion over sets instead of weights.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import special

from diffusionlm.config import ModelConfig
from diffusionlm.likelihood.pairs import Pair
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.bits import in_32_bits
from diffusionlm.pretrained.model import LoadedModel

ROWS = 16  # that the network sees at a time


class Orders(NamedTuple):
    """The nats of a target, by the orders in which its tokens may be predicted.

    Attributes:
      mean: over all orders: the bound that masked diffusion models are trained on and measured by.
      mixture: -log of the mean probability over all orders: the exact cost under a sampler that fills in one token at a
        time at a uniformly random place. By Jensen's inequality, at most `mean`.
      left_to_right: of this one order, the chain rule. It may lie on either side of `mean` and of `mixture`.
      cheapest: of the best order.
      dearest: of the worst order.
    """

    mean: float
    mixture: float
    left_to_right: float
    cheapest: float
    dearest: float


class Reference:
    """A network, evaluated plainly; `forwards` counts its passes, each for one sequence."""

    def __init__(self, model: LoadedModel):
        self._model, self.forwards = model, 0
        cfg = model.config
        self._allowed_V = np.arange(cfg.model.vocab_size)
        self._allowed_V = self._allowed_V[~np.isin(self._allowed_V, cfg.suppressed_ids)]

    def next_log_p(self, prefix: Sequence[int], masks: int) -> np.ndarray:
        """Return log p of every token at the first of so many masks behind a prefix, float64 (V,)."""
        fill = 0 if self._model.config.mask_id is None else self._model.config.mask_id
        return self._log_p([[*prefix, *[fill] * masks]], len(prefix))[0, 0]

    def costs(self, pairs: Sequence[Pair]) -> list[np.ndarray]:
        """Return the cross-entropies of each target under every set of masks, float64 (2**n, n).

        The binary digits of a set say which tokens are masked; the others have 0. For an autoregressive model there is
        one set, (1, n). Equal rows go through the network once.
        """
        rows: dict[tuple[int, tuple[int, ...], int], list[tuple[int, int]]] = {}
        costs = []
        for p, (prefix, target) in enumerate(pairs):
            sets = self._sets(len(target))
            costs.append(np.zeros((len(sets), len(target))))
            for s, masked in enumerate(sets):
                if any(masked):
                    row = (*prefix, *self._hidden(target, masked))
                    rows.setdefault((len(prefix), row, len(target)), []).append((p, s))
        shapes: dict[tuple[int, int, int], list[tuple[int, ...]]] = {}
        for start, row, n in rows:
            shapes.setdefault((start, len(row), n), []).append(row)
        for (start, _, n), members in shapes.items():
            for i in range(0, len(members), ROWS):
                chunk = members[i : i + ROWS]
                for row, log_p_nxV in zip(chunk, self._log_p(chunk, start), strict=True):
                    for p, s in rows[start, row, n]:
                        target = pairs[p][1]
                        masked = np.array(self._sets(n)[s])
                        costs[p][s] = np.where(masked, -log_p_nxV[np.arange(n), target], 0.0)
        return costs

    def _sets(self, n: int) -> list[tuple[bool, ...]]:
        if self._model.config.autoregressive:
            return [(True,) * n]
        return _subsets(n)

    def _hidden(self, target: Sequence[int], masked: Sequence[bool]) -> list[int]:
        if (mask_id := self._model.config.mask_id) is None:
            return list(target)
        return [mask_id if hidden else token for token, hidden in zip(target, masked, strict=True)]

    def _log_p(self, rows: Sequence[Sequence[int]], start: int) -> np.ndarray:
        """Return log p of every token at the positions from `start` on, float64 (R, n, V); shapes may be compiled."""
        self.forwards += len(rows)
        filled = np.array([*rows, *[rows[-1]] * (ROWS - len(rows))], np.int32)
        first = start - 1 if self._model.config.shifted else start  # the state before a token predicts it, or its own
        with self._model.on_mesh():
            logits = _logits(self._model.config.model, self._model.params, filled, first, filled.shape[1] - start)
        logits_RxnxV = np.asarray(logits, np.float64)[: len(rows)]
        log_p_RxnxV = np.full((*logits_RxnxV.shape[:2], self._model.config.model.vocab_size), -np.inf)
        log_p_RxnxV[..., self._allowed_V] = special.log_softmax(logits_RxnxV[..., self._allowed_V], axis=-1)
        return log_p_RxnxV


@functools.lru_cache(maxsize=16)
def _subsets(n: int) -> list[tuple[bool, ...]]:
    return [tuple(bool(s >> i & 1) for i in range(n)) for s in range(1 << n)]


@in_32_bits
@functools.partial(jax.jit, static_argnames=("cfg", "first", "n"))
def _logits(cfg: ModelConfig, params: Any, tokens_RxT: jax.Array, first: int, n: int) -> jax.Array:
    """Return the float32 logits of n positions from `first` on, (R, n, rows of the vocabulary's table)."""
    network, variables = Transformer(cfg), {"params": params}
    hidden_RxTxD = network.apply(variables, tokens_RxT)
    assert isinstance(hidden_RxTxD, jax.Array)
    logits = network.apply(variables, hidden_RxTxD[:, first : first + n], method=Transformer.head)
    assert isinstance(logits, jax.Array)
    return logits


def over_orders(cost_Sxn: np.ndarray) -> Orders:
    """Return the costs of a target by order, from those under every set of masks (`Reference.costs`).

    From the empty set up, a set's cost is that of the token that is predicted first and of the set without it.
    """
    S, n = cost_Sxn.shape
    if n and S == 1:  # an autoregressive model
        total = float(cost_Sxn.sum())
        return Orders(total, total, total, total, total)
    mean, mixture, cheapest, dearest = np.zeros((4, S))
    left_to_right = 0.0
    for s in range(1, S):
        tokens = [i for i in range(n) if s >> i & 1]
        rest = [s & ~(1 << i) for i in tokens]
        costs = cost_Sxn[s, tokens]
        mean[s] = np.mean(costs + mean[rest])
        mixture[s] = math.log(len(tokens)) - special.logsumexp(-costs - mixture[rest])
        cheapest[s], dearest[s] = np.min(costs + cheapest[rest]), np.max(costs + dearest[rest])
        if s == S - (1 << tokens[0]):  # all tokens from one on are hidden
            left_to_right += float(costs[0])
    return Orders(float(mean[-1]), float(mixture[-1]), left_to_right, float(cheapest[-1]), float(dearest[-1]))


def below(cost_Sxn: np.ndarray, t: float) -> float:
    """Return the part of the bound from masking rates below `t`: what clipping the rate there leaves out.

    It is the sum over sets of c masked tokens of the integral of s**(c-1) (1-s)**(n-c) from 0 to t, times their costs.
    """
    S, n = cost_Sxn.shape
    count_S = np.array([bin(s).count("1") for s in range(S)])[1:]
    weight_S = special.betainc(count_S, n - count_S + 1, t) * special.beta(count_S, n - count_S + 1)
    return float((weight_S * cost_Sxn[1:].sum(-1)).sum())
