"""The task `lambada`: the last word of passages."""

import itertools
from collections.abc import Iterator
from typing import Annotated

from diffusionlm.data.items import Item, checked_text, lacks_field, text_of
from diffusionlm.errors import UserError
from diffusionlm.evaluation import gaps
from diffusionlm.evaluation.records import record_of
from diffusionlm.evaluation.results import Metric, Result, means
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.evaluation.stories import Row, Story, encode_story
from diffusionlm.evaluation.texts import checked_limit, source
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.greedy import is_greedy, most_passes
from diffusionlm.options import SETTINGS
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.scalars import whole

SCORES = ("drawn_match", "greedy_match")


def lambada(
    session: Session,
    *,
    data: str,
    limit: int | None = None,
    examples: int = 0,
    batch_size: int = 32,
    sampling: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(),  # noqa: B008
) -> Result:
    """Write the last word of passages of LAMBADA (Paperno et al., 2016), whose number of tokens is given.

    The metrics are means over the passages with their standard errors: drawn_match (as many tokens as the word has are
    drawn after the passage, by `sampling`, and are the word, as DiffuLLaMA was evaluated, arXiv 2410.17891) and
    greedy_match (so are the most probable ones, highest confidence first, as SMDM was, arXiv 2410.18514); and counts:
    passages, and those too_long for the model, which are left out.

    Args:
      session: the model to evaluate.
      data: a .jsonl file whose lines have "context" and "continuation", or a whole passage as "text", or a .txt file
        with a passage a line: there the last word is what follows the last space, as in the published split.
      limit: the number of passages to read, the first ones; None: all.
      examples: the number of passages to show, the first ones.
      batch_size: passages at a time; the noise of a word does not depend on it.
      sampling: the settings of the draw; leave out length, which is that of each word; steps, if unset, are its tokens.

    Raises:
      UserError: any of `diffusionlm.sampling.generate.infill`, no such file, a malformed line, or no passage that fits.
    """
    model, limit = session.model, checked_limit(limit)
    batch_size = whole("batch_size", batch_size, 1)
    examples = whole("examples", examples, 0, "not be negative")
    stories, rows, too_long = _read(session, data, limit)
    sampling = gaps.settings(model, rows, sampling, "lambada")  # before anything is computed
    greedy = LikelihoodConfig(guidance=sampling.guidance)

    def write(batch: list[int]) -> list[Record]:
        drawn = gaps.fill_middles(model, rows, batch, sampling)
        with model.on_mesh():
            greedy_matches = is_greedy(model.params, model.config, [rows[r][:2] for r in batch], greedy)
        return [
            {
                "drawn": text,
                "drawn_match": text.strip() == stories[r].middle.strip(),
                "greedy_match": matches,
                "forwards": nfe + most_passes(model.config, rows[r].middle, greedy),
            }
            for r, (text, nfe), matches in zip(batch, drawn, greedy_matches, strict=True)
        ]

    items = [[story.before, story.middle] for story in stories]
    order = gaps.order(model, rows, sampling)
    records = session.evaluate("write last words", items, write, batch_size, order)
    metrics = means(records, SCORES) | {"passages": Metric(len(rows)), "too_long": Metric(too_long)}
    shown = [
        {"passage": story.before[-200:], "word": story.middle.strip()} | record
        for story, record in zip(stories[:examples], records, strict=False)
    ]
    config = {"data": data, "limit": limit, "batch_size": batch_size}
    return gaps.result(model, metrics, records, config, sampling, shown)


def _read(session: Session, data: str, limit: int | None) -> tuple[list[Story], list[Row], int]:
    """Return the passages that fit, their tokens, and the number of the others."""
    model = session.model
    tokenizer = model.require_tokenizer()
    sizes, start = tokenizer.token_bytes(), model.encode("")
    stories, rows, too_long = [], [], 0
    for before, word in itertools.islice(_passages(data), limit):
        story, row = encode_story(Story(before, " " + word, ""), tokenizer, sizes)
        if len(start) + len(row.before) + len(row.middle) > model.config.max_length:
            too_long += 1
            continue
        stories.append(story)
        rows.append(row._replace(before=start + row.before))
    if not rows:
        reason = f"{too_long} are longer than the model's context of {model.config.max_length}" if too_long else "empty"
        raise UserError(f"data={data!r} has no passage that fits: {reason}")
    return stories, rows, too_long


def _passages(data: str) -> Iterator[tuple[str, str]]:
    """Yield the passages of a file, each without its last word, and that word."""
    for item in source(data, "text"):
        try:
            yield from _lines(item) if not item.is_json else _record(item)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{item.location}: {error}") from error


def _lines(item: Item) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text_of(item, "text").splitlines(), 1):
        if line.strip():
            yield _split(line, f"{item.location}:{number}")


def _record(item: Item) -> Iterator[tuple[str, str]]:
    record = record_of(item)
    if record is None:
        return
    if "context" not in record and "text" not in record:
        raise ValueError(f"{lacks_field('text', record)}; the task reads 'context' and 'continuation', or 'text'")
    if "context" not in record:
        yield _split(text_of(item, "text"), item.location)
        return
    if "continuation" not in record:
        raise ValueError("a field 'context' and no 'continuation'")
    context, word = (checked_text(f"field {name!r}", record[name]) for name in ("context", "continuation"))
    if not context.strip() or not word.strip():
        raise ValueError("'context' and 'continuation' must not be empty")
    yield context.rstrip(" "), word.strip(" ")


def _split(passage: str, location: str) -> tuple[str, str]:
    """Return a passage before its last word, and that word, which a line break may stand in."""
    before, _, word = passage.strip().rpartition(" ")
    if not before.strip():
        raise UserError(f"{location}: {passage.strip()!r} has no space, so it has no word before the last")
    return before.rstrip(" "), word
