"""Optimised HLO text as instructions; what they mean is in `diffusionlm.compile_check.hlo`."""

import functools
import math
import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Array:
    """One array of a result."""

    bits: int
    shape: tuple[int, ...]
    hbm: bool  # and not in one of the small memories

    @property
    def bytes(self) -> int:
        return -(-self.bits * math.prod(self.shape) // 8)


@dataclass(frozen=True)
class Instruction:
    """One line."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of the result
    operands: tuple[str, ...]
    arguments: str  # the text between the brackets
    attributes: str
    root: bool

    def refers(self, attribute: str) -> str:
        """The computation that an attribute names; empty: none."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]  # by name, in order


@dataclass(frozen=True)
class Module:
    """The computations by name."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """The instructions of a module.

    Raises:
      ValueError: the text is no HLO module.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)[1]
            current = computations.setdefault(name, {})
            entry = name if line.startswith("ENTRY ") else entry
        elif line == "}":
            current = None
        elif current is not None and line.startswith("  ") and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
        elif current:  # kernels carry texts of several lines in their attributes
            last = next(reversed(current))
            current[last] = replace(current[last], attributes=f"{current[last].attributes}\n{line}")
    if not entry:
        raise ValueError("the text has no ENTRY computation: it is no HLO module")
    return Module(computations, entry)


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
    """Where the bracket that opens at `opening` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.start()
    raise ValueError(f"brackets do not close in {text[:80]!r}")


def _arrays(text: str) -> tuple[Array, ...]:
    found = re.findall(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?", text)
    return tuple(
        Array(_bits(kind), tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size), "S(" not in layout)
        for kind, sizes, layout in found
    )


@functools.cache
def _bits(kind: str) -> int:
    """Of one element: bf16 and f8e4m3fn name theirs, pred has a byte, token nothing."""
    found = re.match(r"[a-z]+?(\d+)", kind)
    return int(found[1]) if found else 8 if kind == "pred" else 0
