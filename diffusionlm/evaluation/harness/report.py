"""Turn the harness' results into our metrics, and add the errors that come from Monte Carlo noise."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffusionlm.errors import UserError
from diffusionlm.evaluation.harness import decisions
from diffusionlm.evaluation.harness.decisions import choice_metrics, mc_stderr
from diffusionlm.evaluation.results import Metric
from diffusionlm.likelihood.monte_carlo import Estimate
from diffusionlm.storage import dump_numbers, run_path, write_atomically

NOISE = ("mc_stderr_of_", "undecided", "stderr_of_ll")  # begin figures of our own tasks, which are computed here


def metrics_of(outcome: Mapping[str, Any]) -> dict[str, Metric]:
    """Return the figures of a run of the harness by TASK/METRIC, with its standard errors, and the Monte Carlo errors.

    A filter's name follows a metric's where a task has several filters: TASK/exact_match,strict-match.
    """
    metrics: dict[str, Metric] = {}
    for part in ("results", "groups"):
        for task, figures in (outcome.get(part) or {}).items():
            metrics |= _harness_metrics(task, figures)
    for name, task in outcome["tasks"].items():
        metrics |= {f"{name}/{figure}": Metric(value) for figure, value in _noise(task, outcome["samples"][name])}
    return metrics


def _harness_metrics(task: str, figures: Mapping[str, Any]) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for key, value in figures.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or name.startswith(NOISE) or not isinstance(value, int | float):
            continue
        stderr = figures.get(f"{name}_stderr,{kind}")
        shown = name if kind == "none" else key
        metrics[f"{task}/{shown}"] = Metric(value, stderr if isinstance(stderr, int | float) else None)
    metrics[f"{task}/documents"] = Metric(figures.get("sample_len", 0))
    return metrics


def estimates_of(sample: Mapping[str, Any]) -> list[Estimate] | None:
    """Return the estimates behind the answers of a logged sample; None where they are no log-likelihoods."""
    estimates = []
    for responses in sample["resps"]:
        value = responses[0][0] if isinstance(responses[0], tuple) else responses[0]
        if not hasattr(value, "estimate"):
            return None
        estimates.append(value.estimate)
    return estimates


def _noise(task: Any, samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Return the Monte Carlo errors of a task's figures, by name."""
    estimates = [estimates_of(sample) for sample in samples]
    known = [some for some in estimates if some is not None]
    if not known or len(known) < len(estimates):
        return []
    squares = [estimate.stderr**2 for some in known for estimate in some]
    rms = math.sqrt(math.fsum(squares) / len(squares))
    kind = task.get_config("output_type")
    figures = task.get_config("process_results")  # of unknown meaning, unless it is ours
    if figures is not None and not getattr(figures, "__module__", "").startswith("diffusionlm."):
        return [("stderr_of_ll", rms)]
    if kind == "multiple_choice":
        return [*_choice_noise(task, samples, known), ("stderr_of_ll", rms)]
    pairs = [some[0] for some in known]
    if kind == "loglikelihood":
        return [("mc_stderr_of_perplexity", decisions.perplexity_stderr(pairs, len(pairs))), ("stderr_of_ll", rms)]
    return [*_rolling_noise(task, samples, pairs), ("stderr_of_ll", rms)]


def _choice_noise(
    task: Any, samples: Sequence[Mapping[str, Any]], estimates: Sequence[Sequence[Estimate]]
) -> list[tuple[str, float]]:
    documents = []
    for sample, some in zip(samples, estimates, strict=True):
        choices = task.doc_to_choice(sample["doc"])
        lengths = {
            "acc": None,
            "acc_norm": [len(choice) for choice in choices],
            "acc_bytes": [len(choice.encode()) for choice in choices],
        }
        counted = {name: units for name, units in lengths.items() if name in task.aggregation()}
        # Behind the choices come those of mutual information.
        documents.append(choice_metrics(some[: len(choices)], _gold(task, sample["doc"], choices), counted))
    names = sorted(name for name in documents[0] if name.startswith("mc_stderr_of_"))
    errors = [(name, mc_stderr([document[name] for document in documents])) for name in names]
    return [*errors, ("undecided", math.fsum(document["undecided"] for document in documents) / len(documents))]


def _gold(task: Any, doc: Any, choices: Sequence[str]) -> list[int]:
    """Return the indices of the right choices, as the harness finds them."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    golds = gold if isinstance(gold, list) else [gold]
    return [_index(choices, value) if isinstance(value, str) else int(value) for value in golds]


def _index(choices: Sequence[str], value: str) -> int:
    return list(choices).index(value) if value in choices else -1


def _rolling_noise(
    task: Any, samples: Sequence[Mapping[str, Any]], estimates: Sequence[Estimate]
) -> list[tuple[str, float]]:
    texts = [task.doc_to_target(sample["doc"]) for sample in samples]
    counts = {"word_perplexity": task.count_words, "byte_perplexity": task.count_bytes}
    noise = []
    for name, count in counts.items():
        if name in task.aggregation():
            noise.append((f"mc_stderr_of_{name}", decisions.perplexity_stderr(estimates, sum(map(count, texts)))))
    if "bits_per_byte" in task.aggregation():
        stderr = math.sqrt(math.fsum(estimate.stderr**2 for estimate in estimates))
        noise.append(("mc_stderr_of_bits_per_byte", stderr / math.log(2) / sum(map(task.count_bytes, texts))))
    return noise


def item_values(outcome: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the value of each document by its hash, by the metric's name of `metrics_of`."""
    values: dict[str, dict[str, float]] = {}
    for name in outcome["tasks"]:
        for sample in outcome["samples"][name]:
            kind = sample.get("filter", "none")
            document = f"{sample['doc_id']}-{sample['doc_hash'][:16]}"
            for metric in sample.get("metrics", ()):
                shown = metric if kind == "none" else f"{metric},{kind}"
                if isinstance(value := sample.get(metric), int | float):
                    values.setdefault(f"{name}/{shown}", {})[document] = float(value)
    return values


def save_samples(directory: str, outcome: Mapping[str, Any]) -> None:
    """Write DIRECTORY/samples_TASK.jsonl for each task: the harness' samples, with the error of each log-likelihood.

    Raises:
      UserError: the directory cannot be made.
    """
    folder = run_path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"samples={directory} cannot be made: {error}") from error
    for name in outcome["tasks"]:
        lines = [dump_numbers(_line(sample)) for sample in outcome["samples"][name]]
        write_atomically(folder / f"samples_{name}.jsonl", "".join(f"{line}\n" for line in lines))


def _line(sample: Mapping[str, Any]) -> dict[str, Any]:
    line = json.loads(json.dumps(dict(sample), default=str))
    if (estimates := estimates_of(sample)) is not None:
        line["stderr_of_ll"] = [estimate.stderr for estimate in estimates]
        line["passes"] = [estimate.passes for estimate in estimates]
    return line
