"""Command-line words (`--optim.peak_lr 1e-3`) and notebook values into typed fields and arguments.

tyro reads them by the type hints and writes the help. For a mistake it prints a box of many lines, which differs
between its releases, so `_explain_mistake` finds the mistake again and describes it in one line.
"""

import contextlib
import contextvars
import difflib
import functools
import inspect
import io
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal

import docstring_parser
import tyro

from diffusionlm.errors import UserError

# Marks a parameter whose fields become options without a prefix of its own (--model.d_model, not --cfg.model.d_model),
# truth values included: `--model.causal True`. A truth value that is itself a parameter is a flag: `--json`.
SETTINGS = (tyro.conf.arg(name=""), tyro.conf.FlagConversionOff)


def parse(function: Callable, args: Sequence[str], prog: str) -> Callable[[], Any]:
    """Bind `args` to the parameters of `function`, which is not called yet; `--help` prints the help and exits.

    Positional-only parameters are positional here too. All others are options, with dots between the levels of
    dataclasses; their help is the docstring's, or the comment at the field.

    Args:
      function: typed, with a docstring.
      args: the words of the command line.
      prog: how the command is called, for the help.

    Raises:
      UserError: an unknown option, a value of another type, or something missing or superfluous.
    """
    if _describing.get():
        raise _Described(function)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            bound, unknown = tyro.cli(
                _binder(function), prog=prog, args=list(args), use_underscores=True, return_unknown_args=True
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_explain_mistake(function, args, prog)) from None
    if unknown or () in bound.args or [] in bound.args:  # tyro lets a positional list be empty
        raise UserError(_explain_mistake(function, args, prog))
    return bound


def given(args: Sequence[str]) -> set[str]:
    """Return the names of the options that the words of a command line set, also of those set to a default."""
    return {word.lstrip("-").partition("=")[0].replace("-", "_") for word in args if word.startswith("--")}


class _Described(Exception):
    """Ends a command at the point where it would read its words."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function


_describing = contextvars.ContextVar("_describing", default=False)


def described_by(command: Callable[[], Any]) -> "dict[str, Option]":
    """Return the parameters of the function for which a command calls `parse`; nothing is read, and it ends there."""
    token = _describing.set(True)
    try:
        command()
    except _Described as described:
        return _options(described.function)
    finally:
        _describing.reset(token)
    raise AssertionError("the command did not read its words")


def _binder(function: Callable) -> Callable[..., functools.partial]:
    """Return a function with the parameters and help of `function` that only binds them."""

    def bind(*values: Any, **options: Any) -> functools.partial:
        return functools.partial(function, *values, **options)

    hints = typing.get_type_hints(function, include_extras=True)
    parameters = list(inspect.signature(function).parameters.values())
    for i, parameter in enumerate(parameters):
        name = parameter.name
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            metavar = name.upper() if parameter.default is inspect.Parameter.empty else f"[{name.upper()}]"
            hints[name] = Annotated[hints[name], tyro.conf.arg(metavar=metavar)]
        if parameter.default is False:
            hints[name] = tyro.conf.FlagCreatePairsOff[hints[name]]  # no --no_json
        parameters[i] = parameter.replace(annotation=hints[name])
    _set_signature(bind, inspect.Signature(parameters))
    bind.__annotations__ = hints
    # tyro would keep the line breaks of a parameter's description.
    bind.__doc__ = re.sub(r"\n {4,}", " ", inspect.getdoc(function) or "")
    return bind


def retyped(function: Callable, positional: int, fixed: Mapping[str, Any] | None = None, **hints: Any) -> Callable:
    """Return `function` for the command line, with other types for some parameters.

    Args:
      function: the function that is called.
      positional: the number of its first parameters that become positional.
      fixed: parameters that the command line does not set, and their values.
      **hints: parameter -> the type that the command line reads instead.
    """
    fixed = dict(fixed or {})

    def call(*values: Any, **options: Any) -> Any:
        return function(*values, **options, **fixed)

    call.__doc__, call.__annotations__ = function.__doc__, typing.get_type_hints(function) | hints
    parameters = [each for each in inspect.signature(function).parameters.values() if each.name not in fixed]
    for i in range(positional):
        parameters[i] = parameters[i].replace(kind=inspect.Parameter.POSITIONAL_ONLY)
    _set_signature(call, inspect.Signature(parameters))
    return call


def _set_signature(function: Any, signature: inspect.Signature) -> None:
    """Make `inspect.signature`, which tyro asks, see other parameters than those written."""
    function.__signature__ = signature


@dataclass(frozen=True)
class Option:
    """The values that an option or a positional parameter accepts."""

    hint: Any
    required: bool = False
    positional: bool = False
    flag: bool = False  # takes no value
    unset: bool = False  # its default is None

    @property
    def values(self) -> int | None:
        """The number of values that it takes; None: any number."""
        origins = {typing.get_origin(hint) for hint in alternatives(self.hint)}
        return 0 if self.flag else None if origins & {list, tuple, Sequence} else 1


def _options(function: Callable) -> dict[str, Option]:
    """Return every parameter by name, those of dataclasses by their dotted field names."""
    hints = typing.get_type_hints(function)
    options: dict[str, Option] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint):
            options |= {field: Option(kind) for field, kind in fields(hint).items()}
            continue
        required = parameter.default is inspect.Parameter.empty
        positional = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        options[name] = Option(hint, required, positional, flag=hint is bool, unset=parameter.default is None)
        if parameter.default is True:
            options[f"no_{name}"] = options[name]
    return options


def fields(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return dotted name -> type of every field of a nested dataclass."""
    hints: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        nested = isinstance(hint, type) and is_dataclass(hint)
        hints |= fields(hint, f"{prefix}{name}.") if nested else {prefix + name: hint}
    return hints


def _explain_mistake(function: Callable, args: Sequence[str], prog: str) -> str:
    """Describe in one line what is wrong with `args`, which tyro has refused."""
    parameters = _options(function)
    positional = {name: option for name, option in parameters.items() if option.positional}
    options = {name: option for name, option in parameters.items() if not option.positional}
    values, groups = _group(args)
    for name, words in groups:
        if name not in options:
            close = difflib.get_close_matches(name.lstrip("-"), options, n=1)
            return f"unknown option {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"see `{prog} --help`")
        option = options[name]
        if not words and option.values != 0:
            return f"{name} needs a value, {_words(option.hint)}"
        taken = words[: option.values]
        for value in taken:
            if not _fits(option.hint, value):
                words = _words(option.hint)
                words = words.removesuffix(" or None") + ", or be left out" if option.unset else words
                return f"{name}={value} must be {words}"
        values += words[len(taken) :]
    for (name, option), value in zip(positional.items(), values, strict=False):
        if not _fits(option.hint, value):
            return f"{name}={value} must be {_words(option.hint)}"
    used = {name for name, _ in groups}
    missing = [(name.upper(), name) for name in list(positional)[len(values) :]]
    missing += [(f"--{name}", name) for name, option in options.items() if option.required and name not in used]
    if missing:
        wanted = [f"{word} ({text})" if (text := _description(function, name)) else word for word, name in missing]
        return f"missing {' and '.join(wanted)}; see `{prog} --help`"
    superfluous = values[len(positional) :] or values or list(args) or [""]
    usage = " ".join([*map(str.upper, positional), "[--OPTION VALUE ...]"])
    return f"cannot make sense of {superfluous[0]!r}: usage is {prog} {usage}; see `{prog} --help`"


def _group(args: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the words before the first option, and each option with the words that follow it."""
    values: list[str] = []
    groups: list[tuple[str, list[str]]] = []
    for word in args:
        if word.startswith("-") and not _fits(float, word):
            name, equals, value = word.partition("=")
            dashes = len(name) - len(name.lstrip("-"))
            name = name[dashes:].replace("-", "_")
            groups.append((name if dashes == 2 or len(name) == 1 else "-" * dashes + name, [value] if equals else []))
        else:
            (groups[-1][1] if groups else values).append(word)
    return values, groups


def _description(function: Callable, parameter: str) -> str:
    """Return the docstring's description of a parameter as one line, without the full stop."""
    documented = docstring_parser.parse(inspect.getdoc(function) or "").params
    text = next((entry.description for entry in documented if entry.arg_name == parameter), None)
    return " ".join((text or "").rstrip(".").split())


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or a type by itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _fits(hint: Any, text: str) -> bool:
    """Return True if `text` is a value of that type."""
    if str in alternatives(hint):
        return True
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            tyro.cli(hint, args=[text], add_help=False, config=[tyro.conf.FlagConversionOff])
    except SystemExit:
        return False
    return True


def _words(hint: Any) -> str:
    """Return a type as a user would name it."""
    names = {int: "an integer", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    if len(parts := alternatives(hint)) > 1:
        return " or ".join(map(_words, parts))
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return names.get(hint, "one or several texts")
