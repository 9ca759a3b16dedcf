"""Records of published data files as documents of our tasks, whose prompts are those of the harness' own tasks.

Each function takes the fields of a record, in the layout of llm-foundry's local data (`query`, `choices`, `gold`), of
the file that the authors published, or of its copy on the Hugging Face hub, and where the record is, for messages.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from diffusionlm import schema
from diffusionlm.errors import UserError
from diffusionlm.evaluation import code
from diffusionlm.evaluation.gsm8k import Problem
from diffusionlm.evaluation.judging import assertion_trial
from diffusionlm.evaluation.records import Fields

Doc = Mapping[str, Any]
Index = str | int | bool


class _Choices(Fields, frozen=True):
    query: str
    choices: list[str]
    gold: int


class _Option(Fields, frozen=True):
    text: str
    label: str


class _Options(Fields, frozen=True):
    text: list[str]
    label: list[str]


class _Stem(Fields, frozen=True):
    stem: str
    choices: list[_Option]


class _Stemmed(Fields, frozen=True):
    question: _Stem
    answerKey: str


class _Asked(Fields, frozen=True):
    question: str
    choices: _Options
    answerKey: str


class _AskedStem(Fields, frozen=True):
    question_stem: str
    choices: _Options
    answerKey: str


class _HellaSwag(Fields, frozen=True):
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: list[str]
    label: Index


class _Piqa(Fields, frozen=True):
    goal: str
    sol1: str
    sol2: str
    label: Index


class _BoolQ(Fields, frozen=True):
    question: str
    passage: str
    answer: bool


class _SuperGlue(Fields, frozen=True):
    question: str
    passage: str
    label: Index


class _Schema(Fields, frozen=True):
    context_options: list[str]
    continuation: str
    gold: int


class _WinoGrande(Fields, frozen=True):
    sentence: str
    option1: str
    option2: str
    answer: Index


class _Siqa(Fields, frozen=True):
    context: str
    question: str
    answerA: str
    answerB: str
    answerC: str
    label: Index


class _Race(Fields, frozen=True):
    article: str
    questions: list[str]
    options: list[list[str]]
    answers: list[str]


class _Pair(Fields, frozen=True):
    context: str
    continuation: str


class _Text(Fields, frozen=True):
    text: str


class _HumanEval(code.Problem, frozen=True):
    canonical_solution: str


class _Mbpp(Fields, frozen=True):
    task_id: int
    text: str
    code: str
    test_list: list[str]
    test_setup_code: str


def _read(record: Mapping[str, Any], location: str, *forms: type[Fields]) -> Any:
    """Return the fields of a record in the first form that it has; `UserError` if it has none, or wrong types."""
    for form in forms:
        if set(form.__struct_fields__) <= set(record) and (form is forms[-1] or _fits(record, form)):
            return schema.convert(dict(record), form, location)
    wanted = ", or ".join(" ".join(form.__struct_fields__) for form in forms)
    raise UserError(f"{location}: a record with the fields {' '.join(sorted(record)) or 'none'}; known are {wanted}")


def _fits(record: Mapping[str, Any], form: type[Fields]) -> bool:
    """Return True if a record can be read in a form: forms may have fields of the same names and other types."""
    try:
        schema.convert(dict(record), form, "")
    except UserError:
        return False
    return True


def _doc(location: str, query: str, choices: Sequence[str], gold: int) -> Doc:
    if len(choices) < 2 or not all(choices) or not 0 <= gold < len(choices):
        raise UserError(f"{location}: the right answer {gold} is none of {len(choices)} choices, or one is empty")
    return {"query": query, "choices": list(choices), "gold": gold}


def _index(location: str, label: Index, first: int = 0) -> int:
    try:
        return int(label) - first
    except ValueError as error:
        raise UserError(f"{location}: the right answer {label!r} is no number") from error


def _keyed(location: str, keys: Sequence[str], key: str) -> int:
    if key.strip() not in keys:
        raise UserError(f"{location}: the right answer {key!r} is none of {' '.join(keys)}")
    return list(keys).index(key.strip())


def _question(query: str) -> str:
    """Write a question as the harness does for ARC and others."""
    query = query if query.startswith("Question:") else f"Question: {query}"
    return query if query.endswith("Answer:") else f"{query}\nAnswer:"


def hellaswag(record: Mapping[str, Any], location: str) -> Doc:
    """Read a beginning with four endings."""
    form = _read(record, location, _Choices, _HellaSwag)
    if isinstance(form, _Choices):
        return _doc(location, form.query, form.choices, form.gold)
    query = _without_brackets(f"{form.activity_label}: {form.ctx_a} {form.ctx_b.capitalize()}")
    return _doc(location, query, list(map(_without_brackets, form.endings)), _index(location, form.label))


def _without_brackets(text: str) -> str:
    """Remove the marks of WikiHow from a text of HellaSwag, as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def piqa(record: Mapping[str, Any], location: str) -> Doc:
    """Read a goal with two ways to it; the right one is in the record or in the file of labels."""
    form = _read(record, location, _Choices, _Piqa)
    if isinstance(form, _Choices):
        return _doc(location, _question(form.query), form.choices, form.gold)
    return _doc(location, _question(form.goal), [form.sol1, form.sol2], _index(location, form.label))


def arc(record: Mapping[str, Any], location: str) -> Doc:
    """Read a question of ARC."""
    query, choices, gold = _multiple_choice(record, location)
    return _doc(location, _question(query), choices, gold)


def openbookqa(record: Mapping[str, Any], location: str) -> Doc:
    """Read a question of OpenBookQA, whose prompt is its stem alone."""
    return _doc(location, *_multiple_choice(record, location))


def commonsense_qa(record: Mapping[str, Any], location: str) -> Doc:
    """Read a question of CommonsenseQA; its choices are in the prompt, and their letters are compared."""
    query, choices, gold = _multiple_choice(record, location)
    if query.endswith("Answer:"):  # written out already
        return _doc(location, query, choices, gold)
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    return _doc(location, f"Question: {query.strip()}{options}\nAnswer:", letters, gold)


def _multiple_choice(record: Mapping[str, Any], location: str) -> tuple[str, list[str], int]:
    form = _read(record, location, _Choices, _Stemmed, _Asked, _AskedStem)
    if isinstance(form, _Choices):
        return form.query, form.choices, form.gold
    if isinstance(form, _Stemmed):
        texts, keys = [option.text for option in form.question.choices], [o.label for o in form.question.choices]
        return form.question.stem, texts, _keyed(location, keys, form.answerKey)
    query = form.question if isinstance(form, _Asked) else form.question_stem
    return query, form.choices.text, _keyed(location, form.choices.label, form.answerKey)


def boolq(record: Mapping[str, Any], location: str) -> Doc:
    """Read a question about a passage, with the choices no and yes."""
    form = _read(record, location, _Choices, _BoolQ, _SuperGlue)
    if isinstance(form, _Choices):
        query = form.query.removeprefix("Passage: ")
        return _doc(location, query if query.endswith("Answer:") else f"{query}\nAnswer:", form.choices, form.gold)
    gold = int(form.answer) if isinstance(form, _BoolQ) else _index(location, form.label)
    return _doc(location, f"{form.passage}\nQuestion: {form.question}?\nAnswer:", ["no", "yes"], gold)


def winogrande(record: Mapping[str, Any], location: str) -> Doc:
    """Read two beginnings of a sentence; the same end is scored after both."""
    form = _read(record, location, _Schema, _WinoGrande)
    if isinstance(form, _Schema):
        contexts, end, gold = form.context_options, form.continuation, form.gold
    else:
        before, blank, end = form.sentence.partition("_")
        if not blank:
            raise UserError(f"{location}: the sentence {form.sentence!r} has no blank _")
        contexts, gold = [before + form.option1, before + form.option2], _index(location, form.answer, 1)
    doc = _doc(location, "", contexts, gold)
    return {"contexts": doc["choices"], "continuation": end.strip(), "gold": gold}


def social_iqa(record: Mapping[str, Any], location: str) -> Doc:
    """Read a question about people; labels count from 1."""
    form = _read(record, location, _Choices, _Siqa)
    if isinstance(form, _Choices):
        return _doc(location, form.query, form.choices, form.gold)
    choices = [form.answerA, form.answerB, form.answerC]
    return _doc(location, f"Q: {form.context} {form.question}\nA:", choices, _index(location, form.label, 1))


def race(record: Mapping[str, Any], location: str) -> Doc:
    """Read an article with its questions; the last is asked, and the others stand before it with their answers."""
    form = _read(record, location, _Choices, _Race)
    if isinstance(form, _Choices):
        return _doc(location, form.query, form.choices, form.gold)
    if not form.questions or not len(form.questions) == len(form.options) == len(form.answers):
        raise UserError(f"{location}: {len(form.questions)} questions with {len(form.answers)} answers")
    text, golds = f"Article: {form.article}\n\n", [_keyed(location, "ABCD", answer) for answer in form.answers]
    for question, options, gold in list(zip(form.questions, form.options, golds, strict=True))[:-1]:
        right = _doc(location, question, options, gold)["choices"][gold]
        if question.endswith("  _  ."):
            text += question[:-5] + right + "\n"
        else:
            text += f"Question: {question}\nAnswer: {right}\n"
    return _doc(location, text + form.questions[-1], form.options[-1], golds[-1])


def lambada(record: Mapping[str, Any], location: str) -> Doc:
    """Read a passage, whose last word, what follows its last space, is the target."""
    form = _read(record, location, _Pair, _Text)
    context, word = (form.context, form.continuation) if isinstance(form, _Pair) else form.text.rpartition(" ")[::2]
    if not context.strip() or not word.strip():
        raise UserError(f"{location}: a passage without words before its last one")
    return {"context": context.rstrip(" "), "word": f" {word.strip(' ')}"}


def gsm8k(record: Mapping[str, Any], location: str) -> Doc:
    """Read a word problem with its solution, which ends with #### and the number."""
    form = _read(record, location, Problem)
    if "####" not in form.answer:
        raise UserError(f"{location}: the answer has no ####, after which its number stands")
    return {"question": form.question, "answer": form.answer}


def humaneval(record: Mapping[str, Any], location: str) -> Doc:
    """Read the head of a function, which is completed."""
    return msgspec.structs.asdict(_read(record, location, _HumanEval))


def mbpp(record: Mapping[str, Any], location: str) -> Doc:
    """Read a description of a function with its tests, and with the right solution, which tells what they test."""
    form = _read(record, location, _Mbpp)
    try:
        trial = assertion_trial(form.code, form.test_setup_code, form.test_list)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{location}: the code or the tests are no program: {error}") from error
    if not trial.names:
        raise UserError(f"{location}: the tests use nothing that the code defines")
    return msgspec.structs.asdict(form)
