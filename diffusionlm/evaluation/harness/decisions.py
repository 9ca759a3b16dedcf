"""The effect of the noise of likelihood estimates on multiple-choice decisions and on the figures made of them.

The estimates of a document's choices are independent, and each is a mean over passes, so it is taken as normal around
its expectation with its own standard error. With new noise, the winner of a document would be another with a
probability that follows from these alone.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special  # JAX has it loaded; scipy.stats would slow down every start

from diffusionlm.likelihood.monte_carlo import Estimate

POINTS = 1000  # of the quadrature; its error is below one in this many
LEVEL = 0.05


def scaled(estimates: Sequence[Estimate], lengths: Sequence[int] | None = None) -> list[Estimate]:
    """Return estimates per unit of length, as `acc_norm` and `acc_bytes` compare them; None: as they are."""
    if lengths is None:
        return list(estimates)
    pairs = zip(estimates, lengths, strict=True)
    return [Estimate(e.log_likelihood / n, e.stderr / n, e.passes, e.nfe) for e, n in pairs]


def win_probabilities(estimates: Sequence[Estimate]) -> np.ndarray:
    """Return the probability that each choice would come out as the likeliest with new noise, float64 (C,).

    That of choice i is the integral over x of its normal density times the probability that all others lie below x;
    it is taken at the midpoints of intervals of equal probability. Of equal exact values the first wins.
    """
    mean_C = np.array([estimate.log_likelihood for estimate in estimates])
    stderr_C = np.array([estimate.stderr for estimate in estimates])
    z_P = special.ndtri((np.arange(POINTS) + 0.5) / POINTS)
    wins_C = np.empty(len(estimates))
    for i in range(len(estimates)):
        x_Px1 = (mean_C[i] + (stderr_C[i] * z_P if stderr_C[i] else np.zeros(1)))[:, None]
        others = np.arange(len(estimates)) != i
        lead_PxO = x_Px1 - mean_C[others]
        noisy_O = stderr_C[others] > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            below_PxO = special.ndtr(lead_PxO / stderr_C[others])
        first_O = np.nonzero(others)[0] > i
        exact_PxO = (lead_PxO > 0) | ((lead_PxO == 0) & first_O)
        wins_C[i] = np.where(noisy_O, below_PxO, exact_PxO).prod(axis=1).mean()
    return wins_C


def accuracy_variance(estimates: Sequence[Estimate], gold: Collection[int]) -> float:
    """Return the variance of the accuracy of one document, p (1 - p), that comes from the noise of its estimates.

    p is the probability that one of the right choices wins. At the plug-in estimates of the means its mean over
    documents is right where their margins are spread wider than the noise. If all choices are equally likely it is too
    small, for two choices by a third (1/6 instead of 1/4), because the estimates have drifted apart already.

    Args:
      estimates: those of the choices.
      gold: the indices of the right ones.
    """
    wins_C = win_probabilities(estimates)
    p = math.fsum(wins_C[i] for i in gold if 0 <= i < len(wins_C))
    return max(0.0, p * (1.0 - p))


def is_undecided(estimates: Sequence[Estimate], level: float = LEVEL) -> bool:
    """Return True unless the likeliest choice leads every other one significantly, so that more draws could turn it.

    Each lead is tested with Welch's t, one-sided, at `level` over the number of rivals (Bonferroni).
    """
    best = max(range(len(estimates)), key=lambda i: estimates[i].log_likelihood)
    rivals = [estimate for i, estimate in enumerate(estimates) if i != best]
    return any(_tail(estimates[best], rival) > level / len(rivals) for rival in rivals)


def _tail(leader: Estimate, rival: Estimate) -> float:
    """Return the p-value of the leader's lead over a rival; 0 where both are exact."""
    variances = (leader.stderr**2, rival.stderr**2)
    if not sum(variances):
        return 0.0
    t = (leader.log_likelihood - rival.log_likelihood) / math.sqrt(sum(variances))
    pairs = zip(variances, (leader, rival), strict=True)
    freedom = sum(variances) ** 2 / math.fsum(v**2 / (e.passes - 1) for v, e in pairs if v)
    return float(special.stdtr(freedom, -t))


def choice_metrics(
    estimates: Sequence[Estimate], gold: Sequence[int], lengths: Mapping[str, Sequence[int] | None]
) -> dict[str, Any]:
    """Return the figures of one document with choices, with the part of their errors that is Monte Carlo noise.

    Args:
      estimates: the log-likelihood of each choice.
      gold: the indices of the right choices.
      lengths: for each metric, what the log-likelihoods are divided by; None: nothing.

    Returns:
      Each metric with the variance of its noise, `undecided` (1 if the decision of one of the metrics is), and
      `stderr_of_ll`.
    """
    metrics: dict[str, Any] = {}
    undecided = False
    for name, units in lengths.items():
        compared = scaled(estimates, units)
        best = max(range(len(compared)), key=lambda i: compared[i].log_likelihood)
        metrics[name] = float(best in gold)
        metrics[f"mc_stderr_of_{name}"] = accuracy_variance(compared, gold)
        undecided |= is_undecided(compared)
    metrics["undecided"] = float(undecided)
    return metrics | {"stderr_of_ll": [estimate.stderr for estimate in estimates]}


def mc_stderr(variances: Sequence[float]) -> float:
    """Aggregate the variances of documents to the Monte Carlo standard error of their mean."""
    return math.sqrt(math.fsum(variances)) / len(variances)


def perplexity_stderr(log_likelihoods: Sequence[Estimate], units: float) -> float:
    """Return the Monte Carlo standard error of exp(-sum of log-likelihoods / units), by the delta method."""
    total = math.fsum(estimate.log_likelihood for estimate in log_likelihoods)
    stderr = math.sqrt(math.fsum(estimate.stderr**2 for estimate in log_likelihoods)) / units
    return math.exp(-total / units) * stderr
