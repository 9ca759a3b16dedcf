"""The verb `evaluate`, over `diffusionlm.evaluation.tasks`: the parameters of a task are its options."""

import inspect
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffusionlm.cli.output import print_json, summary
from diffusionlm.console import Console, write
from diffusionlm.errors import UserError
from diffusionlm.options import parse
from diffusionlm.storage import run_path, write_atomically

if TYPE_CHECKING:
    from diffusionlm.evaluation.tasks import Result


def evaluate(args: list[str], prog: str) -> int:
    """Evaluate a model on a task: evaluate CHECKPOINT TASK --data FILE [--limit N] [--json] [...]."""
    if args[:1] == ["report"]:
        return _report(args[1:], f"{prog} report")
    from diffusionlm.checkpoint.store import locate
    from diffusionlm.evaluation import tasks

    positional = list(itertools.takewhile(lambda word: not word.startswith("-"), args[:2]))
    if len(positional) < 2:
        if {"-h", "--help"} & set(args):
            write(_usage(prog, tasks.TASKS))
            return 0
        missing = "TASK" if positional else "CHECKPOINT"
        raise UserError(f"missing {missing}; usage: {prog} CHECKPOINT TASK [...]; tasks: {', '.join(tasks.TASKS)}")
    checkpoint, name = positional
    json, options = parse(_options(tasks.get(name)), args[2:], f"{prog} {checkpoint} {name}")()
    location = locate(checkpoint)
    result = tasks.evaluate(str(location.path), name, **options)
    if json:
        print_json(result.to_json(name) | location.to_json())
    else:
        _show(name, result)
    return 1 if result.failed else 0


def _report(args: list[str], prog: str) -> int:
    def bind(results: list[str], /, output: str | None = None) -> int:
        """Compare results of evaluations in tables, with the errors of their differences.

        Args:
          results: files that `evaluate CHECKPOINT TASK --output FILE` wrote; differences are to the first of a task.
          output: a file to write, .md or .html; None: print Markdown.
        """
        from diffusionlm.evaluation import report

        kind = "md" if output is None else output.rpartition(".")[2]
        if kind not in ("md", "html"):
            raise UserError(f"output={output!r} must end in .md or .html")
        page = report.render(report.read(results), kind)
        if output is None:
            write(page)
        else:
            write_atomically(run_path(output), page)
            write(f"written: {output}")
        return 0

    return parse(bind, args, prog)()


def _usage(prog: str, tasks: Mapping[str, Callable]) -> str:
    width = max(map(len, tasks))
    lines = [f"  {name:{width}}  {summary(task)}" for name, task in tasks.items()]
    return "\n".join(
        [
            f"usage: {prog} CHECKPOINT TASK [--data PATH] [--limit N] [--output FILE] [--json] [--OPTION VALUE ...]",
            f"       {prog} report RESULT.json [...] [--output FILE.md or .html]",
            "",
            f"`{prog} CHECKPOINT TASK --help` lists the options of a task. Tasks:",
            "",
            *lines,
        ]
    )


_SHARED_HELP = """\
  json: print JSON.
  output: write the result to this file as JSON, for `evaluate report`; records of finished items are kept beside it.
  resume: continue an evaluation that was interrupted, from the records beside its output.
"""


def _options(task: Callable) -> Callable[..., tuple[bool, dict[str, Any]]]:
    """Return a function of the options of a task, and of --json, that returns them."""

    def call(json: bool = False, **options: Any) -> tuple[bool, dict[str, Any]]:
        return json, options

    shared = {"json": bool, "output": str | None, "resume": bool}

    _, *parameters = inspect.signature(task).parameters.values()
    hints = typing.get_type_hints(task, include_extras=True)
    call.__annotations__ = {parameter.name: hints[parameter.name] for parameter in parameters} | shared
    defaults = {"json": False, "output": None, "resume": False}
    others = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name]) for name in shared]
    call.__signature__ = inspect.Signature([*parameters, *others])  # pyright: ignore[reportFunctionMemberAccess] read by inspect
    call.__doc__ = (inspect.getdoc(task) or "").replace("\nArgs:\n", f"\nArgs:\n{_SHARED_HELP}")
    return call


def _show(task: str, result: "Result") -> None:
    """Print the examples and a table of the metrics, for people."""
    from rich.table import Table

    for example in result.examples or []:
        if "middle" in example:
            write(f"{example['before']} >>>{example['fill']} <<<{example['after']}\n(was:{example['middle']})\n")
        else:
            write("\n".join(f"{name}: {value}" for name, value in example.items()) + "\n")
    table = Table(title=task, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("value", "+/-"):
        table.add_column(heading, justify="right")
    for name, (value, stderr) in result.metrics.items():
        error = "?" if stderr is None else _decimals(stderr) if stderr else ""
        table.add_row(name, f"{value:,}" if isinstance(value, int) else _decimals(value), error)
    Console().print(table)
    if result.checks is not None:
        _show_checks(result.checks)
    for note in result.notes:
        write(note)


def _decimals(value: float) -> str:
    """Return four decimals, or three digits of a smaller number."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.3g}"


def _show_checks(checks: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of verdicts, why a check failed and why another does not apply, for people."""
    from rich.table import Table
    from rich.text import Text

    styles = {"pass": "green", "fail": "bold red", "not applicable": "dim"}
    table = Table(title="checks", title_justify="left", box=None, pad_edge=False)
    for heading in ("", "verdict", "value", "tolerance"):
        table.add_column(heading, justify="right" if heading in ("value", "tolerance") else "left")
    for check in checks:
        numbers = ["" if check[key] is None else f"{check[key]:.3g}" for key in ("value", "tolerance")]
        verdict = Text(check["verdict"], style=styles[check["verdict"]])
        table.add_row(check["name"], verdict, *numbers)
    Console().print(table)
    for check in checks:
        if check["verdict"] == "fail":
            write(f"{check['name']} failed: {check['explanation']}")
    for check in checks:
        if check["verdict"] == "not applicable":
            write(f"{check['name']} is not applicable: {check['explanation']}")
