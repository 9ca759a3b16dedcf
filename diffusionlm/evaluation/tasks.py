"""The tasks that a model can be evaluated on.

A further task is one function and its entry in `TASKS`: it takes a loaded model, and its other parameters are typed,
named and documented, which makes them the options of `diffusionlm evaluate CHECKPOINT TASK`.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from diffusionlm.data import items, sources
from diffusionlm.errors import UserError, suggest
from diffusionlm.evaluation.stories import SENTENCES, Row, Stories, Story, encode_story
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.options import SETTINGS
from diffusionlm.pretrained.model import LoadedModel, load
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import infill
from diffusionlm.scalars import native, whole


class Metric(NamedTuple):
    """A figure with its standard error, which is None if the data are too few for one."""

    value: float
    stderr: float | None = 0.0


@dataclass(frozen=True)
class Result:
    """The outcome of a task.

    Attributes:
      metrics: figures and counts by name.
      config: the settings that gave them, in JSON types.
      examples: what the model wrote, if it was asked for.
    """

    metrics: dict[str, Metric]
    config: dict[str, Any]
    examples: list[dict[str, str]] | None = None

    def to_json(self, task: str) -> dict[str, Any]:
        """Return {"task", "metrics": {name: {"value", "stderr"}}, "config"}, and "examples" if there are any."""
        metrics = {name: metric._asdict() for name, metric in self.metrics.items()}
        values = {"task": task, "metrics": metrics, "config": self.config}
        return values if self.examples is None else values | {"examples": self.examples}


def perplexity(
    model: LoadedModel,
    *,
    data: str,
    field: str = "text",
    limit: int | None = None,
    stride: int | None = None,
    settings: Annotated[LikelihoodConfig, *SETTINGS] = LikelihoodConfig(),  # noqa: B008
) -> Result:
    """Score texts: nats per token and bits per byte.

    All nats together are divided by all scored tokens; every document begins with the model's start token, which is not
    scored. For a masked diffusion model the figure is an upper bound, and the standard errors are those of its estimate
    for these texts; 0 where it is exact. The metrics are nats_per_token, perplexity, bits_per_byte, tokens, bytes and
    documents.

    Args:
      model: the model to evaluate.
      data: a .txt file (a document), a .jsonl file (a document a line), or a directory or pattern of such.
      field: the field of a line's object that holds the text.
      limit: the number of documents to score, the first ones; None: all.
      stride: tokens that a window scores at a time in documents longer than the context; None: half the context.
      settings: the settings of the likelihoods.

    Raises:
      UserError: any of `LoadedModel.perplexity`, no such file, a malformed line, or no text.
    """
    limit, stride = _checked_limit(limit), native(stride)
    texts = _read_texts(model, data, field, limit)
    scores = model.perplexity(texts, settings, stride=stride)
    n, n_bytes = sum(scores.tokens), sum(scores.n_bytes or [])
    stderr = scores.estimate_stderr
    metrics = {
        "nats_per_token": Metric(scores.nats_per_token, stderr / n),
        "perplexity": Metric(scores.perplexity, scores.perplexity * stderr / n),
        "bits_per_byte": Metric(scores.nats / math.log(2) / n_bytes, stderr / math.log(2) / n_bytes),
        "tokens": Metric(n),
        "bytes": Metric(n_bytes),
        "documents": Metric(len(texts)),
    }
    config = {"data": data, "field": field, "limit": limit, "stride": stride} | dataclasses.asdict(settings)
    return Result(metrics, config)


def _read_texts(model: LoadedModel, data: str, field: str, limit: int | None) -> list[str]:
    """Return the texts that are not empty; `UserError` if there are none, or for one that holds the mask's token."""
    model.require_tokenizer()
    texts, mask_id = [], model.config.mask_id
    in_vocabulary = mask_id is not None and mask_id < model.config.model.vocab_size  # else no text holds it
    for item in _source(data, field):
        if len(texts) == limit:
            break
        try:
            text = items.text_of(item, field)
        except ValueError as error:
            raise UserError(f"{item.location}: {error}") from error
        if text and in_vocabulary and mask_id in model.encode(text):
            raise UserError(
                f"{item.location} has the token {mask_id}, which stands for masks in this model, so that it can be "
                "neither read nor scored; leave that document out"
            )
        if text:
            texts.append(text)
    if not texts:
        raise UserError(f"data={data!r} holds no text; there is nothing to score")
    return texts


def infilling(
    model: LoadedModel,
    *,
    data: str,
    field: str = "text",
    limit: int | None = None,
    examples: int = 0,
    batch_size: int = 16,
    sampling: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(),  # noqa: B008
) -> Result:
    """Fill in the middle sentence of stories, as DiffuLLaMA was evaluated on ROCStories (arXiv 2410.17891).

    The number of tokens of the middle is given, as in the paper, and EOS is not drawn. A masked diffusion model sees
    the text on both sides; an autoregressive one, the paper's baseline, sees the text before and writes as many tokens.
    The metrics are rouge1, rouge2 and rougeL (F1, without stemming) and exact_match (but for white space around), means
    over the stories with their standard errors, and counts: stories, too_short ones and those too_long for the model,
    which are left out.

    Args:
      model: the model to evaluate.
      data: a .jsonl file whose lines have "before", "middle" and "after", or a whole story as "text": of its first five
        sentences, the third is the middle.
      field: the field of a line's object that holds a whole story.
      limit: the number of stories to fill in, the first ones; None: all.
      examples: the number of filled stories to show, the first ones.
      batch_size: stories at a time; the noise of a story does not depend on it.
      sampling: the settings; length is ignored, and steps, if unset, is the longest middle's tokens.

    Raises:
      UserError: any of `diffusionlm.sampling.generate.infill`, no such file, a malformed line, no story that is long
        enough and fits, or the package `rouge-score` is missing.
    """
    limit, batch_size = _checked_limit(limit), whole("batch_size", batch_size, 1)
    examples = whole("examples", examples, 0, "not be negative")
    model.require_tokenizer()
    score = _rouge()
    chosen, rows, skipped = _read_stories(model, data, field, limit)
    resolved = model.sampling_config(sampling, length=max(len(row.middle) for row in rows))
    if not model.config.autoregressive:  # else a story's steps would be those of the longest in its batch
        sampling = dataclasses.replace(sampling, steps=resolved.steps)
    fills = _fill(model, rows, sampling, batch_size)
    scores = [score(story.middle, fill) for story, fill in zip(chosen, fills, strict=True)]
    metrics = {name: _mean([values[name] for values in scores]) for name in scores[0]}
    counts = {"stories": len(rows), **skipped}
    shown = [story._asdict() | {"fill": fill} for story, fill in zip(chosen, fills, strict=True)][:examples]
    return Result(
        metrics | {name: Metric(count) for name, count in counts.items()},
        {"data": data, "field": field, "limit": limit, "batch_size": batch_size} | dataclasses.asdict(resolved),
        shown if examples else None,
    )


def _read_stories(
    model: LoadedModel, data: str, field: str, limit: int | None
) -> tuple[list[Story], list[Row], dict[str, int]]:
    """Return the stories that can be filled in, their tokens, and the numbers of stories that were left out."""
    tokenizer = model.require_tokenizer()
    source, sizes, start = Stories(_source(data, field), field), tokenizer.token_bytes(), model.encode("")
    chosen, rows, too_long = [], [], 0
    for story in source:
        if len(rows) == limit:
            break
        story, row = encode_story(story, tokenizer, sizes)
        if len(start) + sum(map(len, row)) > model.config.max_length:
            too_long += 1
            continue
        chosen.append(story)
        rows.append(row._replace(before=start + row.before))
    if not rows:
        raise UserError(
            f"data={data!r} has no story to fill in: {source.too_short} have fewer than {SENTENCES} sentences, "
            f"{too_long} are longer than the model's context of {model.config.max_length}"
        )
    return chosen, rows, {"too_short": source.too_short, "too_long": too_long}


TASKS: dict[str, Callable[..., Result]] = {"perplexity": perplexity, "infilling": infilling}


def get(name: str) -> Callable[..., Result]:
    """Return the task of that name; raise `UserError` for an unknown one."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}{suggest(name, TASKS)}")
    return TASKS[name]


def evaluate(checkpoint: str | LoadedModel, task: str, **options: Any) -> Result:
    """Evaluate a model on a task.

    Args:
      checkpoint: the path of the checkpoint, or the loaded model.
      task: a key of `TASKS`.
      **options: the task's parameters, e.g. `data="stories.jsonl", limit=100`.

    Raises:
      UserError: an unknown task or option, a missing one, or any of the task.
    """
    function = get(task)
    known = list(inspect.signature(function).parameters)[1:]
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"unknown option {unknown[0]!r} of the task {task}{suggest(unknown[0], known)}")
    if "data" not in options:
        raise UserError(f"the task {task} needs data, a file")
    return function(checkpoint if isinstance(checkpoint, LoadedModel) else load(checkpoint), **options)


def _fill(model: LoadedModel, rows: Sequence[Row], sampling: SamplingConfig, batch_size: int) -> list[str]:
    """Return what the model writes for the middle of each row, in order."""
    one_sided = model.config.autoregressive
    # Text continues after the gap, so no text ends in it.
    cfg = dataclasses.replace(model.config, suppressed_ids=(*model.config.suppressed_ids, *model.config.eos_ids))
    templates = [[*row.before, *[None] * len(row.middle), *([] if one_sided else row.after)] for row in rows]
    order = sorted(range(len(rows)), key=lambda r: len(templates[r]))  # rows of similar lengths share a program
    fills = [""] * len(rows)
    for k in range(0, len(order), batch_size):
        batch = order[k : k + batch_size]
        full = batch + batch[-1:] * (min(batch_size, len(order)) - len(batch))  # so does the last, smaller batch
        with model.on_mesh():
            filled = infill(model.params, cfg, [templates[r] for r in full], sampling, row_ids=full)
        for r, ids in zip(batch, filled.rows, strict=False):
            first, n = len(rows[r].before), len(rows[r].middle)
            fills[r] = model.decode_after(rows[r].before, ids[first : first + n])
    return fills


def _rouge() -> Callable[[str, str], dict[str, float]]:
    """Return a function of the true and the new text that gives all scores of one story."""
    try:
        from rouge_score.rouge_scorer import RougeScorer  # here, because only this task needs it
    except ImportError as error:
        raise UserError("infilling needs the package rouge-score: pip install 'diffusionlm[eval]'") from error
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names)

    def score(gold: str, fill: str) -> dict[str, float]:
        scores = scorer.score(gold, fill)
        return {name: scores[name].fmeasure for name in names} | {"exact_match": float(gold.strip() == fill.strip())}

    return score


def _mean(values: Sequence[float]) -> Metric:
    """Return the mean with its standard error over independent values, which takes at least two."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Metric(mean, None)
    return Metric(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n))


def _source(data: str, field: str) -> sources.Source:
    splits = sources.resolve(data, field)
    return splits.get("validation", splits["train"])  # corpora bring a split of their own


def _checked_limit(limit: int | None) -> int | None:
    return None if limit is None else whole("limit", limit, 1, "be at least 1, or be left out for all")
