"""Measure how much texts repeat each other and themselves: pure functions of their tokens."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from diffusionlm.evaluation.graders import bleu
from diffusionlm.evaluation.results import Metric


def ngrams(tokens: Sequence, n: int) -> list[tuple]:
    """Return the runs of n tokens of a text."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def unigram_entropy(tokens: Sequence) -> float:
    """Return the entropy of the tokens of one text, in nats: 0 for one token repeated, log n for n different ones.

    Dieleman et al. (2022) and later papers on diffusion models of text report that of the tokens of their vocabularies
    beside the generative perplexity; the task `generative` takes words and signs, as models may have other tokenizers.
    """
    counts = Counter(tokens)
    total = sum(counts.values())
    return -math.fsum(count / total * math.log(count / total) for count in counts.values())


def distinct(texts: Sequence[Sequence], n: int) -> Metric:
    """Return the share of different n-grams among all of several texts (Li et al., 2016), with its jackknife error.

    The share falls as the texts become more or longer, so compare equal numbers of texts of equal lengths.
    """
    counted = [Counter(ngrams(tokens, n)) for tokens in texts]
    every: Counter = sum(counted, Counter())
    total = sum(every.values())
    if not total:
        return Metric(0.0, None)
    without = []
    for counts in counted:
        left = total - sum(counts.values())
        gone = sum(every[gram] == count for gram, count in counts.items())
        without.append((len(every) - gone) / left if left else None)
    return Metric(len(every) / total, _jackknife(without))


def self_bleu(texts: Sequence[Sequence[str]]) -> list[float]:
    """Return for each text its BLEU for all others (Zhu et al., 2018): 1 where it repeats one of them."""
    return [bleu(tokens, [*texts[:i], *texts[i + 1 :]]) for i, tokens in enumerate(texts)]


def ratio(tops: Sequence[float], bottoms: Sequence[float], function: Callable[[float], float] = float) -> Metric:
    """Return a function of a ratio of sums over texts, with its jackknife error.

    Args:
      tops: what is divided, of each text.
      bottoms: what it is divided by, of each text; not 0 in sum.
      function: applied to the ratio.
    """
    top, bottom = math.fsum(tops), math.fsum(bottoms)
    without = [
        function((top - one) / (bottom - other)) if bottom > other else None
        for one, other in zip(tops, bottoms, strict=True)
    ]
    return Metric(function(top / bottom), _jackknife(without))


def _jackknife(without: Sequence[float | None]) -> float | None:
    """Return the standard error of a figure from its values without one text each (Efron and Stein, 1981)."""
    values = [value for value in without if value is not None]
    if len(values) < 2 or len(values) < len(without):
        return None
    average = math.fsum(values) / len(values)
    return math.sqrt((len(values) - 1) / len(values) * math.fsum((value - average) ** 2 for value in values))
