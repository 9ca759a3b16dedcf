"""Estimate the time of a compiled program on a TPU: a roofline, from its operations and the data sheet of the chip.

The terms add up to the estimate:
- compute: the FLOPs of the matmuls at the peak of the chip;
- memory: for each kernel, how much longer than its matmuls its operands and results need to pass through HBM;
- ici, dcn: the time of synchronous collectives, and what asynchronous ones need beyond compute and memory.

Every kernel and link is taken at its full published speed and nothing waits for the host, so the estimate is a lower
bound of the time and an upper bound of MFU. Matmuls of awkward shapes, element-wise arithmetic that nothing hides, and
stragglers come on top.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from diffusionlm.compile_check.collectives import Collective, wire_bytes
from diffusionlm.compile_check.hlo import ProgramCosts
from diffusionlm.hardware import Topology

HOP_SECONDS = 1e-6  # latency of an ICI hop (jax-ml.github.io/scaling-book/sharding)
DCN_SECONDS = 100e-6  # latency of a message between slices; an order of magnitude


@dataclass(frozen=True)
class Cost:
    """The bytes that each chip sends in one run of a collective, and the time that takes."""

    ici_bytes: float
    dcn_bytes: float
    ici_seconds: float
    dcn_seconds: float


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind, network, group size and synchrony, summed over one run of the program.

    Attributes:
      kind: one of `collectives.KINDS`.
      network: "ici" or "dcn".
      group_size: the number of devices of a group.
      asynchronous: True if computation may continue meanwhile.
      runs: how often they run.
      bytes: the bytes that each chip sends.
      seconds: the time they take.
      largest: the JAX operation that causes most of these bytes.
    """

    kind: str
    network: str
    group_size: int
    asynchronous: bool
    runs: int
    bytes: float
    seconds: float
    largest: str


@dataclass(frozen=True)
class Terms:
    """Seconds of one run; their sum is the estimate."""

    compute: float
    memory: float
    ici: float
    dcn: float

    @property
    def total(self) -> float:
        """The estimate, in seconds."""
        return self.compute + self.memory + self.ici + self.dcn


class Network:
    """The position in a topology of each device of a mesh, in the order of the compiled program."""

    def __init__(
        self,
        topology: Topology,
        devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]: a class at run time
    ):
        self.topology = topology
        axes = range(len(topology.shape))
        self.coordinates = [tuple(device.coords[axis] for axis in axes) for device in devices]
        self.slices = [getattr(device, "slice_index", 0) for device in devices]

    def cost(self, collective: Collective) -> Cost:
        """Return the cost of one run of a collective.

        A group that spans slices works within each slice first, so that each byte crosses only once.
        """
        chip, kind, operand = self.topology.chip, collective.kind, collective.operand_bytes
        group: tuple[int, ...] = collective.groups[0] if collective.groups else ()
        n = collective.group_size
        if collective.between_slices:
            ici, dcn, slices, speed, hops = 0.0, collective.wire_bytes, n, 1.0, 0
        elif kind == "collective-permute":
            crossing = any(self.slices[a] != self.slices[b] for a, b in collective.groups)
            ici, dcn = (0.0, float(operand)) if crossing else (float(operand), 0.0)
            speed, hops, slices = chip.link_bandwidth / chip.devices, 1, 1 + crossing
        else:
            slice_ids = [self.slices[device] for device in group]
            slices = len(set(slice_ids)) or 1
            ici, dcn = _split(kind, operand, n // slices, slices)
            speed, hops = self._within([d for d, i in zip(group, slice_ids, strict=True) if i == slice_ids[0]])
        phases = 2 if kind == "all-reduce" else 1
        dcn *= chip.devices  # the devices of a chip share its network card
        return Cost(
            ici_bytes=ici * chip.devices,
            dcn_bytes=dcn,
            ici_seconds=ici / speed + hops * phases * HOP_SECONDS if ici else 0.0,
            dcn_seconds=dcn / chip.dcn_bandwidth + phases * DCN_SECONDS if slices > 1 else 0.0,
        )

    def _within(self, group: Sequence[int]) -> tuple[float, int]:
        """Return the bytes/s that each device of a group sends over its links, and the longest path in hops.

        A full ring sends both ways along its axis; a line, or a part of a ring, is as fast as one link.
        """
        chip, links, hops = self.topology.chip, 0, 0
        for axis, side in enumerate(self.topology.shape):
            spanned = len({self.coordinates[device][axis] for device in group})
            if spanned > 1:
                ring = spanned == side and self.topology.wraps(axis)
                links += 2 if ring else 1
                hops += spanned // 2 if ring else spanned - 1
        if not links:  # the two devices of one chip
            return chip.hbm_bandwidth / chip.devices, 0
        return links * chip.link_bandwidth / chip.devices, hops


def _split(kind: str, operand: float, within: int, slices: int) -> tuple[float, float]:
    """Return the bytes that a device sends inside its slice and to others; a group has `within` devices in each."""
    if slices == 1:
        return wire_bytes(kind, operand, within), 0.0
    if kind == "all-gather":
        return operand * slices * (within - 1), operand * (slices - 1)
    if kind == "all-to-all":
        n = within * slices
        return operand * (within - 1) / n, operand * (n - within) / n
    return wire_bytes(kind, operand, within), wire_bytes(kind, operand / within, slices)


class _Class(NamedTuple):
    """The properties that the collectives of one `Traffic` share."""

    kind: str
    network: str
    group_size: int
    asynchronous: bool


class _Share(NamedTuple):
    """The part of one collective in a `Traffic`."""

    runs: int
    bytes: float
    seconds: float
    where: str


def traffic(costs: ProgramCosts, network: Network) -> list[Traffic]:
    """Return the collectives of a program, summed by kind and network, the slowest first."""
    shares: dict[_Class, list[_Share]] = {}
    for collective in costs.collectives:
        cost, runs = network.cost(collective), collective.runs
        for name, size, seconds in (
            ("ici", cost.ici_bytes, cost.ici_seconds),
            ("dcn", cost.dcn_bytes, cost.dcn_seconds),
        ):
            if size:
                key = _Class(collective.kind, name, collective.group_size, collective.asynchronous)
                shares.setdefault(key, []).append(_Share(runs, runs * size, runs * seconds, collective.where))
    sums = [
        Traffic(
            **key._asdict(),
            runs=sum(part.runs for part in parts),
            bytes=sum(part.bytes for part in parts),
            seconds=sum(part.seconds for part in parts),
            largest=max(parts, key=lambda part: part.bytes).where,
        )
        for key, parts in shares.items()
    ]
    return sorted(sums, key=lambda entry: -entry.seconds)


def terms(costs: ProgramCosts, collectives: Sequence[Traffic], topology: Topology, flops: float) -> Terms:
    """Return the estimate.

    Args:
      costs: the work of one device.
      collectives: its collectives, from `traffic`.
      topology: where the program runs.
      flops: FLOPs of all matmuls of one device, those inside hand-written kernels included.
    """
    chip = topology.chip
    peak, bandwidth = chip.peak_flops / chip.devices, chip.hbm_bandwidth / chip.devices
    synchronous = [kernel for kernel in costs.kernels if not kernel.asynchronous]
    beyond = math.fsum(k.runs * max(0.0, k.hbm_bytes / bandwidth - k.flops / peak) for k in synchronous)
    compute = flops / peak
    everything = math.fsum(k.runs * k.hbm_bytes for k in costs.kernels) / bandwidth
    memory = max(beyond, everything - compute)  # prefetches are hidden until HBM is busy all the time
    exposed = {}
    for network in ("ici", "dcn"):
        hidden = sum(t.seconds for t in collectives if t.network == network and t.asynchronous)
        waiting = sum(t.seconds for t in collectives if t.network == network and not t.asynchronous)
        exposed[network] = waiting + max(0.0, hidden - compute - memory)
    return Terms(compute, memory, **exposed)
