"""The tasks `human_eval` and `human_eval_infilling`: programs of Python, judged by running their tests."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated

import msgspec

from diffusionlm.errors import UserError
from diffusionlm.evaluation import answers, sandbox
from diffusionlm.evaluation import gaps as fillings
from diffusionlm.evaluation.judging import Trial, function_trial, is_late, is_out_of_time, judge
from diffusionlm.evaluation.records import Fields, read_records
from diffusionlm.evaluation.results import Metric, Result, means
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.evaluation.stories import Row, Story, encode_story
from diffusionlm.evaluation.texts import checked_limit
from diffusionlm.options import SETTINGS
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.scalars import whole

# Where a completion of a function ends if the model does not end it (Chen et al., 2021).
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\nassert ", "\nfrom ", "\nimport ")
INSTRUCTION = "Complete the following python code:\n"  # of LLaDA's evaluation of instructed models

Identifier = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z_]\w*\Z")]


class Problem(Fields, frozen=True):
    """A record of HumanEval (Chen et al., 2021)."""

    task_id: str
    prompt: str
    entry_point: Identifier
    test: str


class Gap(Problem, frozen=True):
    """A record of the infilling benchmark made of HumanEval (Bavarian et al., 2022)."""

    suffix: str
    canonical_solution: str


def human_eval(
    session: Session,
    *,
    data: str,
    limit: int | None = None,
    examples: int = 0,
    batch_size: int = 16,
    raw: bool = False,
    allow_code_execution: bool = False,
    sampling: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(length=512, temperature=0.0),  # noqa: B008
) -> Result:
    """Complete the functions of HumanEval (Chen et al., 2021), and run their tests in a sandbox.

    A model with a chat template is told "Complete the following python code:", and its first block of code counts.
    Other models continue the prompt; the answer ends where the function does. The metrics are pass_at_1, the mean over
    the problems, one answer each, with its standard error; and counts: problems, out_of_time ones and those too_long
    for the model, which are left out.

    Args:
      session: the model to evaluate.
      data: HumanEval.jsonl.gz, or a file of such records.
      limit: the number of problems, the first ones; None: all.
      examples: the number of answers to show, the first ones.
      batch_size: problems at a time; the noise of an answer does not depend on it.
      raw: write no chat template, even if the model has one.
      allow_code_execution: where no sandbox works, run the answers without one, with all rights of this process.
      sampling: the settings.

    Raises:
      UserError: any of `answer`, no such file, a malformed line, or no sandbox.
    """
    model, limit = session.model, checked_limit(limit)
    examples = whole("examples", examples, 0, "not be negative")
    problems = read_records(data, Problem, limit)
    templated = model.has_chat_template and not raw
    start = INSTRUCTION if templated else ""
    encoded = [answers.encode_prompt(model, start + problem.prompt, raw) for problem in problems]
    items = [msgspec.to_builtins(problem) for problem in problems]
    prompts = [answers.Prompt(*pair, i) for i, pair in enumerate(zip(encoded, items, strict=True))]
    indices, skipped = answers.fitting(model, prompts, sampling.length)
    place = sandbox.find(allow_code_execution=allow_code_execution)

    def grade(k: int, text: str) -> Record:
        problem = problems[indices[k]]
        solution = _code_of(problem, text) if templated else problem.prompt + _until_stop(text)
        return judge(place, trial_of(problem), solution)

    fitting = [prompts[i] for i in indices]
    records = answers.answer(session, "write functions", fitting, sampling, batch_size, grade, is_late)
    shown = [{"task_id": problems[i].task_id} | record for i, record in zip(indices[:examples], records, strict=False)]
    config = {"data": data, "limit": limit, "raw": raw, "batch_size": batch_size, "sandbox": place.name}
    metrics = _figures(records) | {"problems": Metric(len(records))} | skipped
    result = answers.result(model, metrics, records, config, sampling, shown)
    return dataclasses.replace(result, notes=(place.note,))


def human_eval_infilling(
    session: Session,
    *,
    data: str,
    limit: int | None = None,
    examples: int = 0,
    batch_size: int = 16,
    allow_code_execution: bool = False,
    sampling: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(),  # noqa: B008
) -> Result:
    """Fill in lines or spans of the functions of HumanEval (Bavarian et al., 2022), and run their tests in a sandbox.

    As DiffuLLaMA was evaluated (arXiv 2410.17891), the number of tokens is that of the right solution. A masked
    diffusion model sees both sides; an autoregressive one the code before. The metrics are pass_at_1 and exact_match
    (the right solution's text, but for white space around), means over the gaps with their standard errors, and counts:
    gaps, out_of_time ones and those too_long for the model, which are left out. Gaps of one function are not
    independent, so that errors over many gaps of few functions are too small.

    Args:
      session: the model to evaluate.
      data: one of the HumanEval-...Infilling.jsonl.gz: SingleLine, MultiLine, RandomSpan or RandomSpanInfillingLight.
      limit: the number of records to read, the first ones; None: all.
      examples: the number of filled gaps to show, the first ones.
      batch_size: gaps at a time; the noise of a gap does not depend on it.
      allow_code_execution: where no sandbox works, run the programs without one, with all rights of this process.
      sampling: the settings; leave out length, which is that of each gap; steps, if unset, are the gap's tokens.

    Raises:
      UserError: any of `diffusionlm.sampling.generate.infill`, no such file, a malformed line, no gap that fits, or no
        sandbox.
    """
    model, limit = session.model, checked_limit(limit)
    batch_size, examples = whole("batch_size", batch_size, 1), whole("examples", examples, 0, "not be negative")
    gaps, stories, rows, too_long = _read_gaps(session, data, limit)
    sampling = fillings.settings(model, rows, sampling, "human_eval_infilling")  # before anything is computed
    place = sandbox.find(allow_code_execution=allow_code_execution)

    def grade(r: int, text: str) -> Record:
        scores = {"fill": text, "exact_match": text.strip() == stories[r].middle.strip()}
        return scores | judge(place, trial_of(gaps[r]), stories[r].before + text + stories[r].after)

    def fill(batch: list[int]) -> list[Record]:
        filled = fillings.fill_middles(model, rows, batch, sampling)
        return [grade(r, text) | {"forwards": nfe} for r, (text, nfe) in zip(batch, filled, strict=True)]

    def renew(r: int, record: Record) -> Record | None:
        return record | grade(r, record["fill"]) if is_late(record) else None

    items = [msgspec.to_builtins(gap) for gap in gaps]
    records = session.evaluate("fill in code", items, fill, batch_size, fillings.order(model, rows, sampling), renew)
    shown = [
        {"task_id": gap.task_id, "solution": story.middle} | record
        for gap, story, record in zip(gaps[:examples], stories, records, strict=False)
    ]
    config = {"data": data, "limit": limit, "batch_size": batch_size, "sandbox": place.name}
    counts = {"gaps": Metric(len(rows)), "too_long": Metric(too_long)}
    metrics = _figures(records) | means(records, ["exact_match"]) | counts
    result = fillings.result(model, metrics, records, config, sampling, shown)
    return dataclasses.replace(result, notes=(place.note,))


def trial_of(problem: Problem) -> Trial:
    """Return the tests of a problem."""
    return function_trial(problem.prompt, problem.entry_point, problem.test)


def _figures(records: Sequence[Record]) -> dict[str, Metric]:
    scores = means(records, ["pass_at_1"])
    late = sum(map(is_out_of_time, records))
    return {"pass_at_1": scores["pass_at_1"], "out_of_time": Metric(late)}


def _until_stop(text: str) -> str:
    """Return a completion up to where something else begins than the body of the function."""
    ends = [place for stop in STOPS if (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


def first_block(text: str) -> str:
    """Return the first block of code of an answer in Markdown, all of it if there is no block."""
    block = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return block[1] if block else text


def _code_of(problem: Problem, text: str) -> str:
    """Return the program in an answer of a dialogue: its first block of code, after the prompt if it lacks that."""
    code = first_block(text)
    if re.search(rf"^\s*def\s+{problem.entry_point}\b", code, re.MULTILINE):
        imports = re.findall(r"^(?:from|import) .*$", problem.prompt, re.MULTILINE)  # those of the prompt still hold
        return "\n".join([*imports, code])
    return problem.prompt + code


def _read_gaps(session: Session, data: str, limit: int | None) -> tuple[list[Gap], list[Story], list[Row], int]:
    """Return the gaps that fit, their texts and tokens, and the number of the others."""
    model = session.model
    tokenizer = model.require_tokenizer()
    sizes, start = tokenizer.token_bytes(), model.encode("")
    gaps, stories, rows, too_long = [], [], [], 0
    for gap in read_records(data, Gap, limit):
        if not gap.canonical_solution.strip():
            raise UserError(f"data={data!r}: the solution of {gap.task_id!r} is empty; there is nothing to fill in")
        story, row = encode_story(Story(gap.prompt, gap.canonical_solution, gap.suffix), tokenizer, sizes)
        if len(start) + sum(map(len, row)) > model.config.max_length:
            too_long += 1
            continue
        gaps.append(gap)
        stories.append(story)
        rows.append(row._replace(before=start + row.before))
    if not rows:
        raise UserError(
            f"data={data!r} has no gap that fits: {too_long} programs are longer than the model's context of "
            f"{model.config.max_length}"
        )
    return gaps, stories, rows, too_long
