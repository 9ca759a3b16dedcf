"""The verb `completion`: a script with which a shell completes verbs, names of experiments and all options."""

import argparse
import typing
from collections.abc import Callable
from typing import Any, Literal

from diffusionlm import options
from diffusionlm.cli.output import PROGRAM, summary
from diffusionlm.console import write
from diffusionlm.errors import require_package
from diffusionlm.registry import experiments, sweeps

Verb = Callable[[list[str], str], int]
Shell = Literal["bash", "zsh", "tcsh"]

_DIRECTORIES = {"workdir", "output", "checkpoint", "run.init_from", "run.continue_from", "data.path"}
_FILES = {"data", "config", "html", "prompt_file", "load", "source", "reuse", "tokenizer", "results", "evaluations"}


def script(shell: Shell, verbs: dict[str, Verb]) -> str:
    """Return the script of a shell.

    Args:
      shell: its name.
      verbs: those of the command, by name.

    Raises:
      UserError: shtab is missing.
    """
    require_package("shtab", "completion", "shtab", "completion")
    import shtab  # pyright: ignore[reportMissingImports]

    return shtab.complete(_parser(verbs), shell)


def completion(args: list[str], prog: str, verbs: dict[str, Verb]) -> int:
    """Print the script of the shell that the first word names."""

    def bind(shell: Shell, /) -> int:
        """Print a script that completes verbs, experiments, sweeps and options of this command.

        For bash: diffusionlm completion bash > ~/.local/share/bash-completion/completions/diffusionlm
        For zsh: diffusionlm completion zsh > DIR/_diffusionlm, where DIR is in $fpath.
        For tcsh: diffusionlm completion tcsh > FILE, and source FILE in ~/.tcshrc.

        Args:
          shell: bash, zsh or tcsh.
        """
        write(script(shell, verbs).removesuffix("\n"))
        return 0

    return options.parse(bind, args, prog)()


def _parser(verbs: dict[str, Verb]) -> argparse.ArgumentParser:
    """Return a parser of argparse, which shtab reads, with the verbs and options of this command."""
    root = argparse.ArgumentParser(prog=PROGRAM)
    groups: dict[tuple[str, ...], Any] = {(): root.add_subparsers()}
    for verb, function in verbs.items():
        *family, name = verb.split()
        for i, word in enumerate(family):
            key = tuple(family[: i + 1])
            if key not in groups:
                groups[key] = groups[key[:-1]].add_parser(word, help=f"{word} ...").add_subparsers()
        parser = groups[tuple(family)].add_parser(name, help=_plain(summary(function)))
        for first, names in _first_words(verb).items():
            parser.add_argument(first, choices=names)
        for option, described in _options(verb, function).items():
            _add(parser, option, described, skipped=bool(_first_words(verb)))
    return root


def _first_words(verb: str) -> dict[str, list[str]]:
    """Return the name and the values of the first word of verbs that take a registered name."""
    if verb in ("train", "compile", "experiments"):
        return {"experiment": experiments.names()}
    return {"sweep": sweeps.names()} if verb.startswith("sweep ") else {}


def _options(verb: str, function: Verb) -> dict[str, options.Option]:
    """Return the parameters of a verb, as `options.parse` is asked to read them."""
    first = {"experiment": [experiments.names()[0]], "sweep": [sweeps.names()[0]]}
    words = next((first[kind] for kind in _first_words(verb) if verb != "experiments"), [])
    if verb == "evaluate":  # each task has its own; those of the first stand for the others
        words = ["CHECKPOINT", "perplexity"]
    return options.described_by(lambda: function(words, verb))


def _add(parser: argparse.ArgumentParser, name: str, option: options.Option, *, skipped: bool) -> None:
    if option.positional and skipped:  # the registered name, which is there already
        return
    literal = [hint for hint in options.alternatives(option.hint) if typing.get_origin(hint) is Literal]
    choices = [str(value) for hint in literal for value in typing.get_args(hint)]
    if bool in options.alternatives(option.hint) and not option.flag:
        choices = ["True", "False"]
    settings: dict[str, Any] = {"action": "store_true"} if option.flag else {"choices": choices} if choices else {}
    added = parser.add_argument(name if option.positional else f"--{name}", **settings)
    complete = "directory" if name in _DIRECTORIES else "file" if name in _FILES else None
    if complete:
        import shtab  # pyright: ignore[reportMissingImports]

        added.complete = getattr(shtab, complete.upper())  # pyright: ignore[reportAttributeAccessIssue] shtab reads it


def _plain(text: str) -> str:
    return text.replace("%", "%%")
