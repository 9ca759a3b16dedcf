"""The task `poems`: the next and the previous line of couplets."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated

from diffusionlm.evaluation import answers
from diffusionlm.evaluation.graders import contains
from diffusionlm.evaluation.records import Fields, read_records
from diffusionlm.evaluation.results import Metric, Result, mean_difference, means
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.evaluation.texts import checked_limit
from diffusionlm.options import SETTINGS
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.scalars import whole

# What follows a line: "What is its next (previous) line? Answer with the sentence alone."
QUESTIONS = {
    "forward": "的下一句是什么\uff1f 直接输出句子即可。",
    "backward": "的上一句是什么\uff1f 直接输出句子即可。",
}
DIRECTIONS = tuple(QUESTIONS)


class Couplet(Fields, frozen=True):
    """Two lines of a poem."""

    first: str
    second: str


def poems(
    session: Session,
    *,
    data: str,
    limit: int | None = None,
    examples: int = 0,
    batch_size: int = 16,
    raw: bool = False,
    sampling: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(  # noqa: B008
        length=28, temperature=0.0, eos_penalty=math.inf
    ),
) -> Result:
    """Write the next line of Chinese couplets, and the previous one, as LLaDA was evaluated (arXiv 2502.09992).

    The questions are LLaDA's, in the model's chat template if it has one; as there, 28 tokens are written, and no end
    of text. An answer that holds the line is right. The metrics are means over the couplets with their standard errors,
    forward and backward, and their difference over the same couplets; and counts: couplets, and those too_long for the
    model, which are left out.

    Args:
      session: the model to evaluate.
      data: a .json or .jsonl file of objects with "first" and "second", such as LLaDA's poem_data.json.
      limit: the number of couplets, the first ones; None: all.
      examples: the number of couplets to show, the first ones.
      batch_size: questions at a time; the noise of an answer does not depend on it.
      raw: write no chat template, even if the model has one.
      sampling: the settings; LLaDA took strategy=low_confidence.

    Raises:
      UserError: any of `answer`, no such file, or a malformed record.
    """
    model, limit = session.model, checked_limit(limit)
    examples = whole("examples", examples, 0, "not be negative")
    couplets = read_records(data, Couplet, limit)
    prompts, golds = _questions(model, couplets, raw)
    longest = [max(pair, key=lambda prompt: len(prompt.ids)) for pair in zip(prompts[::2], prompts[1::2], strict=True)]
    kept, skipped = answers.fitting(model, longest, sampling.length)
    chosen = [2 * i + d for i in kept for d in range(2)]

    def grade(k: int, text: str) -> Record:
        return {DIRECTIONS[chosen[k] % 2]: contains(text, golds[chosen[k]])}

    records = answers.answer(session, "write lines", [prompts[p] for p in chosen], sampling, batch_size, grade)
    next_lines, previous_lines = records[::2], records[1::2]
    differences = [
        float(after["forward"]) - float(before["backward"])
        for after, before in zip(next_lines, previous_lines, strict=True)
    ]
    counts = {"couplets": Metric(len(kept))} | skipped
    shown = [
        {"first": couplets[i].first, "second": couplets[i].second}
        | {"after the first": after["answer"], "before the second": before["answer"]}
        for i, after, before in zip(kept[:examples], next_lines, previous_lines, strict=False)
    ]
    config = {"data": data, "limit": limit, "raw": raw, "batch_size": batch_size}
    metrics = means(next_lines, ["forward"]) | means(previous_lines, ["backward"])
    metrics |= {"difference": mean_difference(differences)} | counts
    result = answers.result(model, metrics, records, config, sampling, shown)
    names = [f"{couplets[i].first}\n{couplets[i].second}" for i in kept]
    return dataclasses.replace(result, items={"difference": dict(zip(names, differences, strict=True))})


def _questions(model: LoadedModel, couplets: Sequence[Couplet], raw: bool) -> tuple[list[answers.Prompt], list[str]]:
    """Return two prompts for each couplet, forward and backward, and the lines that answer them."""
    prompts, golds = [], []
    for first, second in ((couplet.first, couplet.second) for couplet in couplets):
        for (given, gold), question in zip(((first, second), (second, first)), QUESTIONS.values(), strict=True):
            ids = answers.encode_prompt(model, given + question, raw)
            prompts.append(answers.Prompt(ids, [given, gold], len(prompts)))
            golds.append(gold)
    return prompts, golds
