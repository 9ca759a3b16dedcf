"""The task `infilling`: the middle sentence of stories."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated

from diffusionlm.errors import UserError, missing_package
from diffusionlm.evaluation.results import Metric, Result, means
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.evaluation.stories import SENTENCES, Row, Stories, Story, encode_story
from diffusionlm.evaluation.texts import checked_limit, source
from diffusionlm.options import SETTINGS
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import infill
from diffusionlm.scalars import whole

SCORES = ("rouge1", "rouge2", "rougeL", "exact_match")


def infilling(
    session: Session,
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
      session: the model to evaluate.
      data: a .jsonl file whose lines have "before", "middle" and "after", or a whole story as "text": of its first five
        sentences, the third is the middle.
      field: the field of a line's object that holds a whole story.
      limit: the number of stories to read, the first ones; None: all.
      examples: the number of filled stories to show, the first ones.
      batch_size: stories at a time; the noise of a story does not depend on it.
      sampling: the settings; length is ignored, and steps, if unset, is the longest middle's tokens.

    Raises:
      UserError: any of `diffusionlm.sampling.generate.infill`, no such file, a malformed line, no story that is long
        enough and fits, or the package `rouge-score` is missing.
    """
    model, limit, batch_size = session.model, checked_limit(limit), whole("batch_size", batch_size, 1)
    examples = whole("examples", examples, 0, "not be negative")
    model.require_tokenizer()
    score = _rouge()
    stories, rows, skipped = _read_stories(model, data, field, limit)
    resolved = model.sampling_config(sampling, length=max(len(row.middle) for row in rows))
    if not model.config.autoregressive:  # else a story's steps would be those of the longest in its batch
        sampling = dataclasses.replace(sampling, steps=resolved.steps)

    def fill(batch: list[int]) -> list[Record]:
        filled = fill_middles(model, [rows[r] for r in batch], sampling, batch, min(batch_size, len(rows)))
        return [
            {"fill": text, "forwards": nfe} | score(stories[r].middle, text)
            for r, (text, nfe) in zip(batch, filled, strict=True)
        ]

    order = sorted(range(len(rows)), key=lambda r: sum(map(len, rows[r])))  # rows of similar lengths share a program
    records = session.evaluate("fill in stories", [list(story) for story in stories], fill, batch_size, order)
    counts = {"stories": len(rows), **skipped}
    shown = [story._asdict() | {"fill": record["fill"]} for story, record in zip(stories, records, strict=True)]
    return Result(
        means(records, SCORES) | {name: Metric(count) for name, count in counts.items()},
        {"data": data, "field": field, "limit": limit, "batch_size": batch_size} | dataclasses.asdict(resolved),
        shown[:examples] if examples else None,
        forwards=sum(record["forwards"] for record in records),
    )


def _read_stories(
    model: LoadedModel, data: str, field: str, limit: int | None
) -> tuple[list[Story], list[Row], dict[str, int]]:
    """Return the stories that can be filled in, their tokens, and the numbers of stories that were left out."""
    tokenizer = model.require_tokenizer()
    stories, sizes, start = Stories(source(data, field), field, limit), tokenizer.token_bytes(), model.encode("")
    chosen, rows, too_long = [], [], 0
    for story in stories:
        story, row = encode_story(story, tokenizer, sizes)
        if len(start) + sum(map(len, row)) > model.config.max_length:
            too_long += 1
            continue
        chosen.append(story)
        rows.append(row._replace(before=start + row.before))
    if not rows:
        raise UserError(
            f"data={data!r} has no story to fill in: {stories.too_short} have fewer than {SENTENCES} sentences, "
            f"{too_long} are longer than the model's context of {model.config.max_length}"
        )
    return chosen, rows, {"too_short": stories.too_short, "too_long": too_long}


def fill_middles(
    model: LoadedModel, rows: Sequence[Row], sampling: SamplingConfig, row_ids: Sequence[int], batch_size: int
) -> list[tuple[str, int]]:
    """Return what the model writes for the middle of each row, and the forward passes that it took.

    Args:
      model: the model; an autoregressive one sees the text before the middle alone.
      rows: the rows.
      sampling: the settings.
      row_ids: an integer for each row, which keys its noise.
      batch_size: the rows that the batch is filled up to, so that a smaller one shares the program of the others.
    """
    one_sided = model.config.autoregressive
    # Text continues after the gap, so no text ends in it.
    cfg = dataclasses.replace(model.config, suppressed_ids=(*model.config.suppressed_ids, *model.config.eos_ids))
    templates = [[*row.before, *[None] * len(row.middle), *([] if one_sided else row.after)] for row in rows]
    copies = max(0, batch_size - len(rows))
    ids = [*row_ids, *[row_ids[-1]] * copies]
    with model.on_mesh():
        filled = infill(model.params, cfg, templates + templates[-1:] * copies, sampling, row_ids=ids)
    middles = []
    for row, tokens, nfe in zip(rows, filled.rows, filled.nfe, strict=False):
        first, n = len(row.before), len(row.middle)
        middles.append((model.decode_after(row.before, tokens[first : first + n]), int(nfe)))
    return middles


def _rouge() -> Callable[[str, str], dict[str, float]]:
    """Return a function of the true and the new text that gives all scores of one story."""
    try:
        from rouge_score.rouge_scorer import RougeScorer  # here, because only this task needs it
    except ImportError as error:
        raise missing_package("infilling", "rouge-score", "eval") from error
    names = [name for name in SCORES if name.startswith("rouge")]
    scorer = RougeScorer(names)

    def score(gold: str, fill: str) -> dict[str, float]:
        scores = scorer.score(gold, fill)
        return {name: scores[name].fmeasure for name in names} | {"exact_match": float(gold.strip() == fill.strip())}

    return score
