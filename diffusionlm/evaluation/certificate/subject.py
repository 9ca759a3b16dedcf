"""Bring together what checks judge: a model, a method, texts, and short targets of which everything is known."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm.errors import UserError, suggest
from diffusionlm.evaluation.certificate.method import Method, Score
from diffusionlm.evaluation.certificate.reference import Orders, Reference, over_orders
from diffusionlm.likelihood.pairs import Pair
from diffusionlm.pretrained.model import LoadedModel

LENGTHS = (4, 5, 6)  # tokens of the short targets: 15, 31 and 63 sets of masks
SPAN = 24  # tokens of a prefix and a short target together
LEAST = 2  # tokens of a short target of a short text
REPEATS = 64  # estimates of one short target, with other noise each

# Nats a token by which two computations of one number may differ: of a token's cost at nats of a few, in each format.
ROUNDING = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Subject:
    """Hold what is judged, and the exact values that are known about it.

    Attributes:
      model: the model.
      method: the way in which figures of it were computed, which is judged.
      reference: the plain evaluation that it is compared with.
      texts: documents.
      samples: short targets out of these, with their prefixes.
      costs: their cross-entropies under every set of masks (`Reference.costs`).
      estimates: what `repeated` gives; none for an autoregressive model.
    """

    model: LoadedModel
    method: Method
    reference: Reference
    texts: Sequence[str]
    samples: Sequence[Pair]
    costs: Sequence[np.ndarray]
    estimates: Sequence[Score]

    @property
    def autoregressive(self) -> bool:
        """True if the model predicts the next token and its likelihood is exact."""
        return self.model.config.autoregressive

    @property
    def rounding(self) -> float:
        """The nats a token by which correct computations in the model's number format may differ."""
        return ROUNDING[self.model.config.model.dtype]

    @property
    def orders(self) -> list[Orders]:
        """The exact costs of the samples."""
        return [over_orders(cost) for cost in self.costs]

    def noise(self, scores: Sequence[Score]) -> float:
        """Return the nats by which the sum of scores may miss a true value: rounding, and 3 half-widths of intervals.

        Three times the half-width of a 95% interval is exceeded by chance in fewer than 1 of 4,000 cases, also with the
        8 passes that an estimate has at least (Student's t with 7 degrees of freedom).
        """
        reach = float(np.sqrt(np.sum(np.square([score.reach for score in scores]))))
        return 3 * reach + self.rounding * sum(score.tokens for score in scores)

    def other_token(self, token: int) -> int:
        """Return a token of the vocabulary that the model may predict, other than this one."""
        refused = {token, self.model.config.mask_id, *self.model.config.suppressed_ids, *self.model.config.eos_ids}
        return next(i for i in range(self.model.config.model.vocab_size) if i not in refused)


def repeated(method: Method, samples: Sequence[Pair]) -> list[Score]:
    """Return `REPEATS` estimates of the first short target by the method under check, with noise of their own."""
    return method.score([samples[0]] * REPEATS, ids=range(REPEATS))


def choose_samples(model: LoadedModel, documents: Sequence[Sequence[int]], count: int) -> list[Pair]:
    """Return short targets with their prefixes from the starts of documents, the first ones that are long enough.

    All have the same number of tokens with their prefixes, so that they share programs, unless all texts are short.

    Raises:
      UserError: no document has three tokens, of which the first is given.
    """
    longest = max(map(len, documents))
    span = min(SPAN, model.config.max_length, longest)
    if span <= LEAST:
        raise UserError(
            f"the longest text has {longest} tokens with its first one, which is given; the checks need one of at "
            f"least {LEAST + 1}"
        )
    usable = [document for document in documents if len(document) >= span]
    samples = []
    for k in range(count):
        document, n = list(usable[k % len(usable)]), LENGTHS[k % len(LENGTHS)]
        n = max(LEAST, min(n, span - 1))
        samples.append((document[: span - n], document[span - n : span]))
    return [pair for k, pair in enumerate(samples) if pair not in samples[:k]]


def in_dtype(model: LoadedModel, dtype: str) -> LoadedModel:
    """Return the model with its parameters as they are and another number format to compute in.

    Raises:
      UserError: an unknown format.
    """
    if dtype not in ROUNDING:
        raise UserError(f"unknown dtype {dtype!r}{suggest(dtype, ROUNDING)}")
    if model.config.model.dtype == dtype:
        return model
    config = dataclasses.replace(model.config, model=dataclasses.replace(model.config.model, dtype=dtype))

    def cast(params: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)

    with model.on_mesh():
        return dataclasses.replace(model, params=jax.jit(cast)(model.params), config=config)
