"""The verb `evaluate`: thin, over `diffusionlm.evaluation.tasks`, whose parameters are its options."""

import inspect
import json as json_lib
import typing
from collections.abc import Callable
from typing import Any

from diffusionlm.errors import UserError
from diffusionlm.options import parse


def evaluate(args: list[str], prog: str) -> int:
    """Evaluate a model on a task: evaluate CHECKPOINT TASK --data FILE [--limit N] [--json] [...]."""
    from diffusionlm.evaluation import tasks

    named = args[:2] if args[1:2] and not args[1].startswith("-") else args[:1]
    if not named or named[0].startswith("-") or len(named) < 2:
        if {"-h", "--help"} & set(args):
            print(_usage(prog, tasks.TASKS))
            return 0
        missing = "TASK" if named and not named[0].startswith("-") else "CHECKPOINT"
        raise UserError(f"{missing} is missing: {prog} CHECKPOINT TASK [...]; tasks: {', '.join(tasks.TASKS)}")
    checkpoint, name = named
    json, options = parse(_options(tasks.get(name)), args[2:], f"{prog} {checkpoint} {name}")()
    found = tasks.evaluate(checkpoint, name, **options)
    if json:
        print(json_lib.dumps(found.to_json(name), indent=2))
    else:
        _show(name, found)
    return 0


def _usage(prog: str, tasks: dict[str, Callable]) -> str:
    width = max(map(len, tasks))
    lines = [f"  {name:{width}}  {inspect.getdoc(task).splitlines()[0]}" for name, task in tasks.items()]
    return "\n".join(
        [
            f"usage: {prog} CHECKPOINT TASK --data FILE [--limit N] [--json] [--OPTION VALUE ...]",
            "",
            f"`{prog} CHECKPOINT TASK --help` lists the options of a task. Tasks:",
            "",
            *lines,
        ]
    )


def _options(task: Callable) -> Callable[..., tuple[bool, dict[str, Any]]]:
    """A function of the options of a task, and of --json, that gives them back."""

    def call(json: bool = False, **options: Any) -> tuple[bool, dict[str, Any]]:
        return json, options

    model, *parameters = inspect.signature(task).parameters.values()
    hints = typing.get_type_hints(task, include_extras=True)
    call.__annotations__ = {one.name: hints[one.name] for one in parameters} | {"json": bool}
    json = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False)
    call.__signature__ = inspect.Signature([*parameters, json])
    call.__doc__ = inspect.getdoc(task).replace("\nArgs:\n", "\nArgs:\n  json: print JSON.\n")
    return call


def _show(task: str, found: Any) -> None:
    """The examples and a table of the metrics, for people."""
    from rich.console import Console
    from rich.table import Table

    for example in found.examples or []:
        print(f"{example['before']} >>>{example['fill']} <<<{example['after']}\n(was:{example['middle']})\n")
    table = Table(title=task, title_justify="left", box=None, pad_edge=False)
    for heading, justify in (("", "left"), ("value", "right"), ("+/-", "right")):
        table.add_column(heading, justify=justify)
    for name, (value, stderr) in found.metrics.items():
        error = "?" if stderr is None else f"{stderr:.4f}" if stderr else ""
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}", error)
    Console().print(table)
