"""A way of computing figures, which the checks judge: this library's, or any other that answers three questions."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.monte_carlo import ANY_ORDER_LIMIT, estimate
from diffusionlm.likelihood.pairs import Pair, PairBatch
from diffusionlm.likelihood.predictor import TargetPredictor
from diffusionlm.parallel.bits import in_32_bits
from diffusionlm.pretrained.model import LoadedModel

PREDICTED = 16  # rows that are predicted at a time


class Row(NamedTuple):
    """A sequence whose target is hidden in part, with padding after it."""

    prefix: tuple[int, ...]
    target: tuple[int, ...]
    masked: tuple[bool, ...]  # of the target; all False for an autoregressive model
    padding: int = 0


@dataclass(frozen=True)
class Score:
    """Hold the cost of a target as a method claims it.

    Attributes:
      nats: the estimate of -log p, or of its upper bound, summed over the target.
      tokens: the number of tokens that it says to have scored.
      stderr: the standard error of `nats`; 0 where it is said to be exact.
      reach: half of the width of the 95% interval around `nats`.
    """

    nats: float
    tokens: int
    stderr: float = 0.0
    reach: float = 0.0


class Count(NamedTuple):
    """Hold the tokens and bytes by which a method divides the nats of a document."""

    tokens: int
    n_bytes: int


class Method(Protocol):
    """A way of computing figures, for `checks.run`.

    Attributes:
      forwards: forward passes of the network so far, each for one sequence.
    """

    forwards: int

    def score(
        self,
        pairs: Sequence[Pair],
        *,
        ids: Sequence[int] | None = None,
        exact: bool = False,
        left_to_right: bool = False,
    ) -> list[Score]:
        """Return the nats of the target of each (prefix, target) pair of token ids.

        Args:
          pairs: the pairs; a method may compute them together, but none may depend on the others.
          ids: an integer for each pair, which keys its noise: equal ones give equal results; None: its index.
          exact: where the method has an exact way for short targets, such as the mean over all orders, it is meant.
          left_to_right: for a masked diffusion model, the exact cost in this one order is meant (the chain rule).

        Raises:
          UserError: a pair that cannot be scored.
        """
        ...

    def predict(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Return log p of every token of the vocabulary at every place of the target, (n, V), of each row.

        Places that are not masked hold anything. The rows are of equal lengths.
        """
        ...

    def count(self, texts: Sequence[str]) -> list[Count]:
        """Return by how many tokens and bytes the nats of each text, as a document, are divided."""
        ...


class LibraryMethod:
    """The methods of this library, for a model that it has loaded.

    Args:
      model: the model.
      settings: draws, passes, seed and rows of the random estimates.
    """

    def __init__(self, model: LoadedModel, settings: LikelihoodConfig):
        self.model, self.settings, self.forwards = model, settings, 0

    def score(
        self,
        pairs: Sequence[Pair],
        *,
        ids: Sequence[int] | None = None,
        exact: bool = False,
        left_to_right: bool = False,
    ) -> list[Score]:
        """See `Method`: exact-count masking; any-order enumeration if `exact`, where it is affordable."""
        name = None
        if not self.model.config.autoregressive:
            short = all(len(target) <= ANY_ORDER_LIMIT for _, target in pairs)
            name = "chain_rule" if left_to_right else "any_order" if exact and short else "exact_count"
        settings = dataclasses.replace(self.settings, estimator=name)
        with self.model.on_mesh():
            estimates = estimate(self.model.params, self.model.config, pairs, settings, request_ids=ids)
        self.forwards += sum(result.nfe for result in estimates)
        return [
            Score(-result.log_likelihood, len(target), result.stderr, result.interval()[1] - result.log_likelihood)
            for result, (_, target) in zip(estimates, pairs, strict=True)
        ]

    def predict(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """See `Method`: what `likelihood` reads, with padding that is not attended to."""
        V, results = self.model.config.model.vocab_size, []
        for i in range(0, len(rows), PREDICTED):
            chunk = rows[i : i + PREDICTED]
            filled = [*chunk, *[chunk[-1]] * (PREDICTED - len(chunk))]
            pairs = [(list(row.prefix), list(row.target)) for row in filled]
            T = max(len(row.prefix) + len(row.target) + row.padding for row in filled)
            with self.model.on_mesh():
                predictor = TargetPredictor.of(self.model.params, self.model.config, 0.0)
                masked = np.array([row.masked for row in filled])
                log_p = np.asarray(_log_probabilities(predictor, PairBatch.of(pairs, T, PREDICTED), masked))
            results += [*log_p[: len(chunk), :, :V]]
        self.forwards += len(rows)
        return results

    def count(self, texts: Sequence[str]) -> list[Count]:
        """See `Method`: what `LoadedModel.perplexity` divides by."""
        documents, n_bytes = self.model.encode_documents(list(texts))
        return [Count(len(document) - 1, n) for document, n in zip(documents, n_bytes, strict=True)]


@in_32_bits
@functools.partial(jax.jit)
def _log_probabilities(predictor: TargetPredictor, batch: PairBatch, masked_ExK: jax.Array) -> jax.Array:
    """Return log p at the K places of each target, float32 (E, K, rows of the vocabulary's table)."""
    logits_ExKxV = predictor.logits(predictor.hidden(batch, masked_ExK))
    return jax.nn.log_softmax(jnp.where(predictor.suppressed_V[None, None], -jnp.inf, logits_ExKxV), axis=-1)
