"""Parse optimised HLO text into instructions, which `hlo` interprets."""

import functools
import math
import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Array:
    """One array of a result."""

    bits: int  # of an element
    shape: tuple[int, ...]
    hbm: bool  # False: in one of the small memories of the chip

    @property
    def bytes(self) -> int:
        """The size of the array in bytes."""
        return -(-self.bits * math.prod(self.shape) // 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: its name, without %.
      opcode: its operation.
      arrays: the arrays of its result.
      operands: the names of its operands.
      arguments: the text between its brackets.
      attributes: the text after its brackets.
      root: True if its result is that of the computation.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    @property
    def jax_operation(self) -> str:
        """The JAX operation that the instruction came from, with its scopes; empty if unknown."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def reference(self, attribute: str) -> str:
        """Return the name of the computation in an attribute; empty if the attribute is absent."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else ""


Computation = dict[str, Instruction]  # by name, in order


@dataclass(frozen=True)
class Module:
    """The computations of a program by name, and the name of the one that it starts with."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Return the computations of a module.

    Raises:
      ValueError: the text is not an HLO module.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            name = re.split(r"[^\w.\-]", line.removeprefix("ENTRY ").lstrip("%"), maxsplit=1)[0]
            current = computations.setdefault(name, {})
            entry = name if line.startswith("ENTRY ") else entry
        elif line == "}":
            current = None
        elif current is not None and line.startswith("  ") and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
        elif current:  # attributes of kernels contain text of several lines
            last = next(reversed(current))
            current[last] = replace(current[last], attributes=f"{current[last].attributes}\n{line}")
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is not an HLO module")
    return Module(computations, entry)


def root(computation: Computation) -> Instruction:
    """Return the instruction whose result is that of the computation."""
    return next(instruction for instruction in computation.values() if instruction.root)


def _instruction(line: str) -> Instruction:
    head, _, rest = line.strip().partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing]
    return Instruction(
        name=head.removeprefix("ROOT ").lstrip("%"),
        opcode=rest[:opening],
        arrays=_arrays(result),
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        arguments=arguments,
        attributes=rest[closing + 1 :],
        root=head.startswith("ROOT "),
    )


def _closing(text: str, opening: int) -> int:
    """Return the position at which the bracket that opens at `opening` closes."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    raise ValueError(f"brackets do not close in {text[:80]!r}")


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(_bits(dtype), tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size), "S(" not in layout)
        for dtype, sizes, layout in re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", text)
    )


@functools.cache
def _bits(dtype: str) -> int:
    """Return the bits of an element: bf16 and f8e4m3fn name theirs, pred has 8, token none."""
    match = re.match(r"[a-z]+?(\d+)", dtype)
    return int(match[1]) if match else 8 if dtype == "pred" else 0
