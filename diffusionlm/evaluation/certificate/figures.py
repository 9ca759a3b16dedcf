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

# Two estimates of one bound are said to disagree beyond the reach of the chance `NOMINAL`. Passes are skewed, the more
# so the fewer tokens or draws they have, and Student's t then misses more often than it says: in the simulations of
# tests/evaluation/certificate/test_agreement.py up to seven times. So the rate that is stated is ten times as high, and
# texts of fewer tokens, on which it does not hold, are left out.
NOMINAL, STATED, SHORTEST = 1e-4, 1e-3, 8
LEAST_DRAWS = 4  # of a pass whose draws are compared with others


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
    """Return the settings of each estimate of the figures, by its name; each has noise of its own.

    The last is the first one with a quarter of the draws or, where that would be too few, with four times as many. It
    is not there if the draws themselves are too few.
    """
    if model.config.autoregressive:
        return {"autoregressive": settings}
    exact_count = dataclasses.replace(settings, estimator="exact_count")
    chosen = {
        "exact_count": exact_count,
        "iid": dataclasses.replace(settings, estimator="iid", seed=settings.seed + 1),
    }
    if settings.draws >= LEAST_DRAWS:
        draws = settings.draws // 4 if settings.draws >= 4 * LEAST_DRAWS else 4 * settings.draws
        chosen["other_draws"] = dataclasses.replace(exact_count, draws=draws, seed=settings.seed + 2)
    return chosen


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


def estimators_agree(records: Sequence[Mapping[str, Any]], tokens: Sequence[int]) -> Finding:
    """Compare the two random estimators, which have the same expectation and nothing else in common.

    Args:
      records: those of `score_texts`.
      tokens: the scored tokens of each text.
    """
    return _compare(
        records,
        tokens,
        "iid",
        "the bound by masking an exact number of tokens from the bound by masking each token by chance",
    )


def draws_agree(records: Sequence[Mapping[str, Any]], tokens: Sequence[int]) -> Finding:
    """Compare two disjoint sets of draws of one estimator, of which one has four times as many draws in a pass.

    Args:
      records: those of `score_texts`.
      tokens: the scored tokens of each text.
    """
    return _compare(
        records,
        tokens,
        "other_draws",
        "the bound from the bound by other draws, of which a pass has a quarter or four times as many",
    )


def _compare(records: Sequence[Mapping[str, Any]], tokens: Sequence[int], name: str, what: str) -> Finding:
    """Compare an estimate of all texts with that of masking an exact number of tokens."""
    if "autoregressive" in records[0]:
        return not_applicable("The likelihood of an autoregressive model is exact: there is nothing to estimate.")
    if name not in records[0]:
        return not_applicable(f"A pass of fewer than {LEAST_DRAWS} draws scatters too unevenly; give more --draws.")
    long = [i for i, n in enumerate(tokens) if n >= SHORTEST]
    if not long:
        return not_applicable(f"No text has {SHORTEST} tokens to score; of fewer, estimates scatter too unevenly.")
    own, other = (total([records[i] for i in long], each) for each in ("exact_count", name))
    difference = own + Total(-other.nats, other.variance, other.quartic)
    n = sum(tokens[i] for i in long)
    return judge(
        abs(difference.nats) / n,
        difference.reach(NOMINAL) / n,
        f"The distance, in nats a token, of {what}. It is noise, and exceeds what is allowed at most once in "
        f"{1 / STATED:,.0f} times, if both are right.",
    )
