"""How long a compiled program should take on a TPU: a roofline, from its operations and the data sheet of the chip.

The terms add up to the estimate:
- compute: FLOPs of the matmuls at the peak of the chip;
- memory: what kernels spend beyond that on moving their operands and results through HBM, kernel by kernel;
- ici, dcn: collectives that the compiler left synchronous, and what asynchronous ones take beyond compute and memory.

Every kernel and link is taken at its full published speed and nothing waits for the host, so the estimate is a lower
bound of the time and an upper bound of MFU. Matmuls of awkward shapes, element-wise arithmetic that is not hidden, and
stragglers come on top.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from diffusionlm.compile_check.hlo import Collective, Program, wire_bytes
from diffusionlm.hardware import Topology

HOP_SECONDS = 1e-6  # latency of an ICI hop (jax-ml.github.io/scaling-book/sharding)
DCN_SECONDS = 100e-6  # latency of a message between slices; an order of magnitude


@dataclass(frozen=True)
class Cost:
    """Bytes that each chip sends for one run of a collective, and how long that takes."""

    ici_bytes: float
    dcn_bytes: float
    ici_seconds: float
    dcn_seconds: float


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind, network, group size and synchrony, in one run of the program."""

    kind: str
    network: str  # ici or dcn
    group_size: int
    asynchronous: bool
    runs: int
    bytes: float  # that each chip sends
    seconds: float
    largest: str  # the JAX operation behind the most of these bytes


@dataclass(frozen=True)
class Terms:
    """Seconds of one run; their sum is the estimate."""

    compute: float
    memory: float
    ici: float
    dcn: float

    @property
    def total(self) -> float:
        return self.compute + self.memory + self.ici + self.dcn


class Network:
    """Where the devices of a mesh, in the order of the compiled program, stand in a topology."""

    def __init__(self, topology: Topology, devices: Sequence[jax.Device]):
        self.topology = topology
        axes = range(len(topology.shape))
        self.places = [tuple(device.coords[axis] for axis in axes) for device in devices]
        self.slices = [getattr(device, "slice_index", 0) for device in devices]

    def cost(self, collective: Collective) -> Cost:
        """A group that spans slices works within each slice first, so that each byte crosses only once."""
        chip, kind, operand = self.topology.chip, collective.kind, collective.operand_bytes
        group = collective.groups[0] if collective.groups else ()
        n = collective.group_size
        if collective.between_slices:
            ici, dcn, slices, speed, hops = 0.0, collective.wire_bytes, n, 1.0, 0
        elif kind == "collective-permute":
            crossing = any(self.slices[a] != self.slices[b] for a, b in collective.groups)
            ici, dcn = (0.0, float(operand)) if crossing else (float(operand), 0.0)
            speed, hops, slices = chip.link_bandwidth / chip.devices, 1, 1 + crossing
        else:
            slices = len({self.slices[device] for device in group}) or 1
            within = n // slices
            ici, dcn = _split(kind, operand, within, slices)
            speed, hops = self._within([device for device in group if self.slices[device] == self.slices[group[0]]])
        per_chip = chip.devices  # the devices of a chip share its network card
        phases = 2 if kind == "all-reduce" else 1
        return Cost(
            ici_bytes=ici * per_chip,
            dcn_bytes=dcn * per_chip,
            ici_seconds=ici / speed + hops * phases * HOP_SECONDS if ici else 0.0,
            dcn_seconds=dcn * per_chip / chip.dcn_bandwidth + phases * DCN_SECONDS if slices > 1 else 0.0,
        )

    def _within(self, group: Sequence[int]) -> tuple[float, int]:
        """Bytes/s that each device of a group sends over all links that its axes have, and the longest way in hops.

        A full ring sends both ways along its axis; a line, or a part of a ring, moves as fast as one link.
        """
        chip, links, hops = self.topology.chip, 0, 0
        for axis, side in enumerate(self.topology.shape):
            spanned = len({self.places[device][axis] for device in group})
            if spanned > 1:
                ring = spanned == side and self.topology.wraps(axis)
                links += 2 if ring else 1
                hops += spanned // 2 if ring else spanned - 1
        if not links:  # the two devices of one chip
            return chip.hbm_bandwidth / chip.devices, 0
        return links * chip.link_bandwidth / chip.devices, hops


def _split(kind: str, operand: float, within: int, slices: int) -> tuple[float, float]:
    """Bytes that a device sends inside its slice and to others, for a group of `within` devices in each slice."""
    if slices == 1:
        return wire_bytes(kind, operand, within), 0.0
    if kind == "all-gather":
        return operand * slices * (within - 1), operand * (slices - 1)
    if kind == "all-to-all":
        n = within * slices
        return operand * (within - 1) / n, operand * (n - within) / n
    return wire_bytes(kind, operand, within), wire_bytes(kind, operand / within, slices)


def traffic(program: Program, network: Network) -> list[Traffic]:
    """The collectives of a program, summed by kind and network, the slowest first."""
    found: dict[tuple, list[tuple[int, float, float, str]]] = {}
    for one in program.collectives:
        cost = network.cost(one)
        for name, size, seconds in (
            ("ici", cost.ici_bytes, cost.ici_seconds),
            ("dcn", cost.dcn_bytes, cost.dcn_seconds),
        ):
            if size:
                key = (one.kind, name, one.group_size, one.asynchronous)
                found.setdefault(key, []).append((one.runs, one.runs * size, one.runs * seconds, one.where))
    sums = [
        Traffic(*key, *(sum(part[i] for part in parts) for i in range(3)), max(parts, key=lambda part: part[1])[3])
        for key, parts in found.items()
    ]
    return sorted(sums, key=lambda one: -one.seconds)


def terms(program: Program, collectives: Sequence[Traffic], topology: Topology, flops: float) -> Terms:
    """The estimate.

    Args:
      program: of one device.
      collectives: from `traffic`.
      topology: where it runs.
      flops: of all matmuls of one device, those inside of hand-written kernels included.
    """
    chip = topology.chip
    peak, bandwidth = chip.peak_flops / chip.devices, chip.hbm_bandwidth / chip.devices
    waiting = [k for k in program.kernels if not k.asynchronous]
    beyond = math.fsum(k.runs * max(0.0, k.hbm_bytes / bandwidth - k.flops / peak) for k in waiting)
    compute = flops / peak
    everything = math.fsum(k.runs * k.hbm_bytes for k in program.kernels) / bandwidth
    memory = max(beyond, everything - compute)  # prefetches run beside the rest, until HBM is busy all the time
    exposed = {}
    for network in ("ici", "dcn"):
        seconds = {
            flag: sum(t.seconds for t in collectives if (t.network, t.asynchronous) == (network, flag))
            for flag in (False, True)
        }
        exposed[network] = seconds[False] + max(0.0, seconds[True] - compute - memory)
    return Terms(compute, memory, **exposed)
