"""The task `lm_eval`: lm-evaluation-harness, called by its own entry points, with Monte Carlo errors beside its own."""

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

from diffusionlm import untrusted
from diffusionlm.errors import UserError, missing_package, suggest
from diffusionlm.evaluation.harness import TASKS
from diffusionlm.evaluation.harness import settings as published
from diffusionlm.evaluation.harness.options import BATCH_SIZE, parse_text
from diffusionlm.evaluation.harness.report import item_values, metrics_of, save_samples
from diffusionlm.evaluation.harness.settings import SUFFIX, TaskSettings
from diffusionlm.evaluation.results import Result
from diffusionlm.evaluation.session import Session
from diffusionlm.scalars import is_real, whole

NOTE = (
    "+/- is the error over documents; mc_stderr_of_acc and its like are the errors that come from the noise of the "
    "estimates"
)
BOOTSTRAP = 1000  # resamples for the harness' standard errors of what is no mean; its error is then 2%


@dataclass(frozen=True)
class Asked:
    """The arguments of the command, as far as all tasks share them.

    Attributes:
      model_args: model arguments, which replace those of named settings.
      num_fewshot: examples in the prompt, which replace those of named settings; None: theirs, or the task's.
      gen_kwargs: arguments of generation, which replace those of named settings.
      evaluator: the harness' own arguments, handed on as they are.
    """

    model_args: dict[str, Any]
    num_fewshot: int | None
    gen_kwargs: dict[str, Any]
    evaluator: dict[str, Any]

    def under(self, settings: str | None) -> "Asked":
        """Return this with what named settings add for all tasks, checked."""
        if settings is not None and published.get(settings).apply_chat_template:
            self.evaluator["apply_chat_template"] = True
        if self.evaluator["fewshot_as_multiturn"] and not self.evaluator["apply_chat_template"]:
            raise UserError("fewshot_as_multiturn writes turns of a dialogue; it needs apply_chat_template")
        return self


def lm_eval(
    session: Session,
    *,
    tasks: str,
    data: str | None = None,
    settings: str | None = None,
    model_args: str = "",
    gen_kwargs: str = "",
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = BATCH_SIZE,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool = False,
    system_instruction: str | None = None,
    include_path: str | None = None,
    fewshot_seed: int = 1234,
    allow_code_execution: bool = False,
    confirm_run_unsafe_code: bool = False,
    samples: str | None = None,
) -> Result:
    """Evaluate on tasks of lm-evaluation-harness, its own, yours, or ours, which read files without a network.

    The harness' standard errors are those over documents alone. What the noise of likelihoods adds is beside them, e.g.
    TASK/mc_stderr_of_acc, and TASK/undecided, the share of multiple-choice decisions that more draws could turn, at 5%.

    Args:
      session: the model to evaluate.
      tasks: names with commas between them; those that end with _local read files of --data.
      data: the directory of the files of our tasks; None: that of the environment variable DIFFUSIONLM_DATA.
      settings: those of a published table: llada_base, llada_instruct, smdm_1028m, diffugpt or illada.
      model_args: likelihood and sampling settings, such as draws=16,guidance=0.5,steps=64,block_length=32.
      gen_kwargs: arguments of generation that replace those of the tasks, such as max_gen_toks=128.
      num_fewshot: the number of examples in the prompt; None: that of the settings or of the task.
      limit: the number of documents of each task, the first ones; below 1 a share of them; None: all.
      batch_size: prompts that are answered at a time; in likelihoods, rows=N of model_args is what the network sees.
      apply_chat_template: write prompts in the model's chat template.
      fewshot_as_multiturn: write the examples as turns of a dialogue; needs apply_chat_template.
      system_instruction: a text that begins every prompt.
      include_path: a directory of task files of your own.
      fewshot_seed: the seed by which the examples are chosen.
      allow_code_execution: where no sandbox works, run the programs of our tasks without one, with all your rights.
      confirm_run_unsafe_code: let the harness' own tasks run code that the model has written, without a sandbox.
      samples: a directory for a file of all documents, answers and errors of each task.

    Raises:
      UserError: `lm_eval` is missing, an unknown task, data that cannot be loaded, or anything that cannot be scored.
    """
    evaluator = {
        "limit": _limit(limit),
        "apply_chat_template": apply_chat_template,
        "fewshot_as_multiturn": fewshot_as_multiturn,
        "system_instruction": system_instruction,
        "fewshot_random_seed": fewshot_seed,
        "confirm_run_unsafe_code": confirm_run_unsafe_code,
    }
    model = parse_text(model_args) | {"batch_size": whole("batch_size", batch_size, 1)}
    asked = Asked(model, num_fewshot, parse_text(gen_kwargs), evaluator)
    metadata = {"data": data, "allow_code_execution": allow_code_execution}
    outcomes = _run(session, _plan(tasks, settings), asked.under(settings), metadata, include_path)
    return _result(outcomes, {"data": data, "settings": settings} | asked.evaluator, settings, samples)


Plan = tuple[TaskSettings, dict[str, Any]]  # the named settings of a task, and its model arguments


def _plan(tasks: str, settings: str | None) -> dict[str, Plan]:
    """Return the named settings of each task; an unknown one is refused before any other costs time."""
    names = [name for name in map(str.strip, tasks.split(",")) if name]
    if not names:
        raise UserError(f"tasks={tasks!r} names no task")
    if settings is None:
        return {name: (TaskSettings(), {}) for name in names}
    return {name: published.get(settings).of(settings, name) for name in names}


def _run(
    session: Session, planned: Mapping[str, Plan], asked: Asked, metadata: dict[str, Any], include_path: str | None
) -> list[dict[str, Any]]:
    """Load all tasks, and then run the harness on each of them."""
    harness = require_harness()
    with _quiet():
        manager = _manager(list(planned), metadata, include_path)
        loaded = {name: _load(manager, name) for name in planned}
        return [_evaluate(harness, session, manager, loaded[name], plan, asked) for name, plan in planned.items()]


def _result(
    outcomes: list[dict[str, Any]], config: dict[str, Any], settings: str | None, samples: str | None
) -> Result:
    """Return the figures of all runs, and write their samples."""
    if samples is not None:
        for outcome in outcomes:
            save_samples(samples, outcome)
    config = config | {"lm_eval": outcomes[0]["lm_eval_version"], "runs": [outcome["run"] for outcome in outcomes]}
    if settings is not None:
        config["differences"] = published.get(settings).differences
    metrics = {name: metric for outcome in outcomes for name, metric in metrics_of(outcome).items()}
    forwards = sum(run["forwards"] for run in config["runs"])
    notes = [NOTE] if any("mc_stderr" in name for name in metrics) else []
    notes += sorted({run["sandbox"] for run in config["runs"] if "sandbox" in run})
    items = {name: values for outcome in outcomes for name, values in item_values(outcome).items() if name in metrics}
    return Result(metrics, config, forwards=forwards, notes=tuple(notes), items=items)


def require_harness() -> ModuleType:
    """Return the package `lm_eval`; raise `UserError` if it is missing."""
    try:
        return importlib.import_module("lm_eval")
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise missing_package(f"lm_eval ({reason})", "lm_eval", "eval") from error


def _limit(limit: float | None) -> float | int | None:
    """Return the harness' limit: a number of documents, or below 1 a share."""
    if limit is None:
        return None
    if not is_real(limit) or limit <= 0 or (limit >= 1 and limit != int(limit)):
        raise UserError(f"limit={limit} must be an integer of at least 1, a share below 1, or be left out for all")
    return int(limit) if limit >= 1 else limit


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from printing to stdout, which is for results, and from forking processes that hold JAX."""
    logger = logging.getLogger("lm_eval")
    level, before = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        # It asks git for the commit of the working directory, which complains where there is none.
        with contextlib.redirect_stdout(sys.stderr), mock.patch("lm_eval.evaluator.get_git_commit_hash", lambda: None):
            yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _manager(names: list[str], metadata: dict[str, Any], include_path: str | None) -> Any:
    """Return the harness' index of tasks, with ours; its own thousands are read only if one of them is asked for."""
    if include_path is not None and not os.path.isdir(include_path):
        raise UserError(f"include_path={include_path} is no directory of task files")
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    importlib.import_module("diffusionlm.evaluation.harness.model")  # registers the model class
    paths = [str(TASKS), *([include_path] if include_path else [])]
    index = manager(include_path=paths, include_defaults=False, metadata=metadata)
    if all(name in index.all_tasks or name.endswith(SUFFIX) for name in names):
        return index
    return manager(include_path=paths, metadata=metadata)


def _load(manager: Any, name: str) -> Mapping[str, Any]:
    """Return the tasks and groups of a name, with their data.

    Raises:
      UserError: an unknown name, or data that cannot be loaded.
    """
    if name not in manager.all_tasks:
        raise UserError(f"unknown task {name!r}{_near(name, manager.all_tasks)}")
    try:
        return manager.load([name])
    except UserError:
        raise
    except Exception as error:  # whatever data sets, hubs and task files raise
        reason = untrusted.printable(" ".join(str(error).split())[:200])
        local = f"{name}_local"
        fix = f"use {local} with --data DIR" if (TASKS / f"{local}.yaml").exists() else "see that its data can be had"
        raise UserError(f"the task {name} cannot be loaded: {type(error).__name__}: {reason}; {fix}") from error


def _near(name: str, known: list[str]) -> str:
    """Return a suggestion; the harness' thousands of names are not all listed."""
    close = suggest(name, known)
    return close if close.startswith("; did") else "; `lm_eval ls tasks` lists the harness' own"


def _evaluate(
    harness: ModuleType,
    session: Session,
    manager: Any,
    loaded: Mapping[str, Any],
    plan: Plan,
    asked: Asked,
) -> dict[str, Any]:
    """Run the harness on one task or group, and return its results with `tasks`, `model` and `run` added."""
    model_class = importlib.import_module("diffusionlm.evaluation.harness.model").DiffusionLM
    chosen, table_args = plan
    arguments = table_args | asked.model_args
    tasks = loaded["tasks"]
    greedy = frozenset(name for name, task in tasks.items() if _needs_greedy(task))
    model = model_class(session, greedy_tasks=greedy, **arguments)
    if asked.evaluator["apply_chat_template"]:
        model.chat_template(True)  # refuses a model without one before anything is computed
    gen_kwargs = parse_text(chosen.gen_kwargs) | asked.gen_kwargs
    num_fewshot = chosen.num_fewshot if asked.num_fewshot is None else asked.num_fewshot
    groups = loaded.get("groups") or {}
    children = {child for names in (loaded.get("group_map") or {}).values() for child in names}
    items = [group for name, group in groups.items() if name not in children] or list(tasks.values())
    try:
        results: dict[str, Any] = harness.simple_evaluate(
            model=model,
            tasks=items,
            num_fewshot=num_fewshot,
            gen_kwargs=gen_kwargs or None,
            task_manager=manager,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
            **asked.evaluator,
        )
    except ValueError as error:  # a UserError, or a refusal of the harness, which says its reason in one sentence
        if isinstance(error, UserError):
            raise
        reason = untrusted.printable(" ".join(str(error).split())[:300])
        raise UserError(f"the harness refuses {', '.join(sorted(tasks)[:3])}: {reason}") from error
    run = {"tasks": sorted(tasks), "num_fewshot": results["n-shot"], "versions": results["versions"]}
    run |= {"model_args": model.options.to_json(), "gen_kwargs": gen_kwargs, "forwards": model.forwards}
    run |= {"truncated": model.truncated, "documents": results["n-samples"]}
    if places := {task.place.note for task in tasks.values() if hasattr(task, "place")}:
        run["sandbox"] = ", ".join(sorted(places))
    if chosen.published is not None:
        run["published"] = {"percent": chosen.published, "metric": chosen.metric}
    return {**results, "tasks": tasks, "model": model, "run": run}


def _needs_greedy(task: Any) -> bool:
    """Return True if a figure of a task may be made of greedy decoding: its accuracy, or one that we do not know."""
    names = {entry["metric"] for entry in task.get_config("metric_list") or [] if isinstance(entry["metric"], str)}
    if task.get_config("output_type") == "multiple_choice":
        return "exact_match" in names
    return task.get_config("output_type") == "loglikelihood" and names != {"perplexity"}
