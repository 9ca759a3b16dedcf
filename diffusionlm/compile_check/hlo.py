"""Read the cost of one run of a compiled program from its optimised HLO text: collectives, matmul FLOPs, HBM traffic.

These are pure functions of the text. The body of a loop counts as often as the loop runs, and nested loops multiply;
XLA's own counts see every body once. All numbers are for one device.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from diffusionlm.compile_check.collectives import KINDS, Collective, read_collective, read_send
from diffusionlm.compile_check.hlo_text import Computation, Instruction, Module, parse, root
from diffusionlm.compile_check.kernels import Kernel, fused, read_kernel

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "domain", "add-dependency", "copy-done", "slice-done", "async-done", "async-update"}
_FREE |= {"send-done", "recv", "recv-done", "call-done", "call-update", *(f"{kind}-done" for kind in KINDS)}


@dataclass(frozen=True)
class ProgramCosts:
    """The work of one run of a program on one device.

    Attributes:
      collectives: its collectives.
      kernels: its other instructions that take time.
      unknown_loops: the number of loops whose trip count depends on data and is not known; they count once.
    """

    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    unknown_loops: int


def analyse(text: str, trip_counts: Mapping[str, int] | None = None) -> ProgramCosts:
    """Return the work of an optimised HLO module (`jax.stages.Compiled.as_text()`).

    Args:
      text: the module.
      trip_counts: trip counts of loops whose length depends on data, by the `jax.named_scope` that they were written
        in; without one, such a loop counts once.

    Raises:
      ValueError: the text has no entry computation, or an unknown notation.
    """
    module = parse(text)
    devices = math.prod(map(int, re.findall(r"(?:replica_count|num_partitions)=(\d+)", text[: text.find("\n")])))
    counter = _Counter(module, devices, trip_counts or {})
    counter.visit(module.entry, 1)
    return ProgramCosts(tuple(counter.collectives), tuple(counter.kernels), counter.unknown_loops)


@dataclass
class _Counter:
    """Adds up the work of the computations that it visits.

    Attributes:
      module: the program.
      devices: the number of devices that run it.
      trip_counts: as for `analyse`.
      collectives: those met so far.
      kernels: those met so far.
      unknown_loops: their number so far.
    """

    module: Module
    devices: int
    trip_counts: Mapping[str, int]
    collectives: list[Collective] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    unknown_loops: int = 0

    def visit(self, name: str, runs: int) -> None:
        """Add the work of `runs` runs of a computation."""
        computation = self.module.computations[name]
        channels: set[str] = set()  # of the collectives inside fusions
        for instruction in computation.values():
            opcode = instruction.opcode
            kind = opcode.removesuffix("-start")
            if opcode in _FREE:
                continue
            if kind in KINDS:
                self.collectives.append(read_collective(instruction, computation, runs, self.devices, opcode != kind))
            elif opcode == "send":
                if collective := read_send(instruction, runs):
                    self.collectives.append(collective)
            elif opcode == "while":
                trips = self._trip_count(instruction)
                self.unknown_loops += trips is None
                self.visit(instruction.reference("body"), runs * (1 if trips is None else trips))
            elif opcode == "conditional":
                self._merge(self._dearest_branch(instruction, runs))
            elif opcode == "call":
                self.visit(instruction.reference("to_apply"), runs)
            elif opcode in ("async-start", "call-start"):
                self._visit_asynchronously(instruction.reference("to_apply") or instruction.reference("calls"), runs)
            else:
                self._add_kernel(computation, instruction, runs, channels)

    def _fork(self) -> "_Counter":
        return _Counter(self.module, self.devices, self.trip_counts)

    def _merge(self, other: "_Counter") -> None:
        self.collectives += other.collectives
        self.kernels += other.kernels
        self.unknown_loops += other.unknown_loops

    def _visit_asynchronously(self, name: str, runs: int) -> None:
        """Add a computation that runs beside the others: on tpu7x, collectives on the SparseCores do."""
        beside = self._fork()
        beside.visit(name, runs)
        beside.collectives = [replace(collective, asynchronous=True) for collective in beside.collectives]
        beside.kernels = [replace(kernel, asynchronous=True) for kernel in beside.kernels]
        self._merge(beside)

    def _dearest_branch(self, instruction: Instruction, runs: int) -> "_Counter":
        """Return the work of the branch of a conditional that moves and computes the most."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = re.findall(r"%([\w.\-]+)", listed[1]) if listed else []
        names = names or [instruction.reference("true_computation"), instruction.reference("false_computation")]
        branches = []
        for name in names:
            branches.append(self._fork())
            branches[-1].visit(name, runs)

        def cost(branch: _Counter) -> float:
            computed = sum(kernel.runs * (kernel.flops + kernel.hbm_bytes) for kernel in branch.kernels)
            return computed + sum(collective.runs * collective.wire_bytes for collective in branch.collectives)

        return max(branches, key=cost)

    def _add_kernel(self, computation: Computation, instruction: Instruction, runs: int, channels: set[str]) -> None:
        """Add a kernel, and the asynchronous collectives that it drives if it is a fusion."""
        inner = fused(self.module, instruction)
        collectives = [x for x in inner.values() if x.opcode in KINDS]
        for collective in collectives:
            # The backend spreads one collective over several fusions, with a copy of it in each.
            channel = re.search(r"channel_id=\d+", collective.attributes)
            if channel and channel[0] in channels:
                continue
            if channel:
                channels.add(channel[0])
            self.collectives.append(read_collective(collective, inner, runs, self.devices, asynchronous=True))
        self.kernels.append(read_kernel(self.module, computation, instruction, runs, collectives))

    def _trip_count(self, loop: Instruction) -> int | None:
        """Return how often a loop runs: as XLA or the caller knows, or up to the limit in its condition; else None."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        scope = re.search(r"/([^/]+)/while$", loop.jax_operation)
        if scope and scope[1] in self.trip_counts:
            return self.trip_counts[scope[1]]
        condition = self.module.computations[loop.reference("condition")]
        comparison = root(condition)
        if comparison.opcode == "fusion":
            operands = {name: condition[name] for name in comparison.operands}
            inner = fused(self.module, comparison)
            condition, comparison = inner | operands, root(inner)
        if comparison.opcode != "compare" or "direction=LT" not in comparison.attributes:
            return None
        limits = [int(x.arguments) for x in condition.values() if _is_integer_constant(x)]
        return limits[0] if len(limits) == 1 else None


def _is_integer_constant(instruction: Instruction) -> bool:
    scalar = instruction.opcode == "constant" and instruction.arrays[0].shape == ()
    return scalar and re.fullmatch(r"\d+", instruction.arguments) is not None
