"""The task `gsm8k`: grade school mathematics."""

import functools
from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import Annotated

from diffusionlm.errors import UserError
from diffusionlm.evaluation import answers
from diffusionlm.evaluation.graders import final_number, last_number, same_answer, smdm_answer
from diffusionlm.evaluation.records import Fields, read_records
from diffusionlm.evaluation.results import Metric, Result, means
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.evaluation.texts import checked_limit
from diffusionlm.options import SETTINGS
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.scalars import whole

SCORES = ("strict_match", "flexible_match", "smdm_match")


class Problem(Fields, frozen=True):
    """A record of GSM8K (Cobbe et al., 2021), whose answer ends with `#### N`."""

    question: str
    answer: str


def gsm8k(
    session: Session,
    *,
    data: str,
    shots: int = 0,
    shots_data: str | None = None,
    limit: int | None = None,
    examples: int = 0,
    batch_size: int = 16,
    raw: bool = False,
    sampling: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(length=256, temperature=0.0),  # noqa: B008
) -> Result:
    r"""Answer problems of GSM8K, and compare the number in the answer with the right one.

    A model with a chat template is asked the question in it; any other goes on after "Question: ...\nAnswer:". An
    answer counts up to where the model asks a further "Question:". The metrics are means over the problems with their
    standard errors: strict_match (the number after the first `####`), flexible_match (the last number), smdm_match
    (the rule of SMDM's evaluation, arXiv 2410.18514); and counts: problems, no_number and those too_long for the model,
    which are left out.

    Args:
      session: the model to evaluate.
      data: a .jsonl file whose lines have "question" and "answer", such as GSM8K's test.jsonl.
      shots: the number of solved problems that stand before each question, from `shots_data`.
      shots_data: a file like `data`, of whose first problems the shots are; none of them may be a question of `data`.
      limit: the number of problems, the first ones; None: all.
      examples: the number of graded answers to show, the first ones.
      batch_size: problems at a time; the noise of an answer does not depend on it.
      raw: write no chat template, even if the model has one.
      sampling: the settings.

    Raises:
      UserError: any of `answer`, no such file, a malformed line, or an answer of the file without `####`.
    """
    model, limit = session.model, checked_limit(limit)
    shots, examples = whole("shots", shots, 0, "not be negative"), whole("examples", examples, 0, "not be negative")
    problems = read_records(data, Problem, limit)
    golds = _golds(problems, data)
    solved = _solved(shots, shots_data, {problem.question for problem in problems})
    prompts = [
        answers.Prompt(_encode(model, problem, solved, raw), [problem.question, problem.answer, solved], i)
        for i, problem in enumerate(problems)
    ]
    indices, skipped = answers.fitting(model, prompts, sampling.length)

    grade = functools.partial(_grade, [golds[i] for i in indices], [problems[i].answer for i in indices])
    records = answers.answer(session, "solve problems", [prompts[i] for i in indices], sampling, batch_size, grade)
    counts = {"problems": Metric(len(records)), "no_number": Metric(sum(record["no_number"] for record in records))}
    shown = [
        {"question": problems[i].question, "gold": problems[i].answer} | record
        for i, record in zip(indices[:examples], records, strict=False)
    ]
    config = {"data": data, "shots": shots, "shots_data": shots_data, "limit": limit, "raw": raw}
    metrics = means(records, SCORES) | counts | skipped
    return answers.result(model, metrics, records, config | {"batch_size": batch_size}, sampling, shown)


def _grade(golds: Sequence[Fraction], solutions: Sequence[str], k: int, text: str) -> Record:
    """Return the scores of the answer to the problem with index k, by all rules."""
    kept = text.partition("Question:")[0].rstrip()  # blank lines after it are not its last line
    number = last_number(kept)
    return {
        "strict_match": final_number(kept) == golds[k],
        "flexible_match": number == golds[k],
        "smdm_match": same_answer(smdm_answer(kept), smdm_answer(solutions[k])),
        "no_number": number is None,
    }


def _encode(model: LoadedModel, problem: Problem, solved: str, raw: bool) -> list[int]:
    """Return the prompt of a problem."""
    if model.has_chat_template and not raw and not solved:
        return answers.encode_prompt(model, problem.question, raw)
    return answers.encode_prompt(model, f"{solved}Question: {problem.question}\nAnswer:", raw)


def _golds(problems: Sequence[Problem], data: str) -> list[Fraction]:
    """Return the right numbers."""
    golds = []
    for problem in problems:
        if (number := final_number(problem.answer)) is None:
            answer = problem.answer[-60:]
            raise UserError(f"data={data!r} has an answer without '#### N': {answer!r}; give GSM8K's own files")
        golds.append(number)
    return golds


def _solved(shots: int, shots_data: str | None, questions: Collection[str]) -> str:
    """Return the solved problems that stand before a question; none of them may be one of the questions."""
    if not shots:
        return ""
    if shots_data is None:
        raise UserError(f"shots={shots} needs shots_data, the file that they come from, such as GSM8K's train.jsonl")
    problems = read_records(shots_data, Problem, shots)
    if asked := [problem.question for problem in problems if problem.question in questions]:
        raise UserError(
            f"shots_data={shots_data!r} holds the questions themselves, such as {asked[0][:60]!r}; give another file"
        )
    if len(problems) < shots:
        raise UserError(f"shots={shots} are more than the {len(problems)} problems of shots_data={shots_data!r}")
    return "".join(f"Question: {problem.question}\nAnswer: {problem.answer}\n\n" for problem in problems)
