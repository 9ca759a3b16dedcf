"""Score texts by each estimator, and give the intervals of the totals."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy import special  # JAX has it loaded; scipy.stats would slow down every start

from diffusionlm.evaluation.certificate.verdicts import Finding, judge, not_applicable
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.monte_carlo import Estimate, estimate
from diffusionlm.likelihood.pairs import Pair
from diffusionlm.pretrained.model import LoadedModel

AGREEMENT = 1e-4  # the chance that two estimates of one bound are said to disagree


class Total(NamedTuple):
    """A sum of independent estimates.

    Attributes:
      nats: the sum.
      variance: the sum of the squares of their standard errors.
      quartic: the sum of the squares of those, over the degrees of freedom of each.
    """

    nats: float
    variance: float
    quartic: float

    @classmethod
    def of(cls, estimates: Sequence[Estimate]) -> "Total":
        """Add up the negative log-likelihoods of estimates."""
        variances = [result.stderr**2 for result in estimates]
        return cls(
            -math.fsum(result.log_likelihood for result in estimates),
            math.fsum(variances),
            math.fsum(v**2 / max(1, result.passes - 1) for v, result in zip(variances, estimates, strict=True)),
        )

    def __add__(self, other: object) -> "Total":
        if not isinstance(other, Total):
            return NotImplemented
        return Total(*(x + y for x, y in zip(self, other, strict=True)))

    @property
    def stderr(self) -> float:
        """The standard error of the sum."""
        return math.sqrt(self.variance)

    def reach(self, chance: float = 0.05) -> float:
        """Return the half-width of the interval that misses the true sum with this chance.

        It is that of Student's t, with the degrees of freedom of Welch and Satterthwaite.
        """
        if not self.variance:
            return 0.0
        return float(special.stdtrit(self.variance**2 / self.quartic, 1 - chance / 2)) * self.stderr


def total(records: Iterable[Mapping[str, Any]], name: str) -> Total:
    """Add up what one estimator gave all texts."""
    totals = [Total(*record[name]) for record in records]
    return Total(*(math.fsum(column) for column in zip(*totals, strict=True)))


def settings_of(model: LoadedModel, settings: LikelihoodConfig) -> dict[str, LikelihoodConfig]:
    """Return the settings of each estimator of the figures, by its name; each has noise of its own."""
    if model.config.autoregressive:
        return {"autoregressive": settings}
    return {
        "exact_count": dataclasses.replace(settings, estimator="exact_count"),
        "iid": dataclasses.replace(settings, estimator="iid", seed=settings.seed + 1),
    }


def score_texts(
    model: LoadedModel,
    windows: Sequence[Sequence[Pair]],
    ids: Sequence[Sequence[int]],
    settings: Mapping[str, LikelihoodConfig],
) -> list[dict[str, Any]]:
    """Return the `Total` of each estimator for each text, and "forwards", in JSON types.

    Args:
      model: the model.
      windows: the (prefix, target) pairs of each text.
      ids: an integer for each pair, which keys its noise.
      settings: those of each estimator by its name.
    """
    pairs, keys = [pair for text in windows for pair in text], [i for text in ids for i in text]
    records: list[dict[str, Any]] = [{"forwards": 0} for _ in windows]
    for name, chosen in settings.items():
        with model.on_mesh():
            estimates = iter(estimate(model.params, model.config, pairs, chosen, request_ids=keys))
        for record, text in zip(records, windows, strict=True):
            results = [next(estimates) for _ in text]
            record[name] = list(Total.of(results))
            record["forwards"] += sum(result.nfe for result in results)
    return records


def estimators_agree(records: Sequence[Mapping[str, Any]], tokens: int) -> Finding:
    """Compare the two random estimators, which have the same expectation and nothing else in common."""
    if "iid" not in records[0]:
        return not_applicable("The likelihood of an autoregressive model is exact: there is nothing to estimate.")
    first, second = total(records, "exact_count"), total(records, "iid")
    difference = first + Total(-second.nats, second.variance, second.quartic)
    return judge(
        abs(difference.nats) / tokens,
        difference.reach(AGREEMENT) / tokens,
        "The distance, in nats a token, of the bound by masking an exact number of tokens from that by masking each "
        f"with a probability, with other noise; more than is allowed would come once in {1 / AGREEMENT:,.0f} times.",
    )
