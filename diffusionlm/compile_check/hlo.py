"""What a compiled program does in one run, read from its optimised HLO text: collectives, matmul FLOPs, HBM traffic.

Pure functions of the text. What stands in the body of a loop counts as often as the loop runs, loops inside loops
multiply; XLA's own counts see every body once. All numbers are of one device.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from diffusionlm.compile_check.hlo_text import Array, Computation, Instruction, Module, parse

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
Groups = tuple[tuple[int, ...], ...]  # devices that talk to each other; of a permute, (source, target) pairs


@dataclass(frozen=True)
class Collective:
    """A collective operation."""

    kind: str  # of `KINDS`, as the backend chose it
    operand_bytes: int  # on each device
    groups: Groups  # as the program numbers its devices; between slices, of the slices
    runs: int
    asynchronous: bool  # computation may go on meanwhile
    where: str  # the JAX operation that it came from
    between_slices: bool = False  # over the data-centre network

    @property
    def group_size(self) -> int:
        return 2 if self.kind == "collective-permute" else max(map(len, self.groups), default=1)

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends in one run."""
        return wire_bytes(self.kind, self.operand_bytes, self.group_size)


@dataclass(frozen=True)
class Kernel:
    """Anything else that takes time."""

    flops: int  # of its matmuls
    hbm_bytes: int  # read and written
    runs: int
    asynchronous: bool  # a copy that goes on beside others
    custom: bool  # a hand-written kernel, whose FLOPs are not known
    where: str


@dataclass(frozen=True)
class Program:
    """One run of a program on one device."""

    collectives: tuple[Collective, ...]
    kernels: tuple[Kernel, ...]
    endless: int  # loops whose number of iterations only the data tell, counted once


def wire_bytes(kind: str, operand_bytes: float, n: int) -> float:
    """Bytes that each of n devices sends, on a ring, for a collective whose operand has `operand_bytes` on each.

    all-gather n-1 times the operand (so (n-1)/n of the result); all-reduce 2(n-1)/n; reduce-scatter and all-to-all
    (n-1)/n; a permute or broadcast once.
    """
    if kind in ("collective-permute", "collective-broadcast"):
        return float(operand_bytes)
    factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}
    return operand_bytes * factor.get(kind, (n - 1) / n)


def analyse(text: str, turns: Mapping[str, int] | None = None) -> Program:
    """The operations of an optimised HLO module (`jax.stages.Compiled.as_text()`).

    Args:
      text: the module.
      turns: how often loops run whose length the data decide, by the `jax.named_scope` that they were written in; what
        is left out counts once.

    Raises:
      ValueError: the text has no entry computation, or groups of devices in an unknown notation.
    """
    module = parse(text)
    collectives: list[Collective] = []
    kernels: list[Kernel] = []
    devices = math.prod(map(int, re.findall(r"(?:replica_count|num_partitions)=(\d+)", text[: text.find("\n")])))
    endless = _walk(_Context(module, devices, turns or {}), module.entry, 1, collectives, kernels)
    return Program(tuple(collectives), tuple(kernels), endless)


# --- what runs, and how often


class _Context(NamedTuple):
    module: Module
    devices: int
    turns: Mapping[str, int]


_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"opt-barrier", "domain", "add-dependency", "copy-done", "slice-done", "async-done", "async-update"}
_FREE |= {"send-done", "recv", "recv-done", "call-done", "call-update"}
_COPIES = {"copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start"}


def _walk(context: _Context, name: str, runs: int, collectives: list[Collective], kernels: list[Kernel]) -> int:
    """Adds what a computation does in `runs` runs; returns the number of endless loops in it."""
    module, devices, _ = context
    computation = module.computations[name]
    endless, channels = 0, set()

    def into(other: str, times: int = runs) -> int:
        return _walk(context, other, times, collectives, kernels)

    for one in computation.values():
        kind = one.opcode.removesuffix("-start")
        if one.opcode in _FREE or (one.opcode.endswith("-done") and one.opcode.removesuffix("-done") in KINDS):
            continue
        if kind in KINDS:
            collectives.append(_collective(one, computation, runs, devices, one.opcode != kind))
        elif one.opcode == "send":
            collectives += _between_slices(one, runs)
        elif one.opcode == "while":
            trips = _trips(context, one)
            endless += (trips is None) + into(one.refers("body"), runs * (1 if trips is None else trips))
        elif one.opcode == "conditional":
            endless += _dearest_branch(context, one, runs, collectives, kernels)
        elif one.opcode == "call":
            endless += into(one.refers("to_apply"))
        elif one.opcode in ("async-start", "call-start"):  # tpu7x gives collectives to its SparseCores like this
            beside: tuple[list[Collective], list[Kernel]] = [], []
            name = one.refers("to_apply") or one.refers("calls")
            endless += _walk(context, name, runs, *beside)
            collectives += [replace(found, asynchronous=True) for found in beside[0]]
            kernels += [replace(found, asynchronous=True) for found in beside[1]]
        else:
            inner = module.computations.get(one.refers("calls"), {}) if one.opcode == "fusion" else {}
            inside = [x for x in inner.values() if x.opcode in KINDS]
            for x in inside:
                # The backend spreads an asynchronous collective over several fusions, with a copy of it in each.
                if (channel := re.search(r"channel_id=\d+", x.attributes)) and channel[0] in channels:
                    continue
                channels.add(channel and channel[0])
                collectives.append(_collective(x, inner, runs, devices, True))
            kernels.append(_kernel(module, computation, one, inner, inside, runs))
    return endless


def _dearest_branch(
    context: _Context, one: Instruction, runs: int, collectives: list[Collective], kernels: list[Kernel]
) -> int:
    listed = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
    names = re.findall(r"%([\w.\-]+)", listed[1]) if listed else []
    names = names or [one.refers("true_computation"), one.refers("false_computation")]
    branches = []
    for name in names:
        theirs: tuple[list[Collective], list[Kernel]] = [], []
        loops = _walk(context, name, runs, *theirs)
        cost = sum(k.runs * (k.flops + k.hbm_bytes) for k in theirs[1]) + sum(c.runs * c.wire_bytes for c in theirs[0])
        branches.append((cost, theirs, loops))
    _, (their_collectives, their_kernels), loops = max(branches, key=lambda branch: branch[0])
    collectives += their_collectives
    kernels += their_kernels
    return loops


def _trips(context: _Context, loop: Instruction) -> int | None:
    """How often a loop runs: as XLA or the caller says, or by the limit of a counter from 0 in its condition."""
    module = context.module
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    scope = re.search(r'op_name="[^"]*/([^/"]+)/while"', loop.attributes)
    if scope and scope[1] in context.turns:
        return context.turns[scope[1]]
    condition = module.computations[loop.refers("condition")]
    root = next(one for one in condition.values() if one.root)
    values = [condition[name] for name in root.operands]
    if root.opcode == "fusion":
        condition = module.computations[root.refers("calls")] | {one.name: one for one in values}
        root = next(one for one in module.computations[root.refers("calls")].values() if one.root)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    limits = [int(one.arguments) for one in condition.values() if one.opcode == "constant" and _is_count(one)]
    return limits[0] if len(limits) == 1 else None


def _is_count(one: Instruction) -> bool:
    return one.arrays[0].shape == () and re.fullmatch(r"\d+", one.arguments) is not None


def _where(one: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', one.attributes)
    return found[1] if found else ""


# --- collectives


def _collective(one: Instruction, computation: Computation, runs: int, devices: int, asynchronous: bool) -> Collective:
    operands = [array for name in one.operands if name in computation for array in computation[name].arrays]
    kind = one.opcode.removesuffix("-start")
    size = sum(array.bytes for array in operands)
    return Collective(kind, size, _groups(one.attributes, devices), runs, asynchronous, _where(one))


def _between_slices(one: Instruction, runs: int) -> list[Collective]:
    """What the TPU backend makes of a collective between slices: every device hands its part to the host's runtime."""
    found = re.search(r'_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="(\w+)"', one.attributes)
    if not found:
        return []
    kind = found[2].lower().replace("_", "-")
    slices = tuple(map(int, found[1].split(",")))
    known = kind if kind in KINDS else "collective-permute"  # ONE_TO_ONE
    return [Collective(known, one.arrays[0].bytes, (slices,), runs, True, _where(one), between_slices=True)]


def _groups(attributes: str, devices: int) -> Groups:
    """Groups of devices in any of HLO's notations: lists, pairs, iota tiles, mesh axes; none given: all devices."""
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return _listed(found[1] + "}")
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return _listed(found[1])
    if found := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _tuples(_iota(found[1]))
    axes = re.search(r"replica_groups=@?\w*mesh\[(.*?)\](?:, ?device_ids=\((.*?)\))? ?\{(.*?)\}", attributes)
    if axes:
        return _over_axes(*axes.groups())
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"unknown notation of device groups: {attributes[:200]!r}")
    return (tuple(range(devices)),)


def _listed(text: str) -> Groups:
    return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text))


def _iota(text: str) -> np.ndarray:
    """[2,4]<=[4,2]T(1,0): 0..7 in the shape (4, 2), transposed, read off in the shape (2, 4)."""
    shape, source, order = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", text).groups()
    shape, source = (tuple(map(int, (part or shape).split(","))) for part in (shape, source))
    ids = np.arange(math.prod(source)).reshape(source)
    return (ids.transpose(tuple(map(int, order.split(",")))) if order else ids).reshape(shape)


def _over_axes(mesh: str, order: str | None, axes: str) -> Groups:
    """mesh['a'=2,'b'=4] {'b'}: devices that differ in b only; 'b':(2)2 is the part of b of size 2 after its first 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if order:
        ids = _iota(order) if "<=" in order else np.array(re.findall(r"\d+", order), int)
    varying = {name: (int(pre or 1), int(size or sizes[name])) for name, pre, size in _axis_references(axes)}
    shape, moving = [], []
    for name, whole in sizes.items():
        pre, size = varying.get(name, (whole, 1))
        if name in varying:
            moving.append(len(shape) + 1)
        shape += [pre, size, whole // (pre * size)]
    still = [i for i in range(len(shape)) if i not in moving]
    count = math.prod(shape[i] for i in moving)
    return _tuples(ids.reshape(shape).transpose(still + moving).reshape(-1, count))


def _axis_references(axes: str) -> Iterator[tuple[str, str, str]]:
    yield from re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)


def _tuples(ids: np.ndarray) -> Groups:
    return tuple(map(tuple, ids.reshape(-1, ids.shape[-1]).tolist()))


# --- kernels


def _kernel(
    module: Module,
    computation: Computation,
    one: Instruction,
    inner: Computation,
    inside: list[Instruction],
    runs: int,
) -> Kernel:
    moved = _traffic(computation, one, inner)
    # A fusion that also drives an asynchronous collective passes the buffers of that on; they are not its own traffic.
    passed = {array.shape for x in inside for array in (*x.arrays, *inner[x.operands[0]].arrays)}
    traffic = sum(array.bytes for array in moved if array.hbm and array.shape not in passed)
    custom = one.opcode == "custom-call" and "tpu_custom_call" in one.attributes
    flops = _flops(module, computation, one, inner)
    return Kernel(flops, traffic, runs, one.opcode in _COPIES, custom, _where(one))


def _traffic(computation: Computation, one: Instruction, inner: Computation) -> list[Array]:
    """What an instruction reads and writes; of a slice of a large array only the slice."""
    operands = [computation[name].arrays for name in one.operands if name in computation]
    flat = [array for arrays in operands for array in arrays]
    if one.opcode in ("dynamic-slice", "gather", "slice", "broadcast", "iota"):
        return [*one.arrays, *one.arrays]
    if one.opcode == "dynamic-update-slice":
        return [*operands[1], *operands[1]]
    if one.opcode in _COPIES:  # the result is (source, target, flag); a slice reads no more than it writes
        target = one.arrays[1:2]
        return [*target, *(replace(array, hbm=flat[0].hbm) for array in target)]
    if one.opcode == "custom-call" and "Bitcast" in one.attributes:
        return []
    if not inner:
        return [*flat, *one.arrays]
    parameters = {int(x.arguments): x for x in inner.values() if x.opcode == "parameter"}
    read = [
        part
        for i, arrays in enumerate(operands)
        for part in (_read(inner, parameters[i], arrays) if i in parameters else arrays)
    ]
    return [*read, *_written(inner, one.arrays)]


def _read(inner: Computation, parameter: Instruction, arrays: tuple[Array, ...]) -> list[Array]:
    """The parts of a fusion's operand that it looks at."""
    parts: list[Array] = []
    reached = [parameter.name]
    for name in reached:
        for user in (x for x in inner.values() if name in x.operands):
            if user.opcode == "bitcast":
                reached.append(user.name)
            elif user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
                parts += [replace(array, hbm=arrays[0].hbm) for array in user.arrays]
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                return list(arrays)
    return parts


def _written(inner: Computation, arrays: tuple[Array, ...]) -> list[Array]:
    """The parts of a fusion's results that it writes: of an array updated in place, the update."""
    root = next(x for x in inner.values() if x.root)
    results = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(arrays):
        return list(arrays)
    written = []
    for result, array in zip(results, arrays, strict=True):
        while result.opcode in ("bitcast", "copy", "convert") and result.operands[0] in inner:
            result = inner[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            update = inner[result.operands[1]].arrays[0]
            array = replace(array, shape=update.shape)
        written.append(array)
    return written


def _flops(module: Module, computation: Computation, one: Instruction, inner: Computation) -> int:
    """FLOPs of the matmuls in an instruction: 2 m k n each."""
    if one.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)[1]
        shape = computation[one.operands[0]].arrays[0].shape
        return 2 * math.prod(one.arrays[0].shape) * math.prod(shape[int(i)] for i in contracted.split(",") if i)
    if one.opcode == "convolution":
        return _convolution_flops(computation, one)
    return sum(
        _flops(module, inner, x, module.computations.get(x.refers("calls"), {}) if x.opcode == "fusion" else {})
        for x in inner.values()
        if x.opcode in ("dot", "convolution", "fusion")
    )


def _convolution_flops(computation: Computation, one: Instruction) -> int:
    """The TPU backend writes matmuls as convolutions, batches as windows over dilated or padded axes."""
    left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes).groups()
    shapes = [computation[name].arrays[0].shape for name in one.operands]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{(.*?)\}", one.attributes) or ["", ""])[1]))
    count = one.arrays[0].shape[result.index("b")] * one.arrays[0].shape[result.index("f")]
    count *= shapes[1][right.index("i")]
    for axis in filter(str.isdigit, left):
        i = int(axis)

        def setting(name: str, default: str, i: int = i) -> str:
            return window[name].split("x")[i] if name in window else default

        size = shapes[0][left.index(axis)]
        outputs = one.arrays[0].shape[result.index(axis)]
        stride, dilation, spread = (int(setting(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        low = int(setting("pad", "0_0").split("_")[0])
        taps = np.arange(int(setting("size", "1"))) * spread
        at = np.arange(outputs)[:, None] * stride + taps[None] - low
        count *= int(((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)).sum())
    return 2 * count
