"""The names that our task files use: data, figures, aggregations. Importing this module registers the model class."""

import ast
import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusionlm.evaluation.harness import decisions
from diffusionlm.evaluation.harness.decisions import choice_metrics, mc_stderr
from diffusionlm.evaluation.harness.local_data import load
from diffusionlm.evaluation.harness.model import DiffusionLM, Estimated
from diffusionlm.likelihood.monte_carlo import Estimate

__all__ = [
    "DiffusionLM",
    "choices_and_lengths",
    "completed_program",
    "greedy_word",
    "load",
    "mc_stderr",
    "perplexity_mc_stderr",
    "root_mean_square",
    "single_choice",
]


def estimate_of(value: float) -> Estimate:
    """Return the estimate behind a log-likelihood; one of another model class counts as exact."""
    return value.estimate if isinstance(value, Estimated) else Estimate(float(value), 0.0, 1, 0)


def choices_and_lengths(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Return `acc` and `acc_norm`, which divides by characters, of a document with `choices` and `gold`."""
    estimates = [estimate_of(value) for value, _ in results]
    lengths = {"acc": None, "acc_norm": [len(choice) for choice in doc["choices"]]}
    return choice_metrics(estimates, [doc["gold"]], lengths)


def single_choice(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Return `acc` of a document with `gold`, whose choices cannot be compared by length."""
    return choice_metrics([estimate_of(value) for value, _ in results], [doc["gold"]], {"acc": None})


def greedy_word(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Return `perplexity` and `acc` of a document with one continuation, as the harness defines them."""
    ((value, greedy),) = results
    estimate = estimate_of(value)
    pair = (estimate.log_likelihood, estimate.stderr)
    return {
        "perplexity": float(value),
        "acc": int(greedy),
        "mc_stderr_of_perplexity": pair,
        "stderr_of_ll": [estimate.stderr],
    }


def completed_program(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Return whether a program that a model has completed can be parsed; it is not run."""
    (completion,) = results
    try:
        ast.parse(doc["head"] + completion)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {"parses": 0.0}
    return {"parses": 1.0}


def perplexity_mc_stderr(pairs: Sequence[tuple[float, float]]) -> float:
    """Aggregate log-likelihoods with their standard errors to the Monte Carlo standard error of the perplexity."""
    return decisions.perplexity_stderr([Estimate(ll, stderr, 1, 0) for ll, stderr in pairs], len(pairs))


def root_mean_square(lists: Sequence[Sequence[float]]) -> float:
    """Aggregate the standard errors of all log-likelihoods."""
    values = [value for part in lists for value in part]
    return math.sqrt(math.fsum(value**2 for value in values) / len(values))
