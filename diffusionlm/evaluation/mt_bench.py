"""The task `mt_bench`: answers to questions of two turns, in the format that FastChat's judge reads."""

import functools
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from diffusionlm.errors import UserError
from diffusionlm.evaluation import answers
from diffusionlm.evaluation.records import Fields, read_records
from diffusionlm.evaluation.results import Metric, Result, mean
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.evaluation.texts import checked_limit
from diffusionlm.options import SETTINGS
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.scalars import whole
from diffusionlm.storage import run_path, write_atomically

TURNS = 2


class Question(Fields, frozen=True):
    """A question of MT-Bench (Zheng et al., 2023)."""

    question_id: int
    category: str
    turns: Annotated[list[str], msgspec.Meta(min_length=TURNS, max_length=TURNS)]


def mt_bench(
    session: Session,
    *,
    data: str,
    answers_file: str,
    model_id: str = "diffusionlm",
    limit: int | None = None,
    examples: int = 0,
    batch_size: int = 16,
    raw: bool = False,
    sampling: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(length=512),  # noqa: B008
) -> Result:
    """Answer both turns of the questions of MT-Bench (Zheng et al., 2023), for FastChat's judge, which is not included.

    The second question is asked after the model's own first answer. The answers go to a file of FastChat's format, to
    be put into its data/mt_bench/model_answer. The metrics are counts: questions, those too_long for the model with
    both turns, whose second answer is empty, empty_answers; and the mean number of characters of an answer.

    Args:
      session: the model to evaluate.
      data: FastChat's question.jsonl.
      answers_file: where the answers are written, such as MODEL.jsonl.
      model_id: the model's name in that file.
      limit: the number of questions, the first ones; None: all.
      examples: the number of dialogues to show, the first ones.
      batch_size: questions at a time; the noise of an answer does not depend on it.
      raw: write the turns one after the other without a chat template, for a model that has none.
      sampling: the settings, the same for all categories.

    Raises:
      UserError: any of `answer`, no such file, a malformed line, a file of answers that exists, or a model without a
        chat template and not `raw`.
    """
    model, limit = session.model, checked_limit(limit)
    examples = whole("examples", examples, 0, "not be negative")
    questions = read_records(data, Question, limit)
    path = run_path(answers_file)
    if path.exists():
        raise UserError(f"answers_file={answers_file!r} exists; name another, or remove it")
    if not model.has_chat_template and not raw:
        raise UserError("this model has no chat template for the two turns; with --raw they are written as plain text")

    ask = functools.partial(_ask, session, raw, sampling, batch_size)
    first = ask("answer first turns", [question.turns[:1] for question in questions], range(0, 2 * len(questions), 2))
    if not first:
        shortest = min(len(_encode(model, question.turns[:1], raw)) for question in questions)
        raise answers.too_long(model, shortest, sampling.length)
    dialogues = [(questions[i].turns[0], record["answer"], questions[i].turns[1]) for i, record in first.items()]
    places = list(first)
    second_ids = [2 * i + 1 for i in places]
    second = {places[k]: record for k, record in ask("answer second turns", dialogues, second_ids).items()}
    turns = {i: [first[i]["answer"], second[i]["answer"] if i in second else ""] for i in places}
    chosen = [questions[i] for i in places]
    _write(path, chosen, list(turns.values()), model_id)
    metrics = _metrics(list(turns.values())) | {"too_long": Metric(len(questions) - len(second))}
    shown = [_shown(asked, texts) for asked, texts in zip(chosen[:examples], turns.values(), strict=False)]
    config = {"data": data, "answers_file": answers_file, "model_id": model_id, "limit": limit, "raw": raw}
    records = [*first.values(), *second.values()]
    return answers.result(model, metrics, records, config | {"batch_size": batch_size}, sampling, shown)


def _ask(
    session: Session,
    raw: bool,
    sampling: SamplingConfig,
    batch_size: int,
    title: str,
    dialogues: Sequence[Sequence[str]],
    row_ids: Sequence[int],
) -> dict[int, Record]:
    """Return the records of the answers to those dialogues that fit, by their indices."""
    model = session.model
    encoded = [_encode(model, dialogue, raw) for dialogue in dialogues]
    fits = [i for i, ids in enumerate(encoded) if len(ids) + sampling.length <= model.config.max_length]
    if not fits:
        return {}
    prompts = [answers.Prompt(encoded[i], list(dialogues[i]), row_ids[i]) for i in fits]
    return dict(zip(fits, answers.answer(session, title, prompts, sampling, batch_size), strict=True))


def _shown(question: Question, texts: Sequence[str]) -> dict[str, Any]:
    return {"question_id": question.question_id, "turns": question.turns, "answers": list(texts)}


def _metrics(turns: Sequence[Sequence[str]]) -> dict[str, Metric]:
    written = [text for texts in turns for text in texts]
    return {
        "questions": Metric(len(turns)),
        "empty_answers": Metric(sum(not text.strip() for text in written)),
        # Turns of one question are not independent: its mean is one value.
        "characters": mean([sum(map(len, texts)) / TURNS for texts in turns]),
    }


def _encode(model: LoadedModel, turns: Sequence[str], raw: bool) -> list[int]:
    """Return the ids of a dialogue whose turns are a user's and the model's in turn."""
    if raw or not model.has_chat_template:
        return model.encode("".join(f"{turn}\n\n" for turn in turns))
    roles = ("user", "assistant", "user")
    return model.encode_messages([{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)])


def _write(path: Any, questions: Sequence[Question], turns: Sequence[Sequence[str]], model_id: str) -> None:
    """Write answers in FastChat's format, one choice a question."""
    lines = []
    for question, texts in zip(questions, turns, strict=True):
        name = hashlib.sha256(json.dumps([question.question_id, model_id, texts]).encode()).hexdigest()[:22]
        line = {"question_id": question.question_id, "answer_id": name, "model_id": model_id}
        lines.append(line | {"choices": [{"index": 0, "turns": list(texts)}], "tstamp": time.time()})
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
