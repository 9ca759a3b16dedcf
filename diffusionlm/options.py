"""Typed arguments: text from a command line, or values from a notebook, into functions and configs.

tyro reads them by the type hints and writes the help. What it prints for a mistake is a box of many lines, which
differs between its releases, so a mistake is looked up again here and told in one line.
"""

import contextlib
import difflib
import functools
import inspect
import io
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal

import docstring_parser
import tyro

from diffusionlm.errors import UserError

# Marks a parameter whose fields become options without a prefix of its own (--model.d_model, not --cfg.model.d_model),
# truth values included: `--model.causal True`. A truth value that is itself a parameter is a flag: `--json`.
SETTINGS = (tyro.conf.arg(name=""), tyro.conf.FlagConversionOff)


def parse(function: Callable, args: Sequence[str], prog: str) -> Callable[[], Any]:
    """Binds `args` to the parameters of `function`, which is not called yet; `--help` prints the help and exits.

    Positional-only parameters are positional here too. All others are options, with dots between the levels of
    dataclasses; their help is the docstring's, or the comment at the field.

    Args:
      function: typed, with a docstring.
      args: the words of the command line.
      prog: how the command is called, for the help.

    Raises:
      UserError: an unknown option, a value of another type, or something missing or left over.
    """

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            bound, unknown = tyro.cli(
                _binder(function), prog=prog, args=list(args), use_underscores=True, return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_mistake(function, args, prog)) from None
    if unknown or () in bound.args or [] in bound.args:  # tyro lets a positional list be empty
        raise UserError(_mistake(function, args, prog))
    return bound


def _binder(function: Callable) -> Callable[..., functools.partial]:
    """A function with the parameters and help of `function` that only binds them."""

    def bind(*values: Any, **named: Any) -> functools.partial:
        return functools.partial(function, *values, **named)

    hints = typing.get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())
    for i, one in enumerate(parameters):
        if one.kind is inspect.Parameter.POSITIONAL_ONLY:
            shown = one.name.upper() if one.default is inspect.Parameter.empty else f"[{one.name.upper()}]"
            hints[one.name] = Annotated[hints[one.name], tyro.conf.arg(metavar=shown)]
        if one.default is False:
            hints[one.name] = tyro.conf.FlagCreatePairsOff[hints[one.name]]  # no --no_json
        parameters[i] = one.replace(annotation=hints[one.name])
    bind.__signature__, bind.__annotations__ = inspect.Signature(parameters), hints
    # tyro would keep the line breaks of a parameter's description.
    bind.__doc__ = re.sub(r"\n {4,}", " ", inspect.getdoc(function) or "")
    return bind


def retyped(function: Callable, positional: int, **hints: Any) -> Callable:
    """`function` for the command line: its first parameters positional, and some of the types in `hints` instead."""

    def call(*values: Any, **named: Any) -> Any:
        return function(*values, **named)

    call.__doc__, call.__annotations__ = function.__doc__, typing.get_type_hints(function) | hints
    parameters = list(inspect.signature(function).parameters.values())
    for i in range(positional):
        parameters[i] = parameters[i].replace(kind=inspect.Parameter.POSITIONAL_ONLY)
    call.__signature__ = inspect.Signature(parameters)
    return call


@dataclass(frozen=True)
class _Option:
    """What a parameter accepts."""

    hint: Any
    required: bool = False
    positional: bool = False
    flag: bool = False  # takes no value

    @property
    def values(self) -> int | None:
        """How many values it takes; None: any number."""
        origins = {typing.get_origin(hint) for hint in _alternatives(self.hint)}
        return 0 if self.flag else None if origins & {list, tuple, Sequence} else 1


def _options(function: Callable) -> dict[str, _Option]:
    """Every parameter by name, those of dataclasses by their dotted field names."""
    hints = typing.get_type_hints(function)
    found: dict[str, _Option] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        if is_dataclass(hint):
            found |= {field: _Option(kind) for field, kind in fields(hint).items()}
            continue
        required = parameter.default is inspect.Parameter.empty
        positional = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        found[name] = _Option(hint, required, positional, flag=hint is bool)
        if parameter.default is True:
            found[f"no_{name}"] = found[name]
    return found


def fields(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every field of a nested dataclass."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        found |= fields(hint, f"{prefix}{name}.") if is_dataclass(hint) else {prefix + name: hint}
    return found


def _mistake(function: Callable, args: Sequence[str], prog: str) -> str:
    """What is wrong with `args`, which tyro has refused."""
    options = _options(function)
    named = {name: option for name, option in options.items() if not option.positional}
    groups: list[tuple[str, list[str]]] = [("", [])]  # an option and what follows it
    for word in args:
        if word.startswith("-") and not _fits(float, word):
            name, equals, value = word.lstrip("-").partition("=")
            groups.append((name.replace("-", "_"), [value] if equals else []))
        else:
            groups[-1][1].append(word)
    free = list(groups[0][1])
    for name, values in groups[1:]:
        if name not in named:
            close = difflib.get_close_matches(name, named, n=1)
            return f"unknown option {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"see `{prog} --help`")
        option = named[name]
        if not values and option.values != 0:
            return f"{name} needs a value, {_words(option.hint)}"
        taken = values[: option.values]
        for value in taken:
            if not _fits(option.hint, value):
                return f"{name}={value} must be {_words(option.hint)}"
        free += values[len(taken) :]
    positional = {name: option for name, option in options.items() if option.positional}
    if missing := list(positional)[len(free) :]:
        return f"{missing[0].upper()} is missing; see `{prog} --help`"
    given = {name for name, _ in groups}
    if missing := [name for name, option in named.items() if option.required and name not in given]:
        texts = {one.arg_name: one.description for one in docstring_parser.parse(inspect.getdoc(function) or "").params}
        about = " ".join((texts.get(missing[0]) or "").rstrip(".").split())
        return f"--{missing[0]} is missing{': ' * bool(about)}{about}; see `{prog} --help`"
    left_over = free[len(positional) :] or free
    takes = " ".join([*map(str.upper, positional), "[--OPTION VALUE ...]"])
    return f"cannot make sense of {left_over[0]!r}: usage is {prog} {takes}; see `{prog} --help`"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _fits(hint: Any, text: str) -> bool:
    """Whether `text` is a value of that type."""
    if str in _alternatives(hint):
        return True
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            tyro.cli(hint, args=[text], add_help=False, config=[tyro.conf.FlagConversionOff])
    except SystemExit:
        return False
    return True


def _words(hint: Any) -> str:
    """A type as a user would name it."""
    names = {int: "an integer", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    if len(parts := _alternatives(hint)) > 1:
        return " or ".join(map(_words, parts))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return names.get(hint, "one or several texts")
