"""A Jinja environment for templates that we did not write: they see data only, change nothing, and end.

Jinja's sandbox keeps templates away from Python. Here they are also bounded: every turn of a loop, call, filter and new
value is charged by its size, texts have a greatest length, and what could make a large value of a small one in a single
operation is left out or checked first. Chat templates need none of it.
"""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_TEXT = 1 << 16  # characters that a text may always have
_WORK = (
    1 << 18
)  # units of work, which may take a few seconds; one is charged for 256 characters of a value that is made,
_TURN, _CALL = 4, 16  # and these for a turn of a loop and for a call
_FILTERS = (
    "abs capitalize count d default dictsort first float int items join last length list lower map max min reject "
    "rejectattr replace reverse round safe select selectattr sort string title trim unique upper"
).split()
_TEXT_METHODS = frozenset(
    (
        "capitalize count endswith find index isalnum isalpha isdigit islower isspace isupper join lower lstrip "
        "partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith "
        "strip swapcase title upper"
    ).split()
)


_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, SyntaxError, AssertionError)


class TooMuchWork(SecurityError):
    """A template works or writes more than any chat template has to."""


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment in which `render` is bounded; for one thread."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self._work_left, self._longest = _WORK, _TEXT
        self.filters = {name: self._charged(name, self.filters[name]) for name in _FILTERS}
        self.filters |= {"tojson": self._to_json, "bounded": self._bounded, "counted": self._counted}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals["raise_exception"] = _raise_exception
        self.finalize = self._bounded

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Return what a template writes.

        Args:
          source: the template; its length bounds what compiling it costs.
          variables: its variables, JSON values.

        Raises:
          jinja2.TemplateError: it is malformed, refuses the variables, or works too much.
        """
        given = _size(variables, 1 << 40)
        self._work_left, self._longest = _WORK + given, _TEXT + 8 * given
        with _errors_of_templates():
            pieces, length = [], 0
            for piece in self.from_string(source).generate(variables):
                length += len(piece)
                self._charge(1)
                self._require_short(length)
                pieces.append(piece)
        return "".join(pieces)

    def check(self, source: str) -> None:
        """Raise `jinja2.TemplateError` for a template that cannot be compiled."""
        with _errors_of_templates():
            self.from_string(source)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return True if a template may use an attribute: of texts, only methods whose results are bounded."""
        return super().is_safe_attribute(obj, attr, value) and (not isinstance(obj, str) or attr in _TEXT_METHODS)

    def wrap_str_format(self, value: Any) -> None:
        """Return None: `format` is a method like others, and left out, since a width makes a text of any length."""

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function for a template."""
        self._charge_call(getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None), args)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute what an operator gives."""
        if operator in ("*", "**"):
            if not all(isinstance(side, int | float) and abs(side) < 1 << 31 for side in (left, right)):
                raise TooMuchWork(f"it uses {operator} on other values than small numbers")
            if operator == "**" and right > 64:
                raise TooMuchWork(f"it takes a power of {right}")
        if operator == "%" and isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\d{3}|\*)", left):
            raise TooMuchWork("it pads texts")
        self._charge(1)
        return self._bounded(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in list(template.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "counted")
        _bound_values(template)
        return template

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # also copies the marks by which Jinja passes its context first
        def charged(*args: Any, **kwargs: Any) -> Any:
            values = args[1:] if hasattr(function, "jinja_pass_arg") else args
            self._charge_call(name, values[0] if values else None, values[1:])
            return function(*args, **kwargs)

        return charged

    def _charge_call(self, name: str, value: Any, args: tuple[Any, ...]) -> None:
        """Charge a call of a method, or of a filter, of a value."""
        size = _size(value, self._longest)
        if name == "join":  # of a separator, or of a list
            parts = args[0] if isinstance(value, str) and args else value
            if isinstance(parts, Iterator):
                raise TooMuchWork("it joins what is not a list; put `| list` before `| join`")
            separator = value if isinstance(value, str) else args[0] if args else ""
            size += _size(parts, self._longest) + _size(separator, self._longest) * _size_of_list(parts)
        if name == "replace" and isinstance(value, str) and len(args) > 1:
            size += value.count(str(args[0])) * _size(args[1], self._longest)
        self._require_short(size)
        self._charge(_CALL + size // 256)

    def _to_json(self, value: Any, indent: int | None = None, **options: Any) -> str:
        self._charge_call("tojson", value, ())
        if indent is not None and not 0 <= indent <= 8:
            raise TooMuchWork(f"it indents by {indent}")
        known = {"ensure_ascii": False, "separators": None, "sort_keys": False}
        return json.dumps(value, indent=indent, **{name: options.get(name, default) for name, default in known.items()})

    def _bounded(self, value: Any) -> Any:
        size = _size(value, self._longest)
        self._charge(size // 256)
        self._require_short(size)
        return value

    def _counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._charge(_TURN)
            yield value

    def _charge(self, work: int) -> None:
        self._work_left -= work
        if self._work_left < 0:
            raise TooMuchWork("it does not end")

    def _require_short(self, length: int) -> None:
        if length > self._longest:
            raise TooMuchWork(f"it makes a text of more than {self._longest:,} characters")


@contextlib.contextmanager
def _errors_of_templates() -> Iterator[None]:
    """Turn what a template may raise into `jinja2.TemplateError`."""
    try:
        yield
    except (RecursionError, MemoryError) as error:
        raise TooMuchWork("it is nested too deeply") from error
    except _ERRORS as error:
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error


class _Generation(Extension):
    """`{% generation %}` marks an assistant's text for training; here it changes nothing."""

    tags: ClassVar[set[str]] = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]: Jinja's own

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _bound_values(node: nodes.Node) -> None:
    """Bound every value that a template builds of others, in place; numbers and names are small already."""
    for field, child in node.iter_fields():
        children = child if isinstance(child, list) else [child]
        for k, value in enumerate(children):
            if not isinstance(value, nodes.Node):
                continue
            _bound_values(value)
            loaded = getattr(value, "ctx", "load") == "load"
            if isinstance(value, nodes.Concat | nodes.List | nodes.Tuple | nodes.Dict) and loaded:
                bounded = _filtered(value, "bounded")
                if isinstance(child, list):
                    child[k] = bounded
                else:
                    setattr(node, field, bounded)


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _size(value: Any, limit: int) -> int:
    """Return how many characters and members a value has, all told; counting stops above the limit."""
    total, waiting = 0, [value]
    while waiting and total <= limit:
        value = waiting.pop()
        total += 1
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, Mapping):
            total += len(value)
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple | set | range):
            total += len(value)
            waiting += value if not isinstance(value, range) else ()
    return total


def _size_of_list(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | Mapping | range) else 0


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
