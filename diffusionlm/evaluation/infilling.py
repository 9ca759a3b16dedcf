"""The task `infilling`: the middle sentence of stories."""

from collections.abc import Callable
from typing import Annotated

from diffusionlm.errors import UserError, missing_package
from diffusionlm.evaluation import gaps
from diffusionlm.evaluation.results import Metric, Result, means
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.evaluation.stories import SENTENCES, Row, Stories, Story, encode_story
from diffusionlm.evaluation.texts import checked_limit, source
from diffusionlm.options import SETTINGS
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig
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
      sampling: the settings; leave out length, which is that of each middle; steps, if unset, are its tokens.

    Raises:
      UserError: any of `diffusionlm.sampling.generate.infill`, no such file, a malformed line, no story that is long
        enough and fits, or the package `rouge-score` is missing.
    """
    model, limit, batch_size = session.model, checked_limit(limit), whole("batch_size", batch_size, 1)
    examples = whole("examples", examples, 0, "not be negative")
    model.require_tokenizer()
    score = _rouge()
    stories, rows, skipped = _read_stories(model, data, field, limit)
    sampling = gaps.settings(model, rows, sampling, "infilling")  # before anything is computed

    def fill(batch: list[int]) -> list[Record]:
        filled = gaps.fill_middles(model, rows, batch, sampling)
        return [
            {"fill": text, "forwards": nfe} | score(stories[r].middle, text)
            for r, (text, nfe) in zip(batch, filled, strict=True)
        ]

    order = gaps.order(model, rows, sampling)
    records = session.evaluate("fill in stories", [list(story) for story in stories], fill, batch_size, order)
    counts = {"stories": len(rows), **skipped}
    shown = [story._asdict() | {"fill": record["fill"]} for story, record in zip(stories, records, strict=True)]
    metrics = means(records, SCORES) | {name: Metric(count) for name, count in counts.items()}
    config = {"data": data, "field": field, "limit": limit, "batch_size": batch_size}
    return gaps.result(model, metrics, records, config, sampling, shown[:examples])


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


def _rouge() -> Callable[[str, str], Record]:
    """Return a function of the true and the new text that gives all scores of one story."""
    try:
        from rouge_score.rouge_scorer import RougeScorer  # here, because only this task needs it
    except ImportError as error:
        raise missing_package("infilling", "rouge-score", "eval") from error
    names = [name for name in SCORES if name.startswith("rouge")]
    scorer = RougeScorer(names)

    def score(gold: str, fill: str) -> Record:
        scores = scorer.score(gold, fill)
        return {name: scores[name].fmeasure for name in names} | {"exact_match": gold.strip() == fill.strip()}

    return score
