"""Kernels of a compiled program: the FLOPs of their matmuls and their traffic to and from HBM."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from diffusionlm.compile_check.hlo_text import Array, Computation, Instruction, Module, root

COPIES = {"copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start"}


@dataclass(frozen=True)
class Kernel:
    """An instruction that takes time and is not a collective.

    Attributes:
      flops: FLOPs of its matmuls.
      hbm_bytes: bytes that it reads from and writes to HBM.
      runs: how often it runs.
      asynchronous: True for a copy that runs beside other kernels.
      custom: True for a hand-written kernel, whose FLOPs are not known.
      where: the JAX operation that it came from.
    """

    flops: int
    hbm_bytes: int
    runs: int
    asynchronous: bool
    custom: bool
    where: str


def fused(module: Module, instruction: Instruction) -> Computation:
    """Return the computation of a fusion; empty for other instructions."""
    return module.computations.get(instruction.reference("calls"), {}) if instruction.opcode == "fusion" else {}


def read_kernel(
    module: Module, computation: Computation, instruction: Instruction, runs: int, collectives: Iterable[Instruction]
) -> Kernel:
    """Return the kernel of an instruction.

    Args:
      module: the program.
      computation: the computation that the instruction is part of.
      instruction: the instruction.
      runs: how often it runs.
      collectives: the collectives inside the instruction, if it is a fusion.
    """
    inner = fused(module, instruction)
    # A fusion that drives an asynchronous collective passes that one's buffers on: they are not its own traffic.
    passed = {
        array.shape
        for collective in collectives
        for array in (*collective.arrays, *inner[collective.operands[0]].arrays)
    }
    moved = _moved(computation, instruction, inner)
    return Kernel(
        flops=_flops(module, computation, instruction),
        hbm_bytes=sum(array.bytes for array in moved if array.hbm and array.shape not in passed),
        runs=runs,
        asynchronous=instruction.opcode in COPIES,
        custom=instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.attributes,
        where=instruction.jax_operation,
    )


# --- traffic


def _moved(computation: Computation, instruction: Instruction, inner: Computation) -> list[Array]:
    """Return what an instruction reads and writes; where it slices a large array, the slice alone."""
    operands = [computation[name].arrays for name in instruction.operands if name in computation]
    flat = [array for arrays in operands for array in arrays]
    if instruction.opcode in ("dynamic-slice", "gather", "slice", "broadcast", "iota"):
        return [*instruction.arrays, *instruction.arrays]
    if instruction.opcode == "dynamic-update-slice":
        return [*operands[1], *operands[1]]
    if instruction.opcode in COPIES:  # the result is (source, target, flag); a slice reads no more than it writes
        target = instruction.arrays[1:2]
        return [*target, *(replace(array, hbm=flat[0].hbm) for array in target)]
    if instruction.opcode == "custom-call" and "Bitcast" in instruction.attributes:
        return []
    if not inner:
        return [*flat, *instruction.arrays]
    parameters = {int(x.arguments): x for x in inner.values() if x.opcode == "parameter"}
    moved = _written(inner, instruction.arrays)
    for i, arrays in enumerate(operands):
        moved += _read(inner, parameters[i], arrays) if i in parameters else arrays
    return moved


def _read(inner: Computation, parameter: Instruction, arrays: tuple[Array, ...]) -> list[Array]:
    """Return the parts of an operand that a fusion reads."""
    parts: list[Array] = []
    aliases = [parameter.name]  # grows while it is iterated
    for name in aliases:
        for user in (x for x in inner.values() if name in x.operands):
            if user.opcode == "bitcast":
                aliases.append(user.name)
            elif user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == name:
                parts += [replace(array, hbm=arrays[0].hbm) for array in user.arrays]
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                return list(arrays)
    return parts


def _written(inner: Computation, arrays: tuple[Array, ...]) -> list[Array]:
    """Return the parts of its results that a fusion writes; of an array updated in place, the update."""
    last = root(inner)
    results = [inner[name] for name in last.operands] if last.opcode == "tuple" else [last]
    if len(results) != len(arrays):
        return list(arrays)
    written = []
    for result, array in zip(results, arrays, strict=True):
        while result.opcode in ("bitcast", "copy", "convert") and result.operands[0] in inner:
            result = inner[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            array = replace(array, shape=inner[result.operands[1]].arrays[0].shape)
        written.append(array)
    return written


# --- FLOPs


def _flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Return the FLOPs of the matmuls in an instruction, 2 m k n each."""
    if instruction.opcode == "dot":
        contracted = re.findall(r"\d+", _group(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes))
        shape = computation[instruction.operands[0]].arrays[0].shape
        return 2 * math.prod(instruction.arrays[0].shape) * math.prod(shape[int(axis)] for axis in contracted)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    inner = fused(module, instruction)
    return sum(_flops(module, inner, x) for x in inner.values() if x.opcode in ("dot", "convolution", "fusion"))


def _convolution_flops(computation: Computation, instruction: Instruction) -> int:
    """Return the FLOPs of a matmul written as a convolution, as the TPU backend does; batches are window axes."""
    left, right = (computation[name].arrays[0].shape for name in instruction.operands)
    result = instruction.arrays[0].shape
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        raise ValueError(f"a convolution without dim_labels: {instruction.attributes[:200]!r}")
    left_axes, right_axes, result_axes = labels.groups()
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _group(r"window=\{(.*?)\}", instruction.attributes)))
    products = result[result_axes.index("b")] * result[result_axes.index("f")] * right[right_axes.index("i")]
    for axis in filter(str.isdigit, left_axes):
        settings = {name: value.split("x")[int(axis)] for name, value in window.items()}
        products *= _window_products(settings, left[left_axes.index(axis)], result[result_axes.index(axis)])
    return 2 * products


def _window_products(settings: dict[str, str], inputs: int, outputs: int) -> int:
    """Return how many pairs of an output and a tap of its window meet an element of the input along one axis.

    Args:
      settings: the fields of HLO's `window` for this axis, such as size, stride, pad and lhs_dilate.
      inputs: the size of the input along the axis.
      outputs: the size of the result.
    """
    stride, dilation, spread = (int(settings.get(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    padding = int(settings.get("pad", "0_0").split("_")[0])
    taps = np.arange(int(settings.get("size", "1"))) * spread
    positions = np.arange(outputs)[:, None] * stride + taps[None] - padding
    inside = (positions >= 0) & (positions <= (inputs - 1) * dilation)
    return int((inside & (positions % dilation == 0)).sum())


def _group(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""
