"""The names that our task files use: data, figures, aggregations. Importing this module registers the model class."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.task import ConfigurableTask  # pyright: ignore[reportMissingImports]

from diffusionlm.evaluation import code, sandbox
from diffusionlm.evaluation.harness import decisions
from diffusionlm.evaluation.harness.decisions import choice_metrics, mc_stderr
from diffusionlm.evaluation.harness.local_data import load
from diffusionlm.evaluation.harness.model import DiffusionLM, Estimated
from diffusionlm.evaluation.judging import assertion_trial, function_trial, is_out_of_time, judge
from diffusionlm.evaluation.sandbox.run import Sandbox
from diffusionlm.likelihood.monte_carlo import Estimate

__all__ = [
    "DiffusionLM",
    "ProgramTask",
    "choices_and_lengths",
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


class ProgramTask(ConfigurableTask):
    """A task whose answers are programs, each of which is run with the tests of its document.

    The sandbox is looked for when the task is loaded, before anything is generated. The metadata of the harness may say
    allow_code_execution=True, for machines where no sandbox works.

    Attributes:
      place: where the programs run.
    """

    def __init__(self, config: dict[str, Any]):
        """Find a sandbox for the task of a task file.

        Args:
          config: what the file says, with the metadata of the harness.

        Raises:
          UserError: no sandbox works, and running programs without one is not allowed.
        """
        allowed = (config.get("metadata") or {}).get("allow_code_execution") is True
        self.place = sandbox.find(allow_code_execution=allowed)
        known = {name: value for name, value in config.items() if name != "class"}
        super().__init__(config=known | {"process_results": functools.partial(judged_program, self.place)})


def judged_program(place: Sandbox, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return `pass_at_1` and `out_of_time` of a program: the end of a function of HumanEval, or an answer to MBPP."""
    (completion,) = results
    if "entry_point" in doc:
        trial = function_trial(doc["prompt"], doc["entry_point"], doc["test"])
        solution = doc["prompt"] + completion
    else:
        trial = assertion_trial(doc["code"], doc["test_setup_code"], doc["test_list"])
        solution = code.first_block(completion)
    record = judge(place, trial, solution)
    return {"pass_at_1": float(record["pass_at_1"]), "out_of_time": float(is_out_of_time(record))}


def perplexity_mc_stderr(pairs: Sequence[tuple[float, float]]) -> float:
    """Aggregate log-likelihoods with their standard errors to the Monte Carlo standard error of the perplexity."""
    return decisions.perplexity_stderr([Estimate(ll, stderr, 1, 0) for ll, stderr in pairs], len(pairs))


def root_mean_square(lists: Sequence[Sequence[float]]) -> float:
    """Aggregate the standard errors of all log-likelihoods."""
    values = [value for part in lists for value in part]
    return math.sqrt(math.fsum(value**2 for value in values) / len(values))
