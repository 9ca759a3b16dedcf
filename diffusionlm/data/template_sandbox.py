"""A Jinja environment for templates that we did not write: they see data only, change nothing, and end.

Jinja's sandbox keeps templates away from Python. Here they are also bounded: every turn of a loop, call, filter and new
value is charged by its size, texts have a greatest length, and what could make a large value of a small one in a single
operation is left out or checked first. Chat templates need none of it.
"""

import contextlib
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_TEXT = 1 << 16  # characters that a text may always have
_WORK = (
    1 << 18
)  # units of work, which may take a few seconds; one is charged for 256 characters of a value that is made,
_TURN, _CALL = 4, 16  # and these for a turn of a loop and for a call
_MEMBERS = 4  # members that are counted for one unit
_READ = 32  # characters or members that are compared, searched or sliced for one unit
_DIGITS = 20  # to which a number may be rounded
_BITS = 2048  # of a number that is computed with
_PATH = 256  # characters of the path of an attribute
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

    intercepted_binops = frozenset(["+", "*", "**", "%", "//"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self._work_left, self._longest = _WORK, _TEXT
        self.filters = {name: self._charged(name, self.filters[name]) for name in _FILTERS}
        self.filters |= {"tojson": self._to_json, "bounded": self._bounded, "counted": self._counted}
        self.filters |= {"read": self._read, "concatenated": self._concatenated}
        self.tests = {name: self._charged_test(test) for name, test in self.tests.items()}
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
        given, _ = _measure(variables, 1 << 40)
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
        """Return True if a template may use an attribute: of data and loops, and of texts only bounded methods."""
        if isinstance(obj, str):
            open_here = attr in _TEXT_METHODS
        else:
            open_here = isinstance(obj, Mapping | list | tuple | Namespace | LoopContext)
        return open_here and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Return None: `format` is a method like others, and left out, since a width makes a text of any length."""

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function for a template."""
        self._charge_call(getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None), args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute what an operator gives."""
        if any(isinstance(side, int) and side.bit_length() > _BITS for side in (left, right)):
            raise TooMuchWork(f"it uses {operator} on numbers of more than {_BITS} bits")
        if operator in ("*", "**"):
            self._require_small_product(operator, left, right)
        if operator == "%" and isinstance(left, str):
            if re.search(r"%[^a-zA-Z%]*(\d{3}|\*)", left) or ("%(" in left and re.search(r"\d{3}|\*", left)):
                raise TooMuchWork("it pads texts")
            self._require_short(len(left) + left.count("%") * self._size(right))
        self._charge(1)
        return self._bounded(super().call_binop(context, operator, left, right))

    def _require_small_product(self, operator: str, left: Any, right: Any) -> None:
        text, times = (left, right) if isinstance(left, str) else (right, left)
        if operator == "*" and isinstance(text, str) and isinstance(times, int):
            return self._require_short(len(text) * times)
        if not all(isinstance(side, int | float) and abs(side) < 1 << 31 for side in (left, right)):
            raise TooMuchWork(f"it uses {operator} on other values than small numbers")
        if operator == "**" and right > 64:
            raise TooMuchWork(f"it takes a power of {right}")
        return None

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in list(template.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "counted")
        _bound_values(template)
        return template

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        names = list(signature.parameters)
        first = int(hasattr(inspect.unwrap(function), "jinja_pass_arg"))
        dropped = int(hasattr(function, "jinja_pass_arg")) - first  # a context that only Jinja's own wrapper takes

        @functools.wraps(function)  # also copies the marks by which Jinja passes its context first
        def charged(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args[dropped:], **kwargs)
            value, *others = bound.args[first:]
            named = dict(zip(names[first + 1 :], others, strict=False)) | bound.kwargs
            self._require_safe_arguments(name, value, named)
            if name in ("length", "count"):  # which look at no member
                self._charge(_CALL)
            else:
                self._charge_call(name, value, others, bound.kwargs)
            return function(*args, **kwargs)

        return charged

    def _charged_test(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def charged(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                self._read(value)
            return function(*args, **kwargs)

        return charged

    def _require_safe_arguments(self, name: str, value: Any, named: Mapping[str, Any]) -> None:
        """Refuse arguments by which a filter makes much of little."""
        attribute = named.get("attribute")
        if isinstance(attribute, str) and len(attribute) > _PATH:
            raise TooMuchWork(f"it names an attribute by more than {_PATH} characters")
        if name == "round":
            precision = named.get("precision", 0)
            if not isinstance(precision, int) or abs(precision) > _DIGITS:
                raise TooMuchWork(f"it rounds to other than at most {_DIGITS} digits")
        if name == "join" and attribute is not None:
            parts = value if isinstance(value, list | tuple) else ()
            if "." in str(attribute) or not all(isinstance(part, Mapping | list | tuple | str) for part in parts):
                raise TooMuchWork("it joins attributes of other values than data")

    def _charge_call(
        self, name: str, value: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Charge a call of a method, or of a filter, of a value, by the size of all that it is given."""
        size = sum(self._size(each) for each in (value, *args, *(kwargs or {}).values()))
        self._require_short(size)
        if name == "join":  # of a separator, or of a list
            is_filter = not (isinstance(value, str) and args and not isinstance(args[0], str | jinja2.Undefined))
            parts, separator = (value, args[0] if args else "") if is_filter else (args[0], value)
            if not isinstance(parts, list | tuple | str | jinja2.Undefined):
                raise TooMuchWork("it joins what is not a list; put `| list` before `| join`")
            size += self._size(separator) * _size_of_list(parts)
            if isinstance(value, str) and args:  # a separator and a text may be either way round
                size += len(value) * _size_of_list(args[0])
        if name == "replace" and len(args) > 1:
            size += str(value).count(str(args[0])) * self._size(args[1])
        self._require_short(size)
        self._charge(_CALL + size // 256)

    def _to_json(self, value: Any, indent: int | None = None, **options: Any) -> str:
        self._charge_call("tojson", value)
        if indent is not None and not 0 <= indent <= 8:
            raise TooMuchWork(f"it indents by {indent}")
        known = {"ensure_ascii": False, "separators": None, "sort_keys": False}
        return json.dumps(value, indent=indent, **{name: options.get(name, default) for name, default in known.items()})

    def _bounded(self, value: Any) -> Any:
        size = self._size(value)
        self._charge(size // 256)
        self._require_short(size)
        return value

    def _read(self, value: Any) -> Any:
        self._charge(1 + self._size(value) // _READ)
        return value

    @jinja2.pass_eval_context
    def _concatenated(self, context: nodes.EvalContext, values: list[Any]) -> str:
        size = sum(self._size(value) for value in values)
        self._require_short(size)
        self._charge(1)
        return self._bounded((markup_join if context.autoescape else str_join)(values))

    def _size(self, value: Any) -> int:
        """Return how many characters and members a value has, and charge the counting."""
        size, members = _measure(value, self._longest)
        self._charge(members // _MEMBERS)
        return size

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
    """Bound every value that a template builds of others or reads, in place; numbers and names are small already."""
    for field, child in node.iter_fields():
        children = child if isinstance(child, list) else [child]
        for k, value in enumerate(children):
            if not isinstance(value, nodes.Node):
                continue
            _bound_values(value)
            bounded = _bounded_node(value)
            if isinstance(child, list):
                child[k] = bounded
            else:
                setattr(node, field, bounded)


def _bounded_node(node: nodes.Node) -> nodes.Node:
    if isinstance(node, nodes.Compare):
        for side in (node, *node.ops):
            side.expr = _filtered(side.expr, "read")
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        node.node = _filtered(node.node, "read")
    elif isinstance(node, nodes.Concat):
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "concatenated")
    elif isinstance(node, nodes.List | nodes.Tuple | nodes.Dict) and getattr(node, "ctx", "load") == "load":
        return _filtered(node, "bounded")
    return node


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _measure(value: Any, limit: int) -> tuple[int, int]:
    """Return how many characters and members a value has, all told, and how many members; it stops above the limit."""
    total, members, waiting = 0, 0, [value]
    while waiting and total <= limit:
        value = waiting.pop()
        total += 1
        members += 1
        if isinstance(value, Namespace):
            value = object.__getattribute__(value, "_Namespace__attrs")
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, Mapping):
            total += len(value)
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple | set | range):
            total += len(value)
            waiting += value if not isinstance(value, range) else ()
    return total, members


def _size_of_list(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | Mapping | range) else 0


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
