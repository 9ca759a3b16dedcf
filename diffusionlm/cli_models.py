"""The verbs that take or make a checkpoint besides training: evaluate, import, export."""

import inspect
import json as json_lib
import typing
from collections.abc import Callable
from typing import Any, Literal

from diffusionlm.arguments import parse
from diffusionlm.errors import UserError


def evaluate(args: list[str], prog: str) -> int:
    """Measure a model on a task: evaluate CHECKPOINT perplexity --data FILE [--limit N] [--json]."""
    from diffusionlm.evaluation import tasks

    usage = f"{prog} CHECKPOINT TASK [--OPTION VALUE ...] [--json]"
    names = ", ".join(tasks.TASKS)
    if args and args[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\n`{prog} CHECKPOINT TASK --help` lists a task's options. Tasks: {names}")
        return 0
    if len(args) < 2 or args[0].startswith("-") or args[1].startswith("-"):
        raise UserError(f"name the checkpoint and the task first: {usage}; tasks: {names}")
    checkpoint, task, *rest = args
    options, json = parse(_options_of(tasks.get(task)), rest, f"{prog} CHECKPOINT {task}")()
    result = tasks.evaluate(checkpoint, task, **options)
    if json:
        metrics = {name: metric._asdict() for name, metric in result.metrics.items()}
        told = {"task": task, "metrics": metrics, "config": result.config, "counts": result.counts}
        print(json_lib.dumps(told, indent=2))
        return 0
    for name, (value, stderr) in result.metrics.items():
        print(f"{name:20} {value:.4f}" + ("" if stderr is None else f" +/- {stderr:.4f}"))
    print("over " + ", ".join(f"{count:,} {name}" for name, count in result.counts.items()))
    return 0


def _options_of(task: Callable) -> Callable[..., tuple[dict[str, Any], bool]]:
    """A function that only returns a task's options and whether JSON is wanted, for `parse`."""

    def call(json: bool = False, **options: Any) -> tuple[dict[str, Any], bool]:
        return options, json

    _, *own = inspect.signature(task).parameters.values()
    call.__signature__ = inspect.Signature([*own, inspect.signature(call).parameters["json"]])
    call.__annotations__ = typing.get_type_hints(task, include_extras=True) | {"json": bool}
    call.__doc__ = f"{inspect.getdoc(task)}\n  json: print {{'task', 'metrics', 'config'}}.\n"
    return call


def import_weights(args: list[str], prog: str) -> int:
    """Make a checkpoint of released weights: import SOURCE --output DIR [--family NAME] [--tokenizer FILE]."""
    return parse(_import, args, prog)()


def _import(
    source: str,
    /,
    output: str,
    family: str | None = None,
    tokenizer: str | None = None,
    mask_id: int | None = None,
    suppress_mask: Literal["auto", "yes", "no"] = "auto",
) -> int:
    """Make a checkpoint of released weights.

    Args:
      source: a Hugging Face directory (config.json, safetensors, tokenizer files), or a .safetensors file.
      output: the checkpoint, a new directory.
      family: gpt2, llama, qwen2, dream, llada, smdm, diffugpt or diffullama; None: what config.json says.
      tokenizer: a tokenizer file or directory; None: that of the source, if it has one.
      mask_id: the id that stands for [MASK]; None: what config.json says, or the family's published one.
      suppress_mask: whether a mask id from the vocabulary is never predicted; auto: as the family's reference does.
    """
    from diffusionlm.interop import importing

    suppress = {"auto": None, "yes": True, "no": False}[suppress_mask]
    path = importing.import_weights(
        source, output, family, tokenizer=tokenizer, mask_id=mask_id, suppress_mask=suppress
    )
    print(f"{path}: {importing.summary(path)}; next: diffusionlm sample {path}")
    return 0


def export_weights(args: list[str], prog: str) -> int:
    """Write a checkpoint for other libraries: export CHECKPOINT --format NAME --output DIR [--dtype NAME]."""
    return parse(_export, args, prog)()


def _export(
    checkpoint: str,
    /,
    format: str,
    output: str,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> int:
    """Write a checkpoint for other libraries, as a Hugging Face directory.

    Args:
      checkpoint: a run directory (its latest step), a step directory, or a params-only model.
      format: llama, gpt2, qwen2 or llada, or another family that `import` knows.
      output: a new directory.
      dtype: of the tensors; None: as they are stored.
    """
    from diffusionlm.interop.exporting import export_weights as export

    for note in export(checkpoint, output, format, dtype=dtype):
        print(f"note: {note}")
    print(f"{output}: written as {format}")
    return 0
