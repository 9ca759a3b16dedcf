"""TPU slices by the names of Google Cloud, and the data sheet of their chips.

A name is a generation and a size. The size of v4, v5p and tpu7x counts TensorCores, two a chip ("v5p-128" is 64 chips,
4x4x4); the size of v5e ("v5e-256", also "v5litepod-256") and v6e counts chips. This module imports no JAX.

Sources. Peaks, HBM bandwidth, DCN bandwidth and pod sizes: cloud.google.com/tpu/docs/{v4,v5p,v5e,v6e,tpu7x}; ICI per
link, rings, and the DCN bandwidth of v4: jax-ml.github.io/scaling-book/tpus; shapes: the same documents and, for sizes
that they leave out, the table of AI-Hypercomputer/xpk, whose tpu7x-N has N TensorCores too. Usable HBM is what libtpu
0.0.50 leaves to a program.
"""

import math
import re
from dataclasses import dataclass

from diffusionlm.errors import UserError, require_package

GIB = 2**30
CUBE = 4  # chips along each side of the cubes that 3D slices of 64 chips or more are built of


@dataclass(frozen=True)
class Chip:
    """One generation of chips; everything is per chip, in bytes, FLOPs and seconds."""

    name: str
    device_kind: str  # pattern of `jax.Device.device_kind`
    peak_flops: float  # dense bfloat16
    hbm_bytes: int  # usable by a program
    hbm_bandwidth: float
    link_bandwidth: float  # one ICI link, one way
    dcn_bandwidth: float  # egress to other slices
    dimensions: int  # axes of the ICI torus
    most_chips: int  # in the largest slice
    cores_counted: int = 1  # what one chip adds to the size in a name
    devices: int = 1  # JAX devices a chip


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", r"TPU v4", 275e12, int(30.75 * GIB), 1200e9, 45e9, 6.25e9, 3, 4096, cores_counted=2),
        Chip("v5e", r"TPU v5( lite|e)", 197e12, int(15.75 * GIB), 819e9, 45e9, 3.125e9, 2, 256),
        Chip("v5p", r"TPU v5p?", 459e12, int(95.74 * GIB), 2765e9, 90e9, 6.25e9, 3, 6144, cores_counted=2),
        Chip("v6e", r"TPU v6( lite|e)", 918e12, int(31.25 * GIB), 1638e9, 90e9, 12.5e9, 2, 256),
        Chip("tpu7x", r"TPU7x", 2307e12, int(189.5 * GIB), 7380e9, 90e9, 12.5e9, 3, 9216, cores_counted=2, devices=2),
    )
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e", "v7x": "tpu7x", "ironwood": "tpu7x"}

FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # v5e and v6e
SMALL_SHAPES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # the others, below one cube
LONGEST = 61 * CUBE  # longest side of a slice


@dataclass(frozen=True)
class Topology:
    """One or several equal slices."""

    name: str  # as the cloud spells it
    chip: Chip
    shape: tuple[int, ...]  # chips along each axis of a slice
    slices: int = 1

    @property
    def chips(self) -> int:
        """The number of chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """The number of JAX devices of all slices."""
        return self.chips * self.chip.devices

    @property
    def physical(self) -> str:
        """The shape of a slice as libtpu reads it: "v5p:4x4x4"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def wraps(self, axis: int) -> bool:
        """Return True if the chips along an axis are a ring: 16 chips in v5e and v6e, whole cubes otherwise."""
        if self.chip.dimensions == 2:
            return self.shape[axis] == 16
        return all(side % CUBE == 0 for side in self.shape)


def parse(name: str, slices: int = 1) -> Topology:
    """Return the topology of a name such as "v5p-128" or "v5litepod-256", in upper or lower case.

    Raises:
      UserError: an unknown generation, a size that is not offered, or fewer than one slice.
    """
    if slices < 1:
        raise UserError(f"slices={slices} must be at least 1")
    match = re.fullmatch(r"([a-z0-9]+)-(\d+)", name.lower())
    generation = ALIASES.get(match[1], match[1]) if match else ""
    if match is None or generation not in CHIPS:
        raise UserError(
            f"unknown topology {name!r}; use a generation ({', '.join(CHIPS)}) and a size, such as v5p-128 or v5e-256"
        )
    chip, size = CHIPS[generation], int(match[2])
    offered = shapes(chip)
    if size not in offered:
        below = [s for s in offered if s < size][-2:]
        above = [s for s in offered if s > size][:2]
        nearest = ", ".join(f"{chip.name}-{s}" for s in below + above)
        counted = "TensorCores, two a chip" if chip.cores_counted == 2 else "chips"
        raise UserError(f"there is no slice {name!r} (sizes of {chip.name} count {counted}); the nearest are {nearest}")
    return Topology(f"{chip.name}-{size}", chip, offered[size], slices)


def require_libtpu() -> None:
    """Raise `UserError` unless the compiler for TPUs is installed; it is not imported."""
    require_package("libtpu", "compiling for TPUs", "libtpu (for Linux on x86)", "tpu")


def larger(topology: Topology) -> Topology | None:
    """Return the smallest slices with at least twice the chips, or None if there are none."""
    sizes = shapes(topology.chip)
    size = next((s for s, shape in sizes.items() if math.prod(shape) >= 2 * math.prod(topology.shape)), None)
    return parse(f"{topology.chip.name}-{size}", topology.slices) if size else None


def shapes(chip: Chip) -> dict[int, tuple[int, ...]]:
    """Return every size that a generation's names have, rising, with its shape: the one closest to a cube."""
    if chip.dimensions == 2:
        offered = list(FLAT_SHAPES)
    else:
        single = [(1, 1, 1)] if chip.name == "tpu7x" else []  # the smallest v4 and v5p are hosts of four chips
        offered = [*single, *SMALL_SHAPES, *_cubes(chip.most_chips)]
    return {chip.cores_counted * math.prod(shape): shape for shape in sorted(offered, key=math.prod)}


def _cubes(most_chips: int) -> list[tuple[int, ...]]:
    """Return, for every number of cubes, the box whose sides have the least sum."""
    most = most_chips // CUBE**3
    best: dict[int, tuple[int, int, int]] = {}
    for a in range(1, most + 1):
        for b in range(a, most // a + 1):
            for c in range(b, min(most // (a * b), LONGEST // CUBE) + 1):
                if (cubes := a * b * c) not in best or a + b + c < sum(best[cubes]):
                    best[cubes] = (a, b, c)
    return [tuple(CUBE * side for side in box) for box in best.values()]


# Dense bfloat16 peaks in FLOP/s, per JAX device; patterns match the whole of `jax.Device.device_kind`.
# GPUs: NVIDIA's data sheets, without sparsity.
_PEAKS = (
    *((chip.device_kind, chip.peak_flops / chip.devices) for chip in CHIPS.values()),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H[12]00 NVL", 835e12),
    (r"NVIDIA H[12]00\b(?!.*MIG).*", 989e12),  # SXM; a MIG slice is only part of the chip
    (r"NVIDIA A100\b(?!.*MIG).*", 312e12),
    (r"Tesla T4", 65e12),  # float16: it has no bfloat16 units
)


def peak_flops(device_kind: str) -> float | None:
    """Return the peak FLOP/s of one JAX device, for MFU, or None if it is unknown, as for CPUs."""
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, device_kind)), None)
