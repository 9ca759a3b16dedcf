"""What `diffusionlm evaluate CHECKPOINT TASK` measures. A further task is one function and one entry in `TASKS`.

A task takes a loaded model first; its further parameters are the options of the command.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

from diffusionlm.arguments import SETTINGS
from diffusionlm.data import sources
from diffusionlm.errors import UserError
from diffusionlm.likelihood import LikelihoodConfig
from diffusionlm.registry import suggest
from diffusionlm.sampling.load import LoadedModel, load


class Metric(NamedTuple):
    """A figure and its standard error; None where it has none."""

    value: float
    stderr: float | None


@dataclasses.dataclass(frozen=True)
class Result:
    """What a task gave."""

    metrics: dict[str, Metric]
    counts: dict[str, int]  # what the metrics are over
    config: dict[str, Any]  # the settings, in JSON types


def evaluate(model: LoadedModel | str | os.PathLike, task: str, **options: Any) -> Result:
    """Measures a model.

    Args:
      model: a loaded one, or a checkpoint.
      task: a name in `TASKS`.
      **options: of the task.

    Raises:
      UserError: no such task, or as of the task or of `load`.
    """
    measure = get(task)
    return measure(model if isinstance(model, LoadedModel) else load(model), **options)


def get(task: str) -> Callable[..., Result]:
    """The task of that name; an unknown one raises `UserError` with a suggestion."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}{suggest(task, TASKS)}")
    return TASKS[task]


def perplexity(
    model: LoadedModel,
    data: str,
    limit: int | None = None,
    text_field: str = "text",
    stride: int | None = None,
    settings: Annotated[LikelihoodConfig, *SETTINGS] = LikelihoodConfig(),  # noqa: B008
) -> Result:
    """What documents cost: all nats over all scored tokens, and bits per byte.

    Of a masked diffusion model, the figures are of a bound on what they cost. Standard errors are over documents.

    Args:
      model: the model.
      data: .jsonl (a document a line) or .txt (one document), or a directory or pattern of them.
      limit: only the first so many documents; None: all.
      text_field: which field of a line of jsonl is the text.
      stride: tokens that a window scores at a time in documents longer than the context; None: half the context.
      settings: of the likelihoods of a masked diffusion model.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1; leave it out for all documents")
    settings.validate()
    texts = list(itertools.islice(_texts(data, text_field), limit))
    if not texts:
        raise UserError(f"data={data!r} holds no text")
    scored = model.perplexity(texts, settings, stride=stride)
    tokens, n_bytes = sum(scored.tokens), sum(scored.n_bytes)
    stderr = scored.stderr if len(texts) > 1 else None  # of nats

    def metric(value: float, nats: float) -> Metric:
        """`nats`: by how much the figure changes for each nat."""
        return Metric(value, None if stderr is None else stderr * nats)

    return Result(
        metrics={
            "nats_per_token": metric(scored.nats_per_token, 1 / tokens),
            "perplexity": metric(scored.perplexity, scored.perplexity / tokens),
            "bits_per_byte": metric(scored.bits_per_byte, 1 / math.log(2) / n_bytes),
        },
        counts={"documents": len(texts), "tokens": tokens, "bytes": n_bytes},
        config={"data": data, "limit": limit, "text_field": text_field, "stride": stride}
        | ({} if model.config.autoregressive else dataclasses.asdict(settings)),
    )


def _texts(data: str, text_field: str) -> Iterator[str]:
    for item in sources.resolve(data, text_field)["train"]:
        try:
            text = sources.text_of(item, text_field)
        except ValueError as error:
            raise UserError(f"{item.location}: {error}") from error
        if text:
            yield text


TASKS: dict[str, Callable[..., Result]] = {"perplexity": perplexity}
