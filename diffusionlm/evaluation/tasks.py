"""The tasks that a model can be evaluated on.

A further task is one function in a file of its own and its entry in `TASKS`: it takes a `Session`, and its other
parameters are typed, named and documented, which makes them the options of `diffusionlm evaluate CHECKPOINT TASK`.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from diffusionlm.errors import UserError, suggest
from diffusionlm.evaluation.certificate.task import certificate
from diffusionlm.evaluation.code import human_eval, human_eval_infilling
from diffusionlm.evaluation.generative import generative
from diffusionlm.evaluation.gsm8k import gsm8k
from diffusionlm.evaluation.harness.command import lm_eval
from diffusionlm.evaluation.infilling import infilling
from diffusionlm.evaluation.lambada import lambada
from diffusionlm.evaluation.mt_bench import mt_bench
from diffusionlm.evaluation.perplexity import perplexity
from diffusionlm.evaluation.poems import poems
from diffusionlm.evaluation.results import Result
from diffusionlm.evaluation.reverse_curse import reverse_curse
from diffusionlm.evaluation.session import RECORDS_SUFFIX, Session
from diffusionlm.evaluation.temporal_shift import temporal_shift
from diffusionlm.pretrained.loading import load
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.storage import dump_numbers, in_bucket, require_directory, run_path, write_atomically

# They change no record. `tasks` are those of the harness, whose name is part of each of their items.
OPERATIONAL = ("batch_size", "examples", "limit", "samples", "answers_file", "model_id", "tasks")

TASKS: dict[str, Callable[..., Result]] = {
    "perplexity": perplexity,
    "infilling": infilling,
    "certificate": certificate,
    "lm_eval": lm_eval,
    "gsm8k": gsm8k,
    "reverse_curse": reverse_curse,
    "poems": poems,
    "lambada": lambada,
    "temporal_shift": temporal_shift,
    "human_eval": human_eval,
    "human_eval_infilling": human_eval_infilling,
    "mt_bench": mt_bench,
    "generative": generative,
}


def get(name: str) -> Callable[..., Result]:
    """Return the task of that name; raise `UserError` for an unknown one."""
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}{suggest(name, TASKS)}")
    return TASKS[name]


def evaluate(
    checkpoint: str | LoadedModel,
    task: str,
    *,
    output: epath.PathLike | None = None,
    resume: bool = False,
    **options: Any,
) -> Result:
    """Evaluate a model on a task.

    Args:
      checkpoint: the path of the checkpoint, or the loaded model.
      task: a key of `TASKS`.
      output: a file for the result as JSON, in which `evaluate report` compares it with others. Beside it, records of
        finished items are kept (`records_path`).
      resume: take up the records of an evaluation that was interrupted, and replace its result if there is one.
      **options: the task's parameters, e.g. `data="stories.jsonl", limit=100`.

    Raises:
      UserError: an unknown task or option, a missing one, an output that exists without `resume`, records of another
        evaluation, or any of the task.
    """
    function = get(task)
    _require_known_options(task, function, options)
    if output is None and resume:
        raise UserError("--resume needs --output FILE, beside which the records of finished items are")
    if output is not None and not resume and run_path(output).exists():
        raise UserError(f"{output} exists; give another output, or replace it with --resume")
    if output is not None:
        require_directory(os.path.dirname(os.path.abspath(output)) if not in_bucket(output) else output, "output")
    session = Session(checkpoint if isinstance(checkpoint, LoadedModel) else load(checkpoint))
    if output is not None:
        session.open_records(records_path(output), task, _science(function, options), resume=resume)
    try:
        result = dataclasses.replace(function(session, **options), seconds=session.seconds)
    finally:
        session.close()
    if output is not None:
        content = result.to_json(task) | session.checkpoint_json() | {"records": records_path(output).name}
        content |= {"items": result.items} if result.items else {}
        run_path(output).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(run_path(output), dump_numbers(content, indent=2) + "\n")
    return result


def records_path(output: epath.PathLike) -> epath.Path:
    """Return the path of the records beside a result: RESULT.items.jsonl for RESULT.json."""
    path = run_path(output)
    return path.with_name(f"{path.name.removesuffix('.json')}{RECORDS_SUFFIX}")


def _require_known_options(task: str, function: Callable[..., Result], options: Mapping[str, Any]) -> None:
    _, *parameters = inspect.signature(function).parameters.values()
    known = [parameter.name for parameter in parameters]
    if unknown := sorted(set(options) - set(known)):
        raise UserError(f"unknown option {unknown[0]!r} of the task {task}{suggest(unknown[0], known)}")
    needed = [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]
    if missing := [name for name in needed if name not in options]:
        raise UserError(f"the task {task} needs {missing[0]}; see `evaluate CHECKPOINT {task} --help`")


def _science(function: Callable[..., Result], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that change a record, with their defaults, in JSON types."""
    _, *parameters = inspect.signature(function).parameters.values()
    values = {parameter.name: options.get(parameter.name, parameter.default) for parameter in parameters}
    values = {name: value for name, value in values.items() if name not in OPERATIONAL}
    return {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        for name, value in values.items()
    }
