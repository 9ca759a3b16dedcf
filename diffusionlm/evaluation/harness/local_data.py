"""Data of tasks from files on a disk: where they lie in the user's directory, and how their records are read."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusionlm import untrusted
from diffusionlm.errors import UserError, suggest
from diffusionlm.evaluation.harness import formats
from diffusionlm.evaluation.harness.formats import Doc
from diffusionlm.evaluation.records import record_of
from diffusionlm.evaluation.texts import source
from diffusionlm.storage import disk_path

MAX_TEXT_BYTES = 1 << 30  # of a plain text file or one of labels
DIRECTORY = "DIFFUSIONLM_DATA"  # the environment variable that names the directory where no option does


@dataclass(frozen=True)
class Files:
    """The files of a split, below the user's directory.

    Attributes:
      names: the places where the file may lie; the first that exists is read.
      labels: a file beside it with the right answer of each record, a line each, for records that lack it.
      ids: the first and the last `task_id` of the split, of a file that holds several splits.
    """

    names: tuple[str, ...]
    labels: str | None = None
    ids: tuple[int, int] | None = None


@dataclass(frozen=True)
class LocalTask:
    """A task whose documents are read from files.

    Attributes:
      read: makes a document of a record.
      splits: the files of each split of the task's YAML file.
    """

    read: Callable[[Mapping[str, Any], str], Doc]
    splits: Mapping[str, Files]


def _test(*names: str, labels: str | None = None) -> dict[str, Files]:
    return {"test": Files(names, labels)}


def _foundry(name: str, *others: str) -> dict[str, Files]:
    return _test(f"eval/llm-foundry/{name}.jsonl", f"{name}.jsonl", *others)


_MBPP = ("eval/mbpp/mbpp.jsonl", "mbpp/mbpp.jsonl", "mbpp.jsonl")

LOCAL: dict[str, LocalTask] = {
    "hellaswag": LocalTask(formats.hellaswag, _test("eval/hellaswag/hellaswag_val.jsonl", "hellaswag_val.jsonl")),
    "piqa": LocalTask(formats.piqa, _test("eval/piqa/valid.jsonl", "piqa/valid.jsonl", labels="valid-labels.lst")),
    "arc_easy": LocalTask(formats.arc, _foundry("arc_easy", "ARC-Easy/ARC-Easy-Test.jsonl")),
    "arc_challenge": LocalTask(formats.arc, _foundry("arc_challenge", "ARC-Challenge/ARC-Challenge-Test.jsonl")),
    "boolq": LocalTask(formats.boolq, _foundry("boolq", "boolq/dev.jsonl")),
    "winogrande": LocalTask(formats.winogrande, _foundry("winogrande", "winogrande_1.1/dev.jsonl")),
    "commonsense_qa": LocalTask(formats.commonsense_qa, _foundry("commonsense_qa", "commonsense_qa/dev.jsonl")),
    "openbookqa": LocalTask(formats.openbookqa, _test("eval/openbookqa/test.jsonl", "openbookqa/test.jsonl")),
    "social_iqa": LocalTask(
        formats.social_iqa, _test("eval/social_iqa/dev.jsonl", "socialiqa/dev.jsonl", labels="dev-labels.lst")
    ),
    "race": LocalTask(formats.race, _test("eval/race/test_high.jsonl", "race/test_high.jsonl")),
    "lambada_openai": LocalTask(formats.lambada, _test("eval/lambada/lambada_openai.jsonl", "lambada_openai.jsonl")),
    "lambada_standard": LocalTask(
        formats.lambada, _test("eval/lambada/lambada_test_plain_text.txt", "lambada_test_plain_text.txt")
    ),
    "gsm8k": LocalTask(
        formats.gsm8k,
        {name: Files((f"gsm8k/{name}.jsonl", f"eval/gsm8k/{name}.jsonl")) for name in ("train", "test")},
    ),
    "humaneval": LocalTask(
        formats.humaneval, _test("eval/humaneval/HumanEval.jsonl.gz", "HumanEval.jsonl.gz", "HumanEval.jsonl")
    ),
    "mbpp": LocalTask(
        formats.mbpp,
        {"prompts": Files(_MBPP, ids=(2, 4)), "test": Files(_MBPP, ids=(11, 510))},  # as published
    ),
}


def load(task: str, data: str | None = None, **_: Any) -> dict[str, Any]:
    """Return the documents of a task by split, as data sets of the harness.

    Args:
      task: a key of `LOCAL`.
      data: the directory of the files; None: that of the environment variable DIFFUSIONLM_DATA.
      **_: other metadata that the harness hands on.

    Raises:
      UserError: no directory, file, or field; or a record of an unknown form.
    """
    from datasets import Dataset  # pyright: ignore[reportMissingImports] the harness brings it

    return {split: Dataset.from_list(docs) for split, docs in read(task, data).items()}


def read(task: str, data: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """Return the documents of a task by split, in JSON types (see `load`)."""
    if task not in LOCAL:
        raise UserError(f"no files are known for the task {task!r}{suggest(task, LOCAL)}")
    directory = data or os.environ.get(DIRECTORY)
    if not directory:
        raise UserError(f"the task {task}_local needs the directory of its files: --data DIR, or set {DIRECTORY}")
    local = LOCAL[task]
    return {
        split: [dict(doc) for doc in _docs(task, local, disk_path(directory), files)]
        for split, files in local.splits.items()
    }


def _docs(task: str, local: LocalTask, directory: Path, files: Files) -> list[Doc]:
    path = next((directory / name for name in files.names if (directory / name).exists()), None)
    if path is None:
        wanted = " or ".join(files.names)
        raise UserError(f"the task {task}_local finds no file in {directory}; it reads {wanted} there")
    labels = _labels(path.with_name(files.labels)) if files.labels else None
    docs = []
    for i, (location, record) in enumerate(_records(path)):
        if labels is not None and "label" not in record:
            if i >= len(labels):
                raise UserError(f"{location}: no right answer, as {path.with_name(files.labels or '')} ends before it")
            record = {**record, "label": labels[i]}
        doc = local.read(record, location)
        if files.ids is None or files.ids[0] <= doc["task_id"] <= files.ids[1]:
            docs.append(doc)
    if not docs:
        some = f"with a task_id from {files.ids[0]} to {files.ids[1]}" if files.ids else ""
        raise UserError(f"{path} holds no records {some}".rstrip())
    return docs


def _labels(path: Path) -> list[str] | None:
    return untrusted.read_text(path, MAX_TEXT_BYTES).split() if path.exists() else None


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the place and the fields of each record; a line of a text file is a record with `text`."""
    if path.suffix == ".txt":
        for number, line in enumerate(untrusted.read_text(path, MAX_TEXT_BYTES).split("\n"), 1):
            if line:
                yield f"{path}:{number}", {"text": line}
        return
    for item in source(str(path), "text"):
        if (record := record_of(item)) is not None:
            yield item.location, record
