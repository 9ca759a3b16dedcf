"""Collectives of a compiled program: their groups of devices and the bytes that they send."""

import math
import re
from dataclasses import dataclass

import numpy as np

from diffusionlm.compile_check.hlo_text import Computation, Instruction

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
Groups = tuple[tuple[int, ...], ...]  # devices that talk to each other; for a permute, (source, target) pairs


@dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: one of `KINDS`, as the backend chose it.
      operand_bytes: bytes of the operand on each device.
      groups: the groups, in the program's numbering of devices; between slices, a group of slices.
      runs: how often it runs.
      asynchronous: True if computation may continue meanwhile.
      where: the JAX operation that it came from.
      between_slices: True if it uses the data-centre network.
    """

    kind: str
    operand_bytes: int
    groups: Groups
    runs: int
    asynchronous: bool
    where: str
    between_slices: bool = False

    @property
    def group_size(self) -> int:
        """The number of devices of the largest group."""
        return 2 if self.kind == "collective-permute" else max(map(len, self.groups), default=1)

    @property
    def wire_bytes(self) -> float:
        """The bytes that each device sends in one run."""
        return wire_bytes(self.kind, self.operand_bytes, self.group_size)


def wire_bytes(kind: str, operand_bytes: float, n: int) -> float:
    """Return the bytes that each of n devices sends on a ring, if the operand has `operand_bytes` on each.

    An all-gather sends n-1 times the operand (so (n-1)/n of the result), an all-reduce 2(n-1)/n of it, a reduce-scatter
    or all-to-all (n-1)/n, a permute or broadcast all of it once.
    """
    if kind in ("collective-permute", "collective-broadcast"):
        return float(operand_bytes)
    factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}
    return operand_bytes * factor.get(kind, (n - 1) / n)


def read_collective(
    instruction: Instruction, computation: Computation, runs: int, devices: int, asynchronous: bool
) -> Collective:
    """Return the collective that an instruction of a computation performs, in a program on `devices` devices."""
    operands = [array for name in instruction.operands if name in computation for array in computation[name].arrays]
    return Collective(
        kind=instruction.opcode.removesuffix("-start"),
        operand_bytes=sum(array.bytes for array in operands),
        groups=_groups(instruction.attributes, devices),
        runs=runs,
        asynchronous=asynchronous,
        where=instruction.jax_operation,
    )


def read_send(instruction: Instruction, runs: int) -> Collective | None:
    """Return the collective between slices that a send is part of, or None.

    The TPU backend turns such a collective into sends: every device hands its part to the runtime of its host.
    """
    match = re.search(
        r'_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="(\w+)"', instruction.attributes
    )
    if not match:
        return None
    slices, kind = tuple(map(int, match[1].split(","))), match[2].lower().replace("_", "-")
    return Collective(
        kind=kind if kind in KINDS else "collective-permute",  # megascale calls it ONE_TO_ONE
        operand_bytes=instruction.arrays[0].bytes,
        groups=(slices,),
        runs=runs,
        asynchronous=True,
        where=instruction.jax_operation,
        between_slices=True,
    )


def _groups(attributes: str, devices: int) -> Groups:
    """Return the groups in any of HLO's notations (lists, pairs, iota tiles, mesh axes); absent: one of all devices."""
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return _parse_lists(match[1] + "}")
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return _parse_lists(match[1])
    if match := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _rows(_parse_iota(match[1]))
    if match := re.search(r"replica_groups=@?\w*mesh\[(.*?)\](?:, ?device_ids=\((.*?)\))? ?\{(.*?)\}", attributes):
        return _parse_mesh_axes(*match.groups())
    if re.search(r"replica_groups=(?!\{\})", attributes):
        raise ValueError(f"unknown notation of device groups: {attributes[:200]!r}")
    return (tuple(range(devices)),)


def _parse_lists(text: str) -> Groups:
    return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text))


def _parse_iota(text: str) -> np.ndarray:
    """Return the ids of a tile: [2,4]<=[4,2]T(1,0) is 0..7 in the shape (4, 2), transposed, reshaped to (2, 4).

    [4,2]T(1,0) is the same in the shape of the tile itself.
    """
    match = re.fullmatch(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text)
    if not match:
        raise ValueError(f"not an iota tile: {text!r}")
    shape, source = (tuple(map(int, (part or match[1]).split(","))) for part in (match[1], match[2]))
    ids = np.arange(math.prod(source)).reshape(source)
    return (ids.transpose(tuple(map(int, match[3].split(",")))) if match[3] else ids).reshape(shape)


def _parse_mesh_axes(mesh: str, order: str | None, axes: str) -> Groups:
    """Return the groups of devices that differ in some axes of a mesh only.

    mesh['a'=2,'b'=4] {'b'} groups devices that differ in b; 'b':(2)2 is the part of b of size 2 after its first 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if order:
        ids = _parse_iota(order) if order.startswith("[") else np.array(re.findall(r"\d+", order), int)
    parts = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    shape, varying = [], []  # every mesh axis as three: before the part that varies, that part, and after it
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        if name in parts:
            varying.append(len(shape) + 1)
        shape += [before, part, size // (before * part)]
    fixed = [axis for axis in range(len(shape)) if axis not in varying]
    group_size = math.prod(shape[axis] for axis in varying)
    return _rows(ids.reshape(shape).transpose(fixed + varying).reshape(-1, group_size))


def _rows(ids: np.ndarray) -> Groups:
    return tuple(map(tuple, ids.reshape(-1, ids.shape[-1]).tolist()))
