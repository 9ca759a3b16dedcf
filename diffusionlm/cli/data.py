"""The verbs `data prepare` and `data inspect`, over `diffusionlm.data`."""

import os

from diffusionlm.cli.output import print_json
from diffusionlm.options import parse, retyped

DRY_RUN = "--dry_run"


def data_prepare(args: list[str], prog: str) -> int:
    """Turn text into a dataset: data prepare SOURCE --output DIR --sequence_length N --vocab_size V [...]."""
    from diffusionlm.training.prepare import prepare, show_plan

    args, beam_options = _before_and_after_dashes(args)
    for option in ("--where", "--decontaminate", "--ignore_fields"):
        args = _joined(args, option)
    command = show_plan if DRY_RUN in args else prepare
    args = [word for word in args if word != DRY_RUN]
    fixed = {"beam_options": beam_options}
    parse(retyped(command, positional=1, fixed=fixed, output=str, tokenizer=str), args, prog)()
    return 0


def _before_and_after_dashes(args: list[str]) -> tuple[list[str], list[str]]:
    """Return the words before a word `--`, and those after it."""
    if "--" not in args:
        return args, []
    place = args.index("--")
    return args[:place], args[place + 1 :]


def _joined(args: list[str], option: str) -> list[str]:
    """Return words in which an option that stands there several times stands there once, with all of its values.

    Of several, tyro would take the last alone.
    """
    others, values, taking = [], [], False
    for word in args:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            taking = name == option
            values += [value] * bool(taking and equals)
        if not taking:
            others.append(word)
        elif not word.startswith("--"):
            values.append(word)
    return others + ([option, *values] if option in (word.partition("=")[0] for word in args) else [])


def data_inspect(args: list[str], prog: str) -> int:
    """Show what a dataset or a mixture holds: data inspect DIR [--count N] [--json], data inspect DIR=0.7,DIR=0.3."""
    return parse(_inspect, args, prog)()


def _inspect(
    path: str,
    /,
    count: int = 3,
    split: str = "train",
    steps: int = 1000,
    batch_size: int = 256,
    json: bool = False,
) -> int:
    """Show what a dataset holds, its documents decoded; or a mixture, with what a run takes from each source.

    Args:
      path: the directory that `data prepare` made, or a mixture of several: DIR=0.7,DIR=0.3 (see data.mixture).
      count: records of a dataset to decode, spread evenly over the split.
      split: the split that these records and the token statistics come from.
      steps: of a mixture, the steps of the run.
      batch_size: of a mixture, the rows of a step.
      json: print JSON.
    """
    if "=" in path and not os.path.isdir(path):
        from diffusionlm.data import inspect_mixture

        if json:
            print_json(inspect_mixture.describe(path, steps, batch_size))
        else:
            inspect_mixture.inspect(path, steps, batch_size)
        return 0
    from diffusionlm.data.inspect import describe, inspect

    if json:
        print_json(describe(path, count, split))
    else:
        inspect(path, count, split)
    return 0
