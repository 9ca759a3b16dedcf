"""The task `reverse_curse`: facts asked in the direction in which they were learnt, and in the other."""

import functools
from collections.abc import Sequence
from typing import Annotated

from diffusionlm.evaluation import answers
from diffusionlm.evaluation.graders import bleu_of_characters, bleu_of_words, contains
from diffusionlm.evaluation.records import Fields, read_records
from diffusionlm.evaluation.results import Metric, Result, means
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.evaluation.texts import checked_limit
from diffusionlm.options import SETTINGS
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.scalars import whole

SCORES = ("exact_match", "bleu_characters", "bleu_words")


class Fact(Fields, frozen=True):
    """A prompt, and how it goes on."""

    prompt: str
    completion: str


def reverse_curse(
    session: Session,
    *,
    data: str,
    reverse: str | None = None,
    limit: int | None = None,
    examples: int = 0,
    batch_size: int = 16,
    raw: bool = False,
    sampling: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(length=32, temperature=0.0),  # noqa: B008
) -> Result:
    """Complete facts that the model was trained on, in the same direction and in reverse (Berglund et al., 2023).

    Of the released name_description files, SMDM's evaluation (arXiv 2410.18514) takes d2p_prompts_test and
    p2d_reverse_prompts_test for names from descriptions, p2d_prompts_test and d2p_reverse_prompts_test for descriptions
    from names. The metrics are means over the prompts with their standard errors: exact_match (the text holds the
    completion, but for case), bleu_characters (BLEU-4 of single characters, as SMDM computes it) and bleu_words; with
    "reverse_" before them for the other direction; and counts: prompts, and those too_long for the model, which are
    left out.

    Args:
      session: the model to evaluate.
      data: a .jsonl file whose lines have "prompt" and "completion".
      reverse: another such file, of the reverse direction; None: only `data`.
      limit: the number of prompts of each file, the first ones; None: all.
      examples: the number of answers of each direction to show, the first ones.
      batch_size: prompts at a time; the noise of an answer does not depend on it.
      raw: write no chat template, even if the model has one.
      sampling: the settings.

    Raises:
      UserError: any of `answer`, no such file, or a malformed line.
    """
    model, limit = session.model, checked_limit(limit)
    examples = whole("examples", examples, 0, "not be negative")
    files = {"": data} if reverse is None else {"": data, "reverse_": reverse}
    facts = {prefix: read_records(name, Fact, limit) for prefix, name in files.items()}
    metrics, shown, records = dict[str, Metric](), [], []
    for direction, (prefix, some) in enumerate(facts.items()):
        prompts = [_prompt(model, fact, raw, 2 * i + direction) for i, fact in enumerate(some)]
        indices, skipped = answers.fitting(model, prompts, sampling.length)
        kept = [some[i] for i in indices]
        grade = functools.partial(_grade, prefix, [fact.completion for fact in kept])
        title = "complete facts" + " in reverse" * (prefix != "")
        new = answers.answer(session, title, [prompts[i] for i in indices], sampling, batch_size, grade)
        counts = {"prompts": Metric(len(new))} | skipped
        metrics |= means(new, [prefix + name for name in SCORES])
        metrics |= {prefix + name: metric for name, metric in counts.items()}
        shown += [
            {"direction": "reverse" if prefix else "same", "prompt": fact.prompt, "gold": fact.completion} | record
            for fact, record in zip(kept[:examples], new, strict=False)
        ]
        records += new
    config = {"data": data, "reverse": reverse, "limit": limit, "raw": raw, "batch_size": batch_size}
    return answers.result(model, metrics, records, config, sampling, shown)


def _prompt(model: LoadedModel, fact: Fact, raw: bool, row_id: int) -> answers.Prompt:
    return answers.Prompt(answers.encode_prompt(model, fact.prompt, raw), [fact.prompt, fact.completion], row_id)


def _grade(prefix: str, golds: Sequence[str], k: int, text: str) -> Record:
    """Return the scores of the answer to the prompt with index k, under the names of the metrics of its direction."""
    scores = contains(text, golds[k]), bleu_of_characters(text, golds[k]), bleu_of_words(text, golds[k])
    return {prefix + name: value for name, value in zip(SCORES, scores, strict=True)}
