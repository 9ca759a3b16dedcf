"""The report of a compile check: what the compiler says about a program, and what follows from it."""

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from diffusionlm.compile_check import advice, hlo, roofline
from diffusionlm.compile_check.memory import Hbm, hbm_per_chip
from diffusionlm.compile_check.roofline import Terms, Traffic
from diffusionlm.compile_check.workloads import Workload
from diffusionlm.config import Config
from diffusionlm.hardware import Topology


@dataclass(frozen=True)
class CompileReport:
    """Resources that a run needs on a topology; fields that need an executable are None if compilation failed.

    Attributes:
      experiment: the name of the configuration.
      program: "train" for one optimizer step, with its part if the run has several programs; "sample" for one denoising
        step over the whole canvas.
      topology: the name of the slice.
      slices: the number of slices.
      chips: the number of chips in all slices.
      mesh: the number of devices along each axis.
      fits: True if the program and its arguments fit into the memory of the chips.
      hbm_per_chip_bytes: the memory that they take.
      model_flops: FLOPs of one step on all chips, as MFU credits them.
      executed_flops: FLOPs of one step on all chips, with what is computed twice.
      hlo_flops: matmul FLOPs found in the compiled program, on all chips, outside hand-written kernels.
      collectives: the traffic of one step.
      roofline_seconds: the terms of the estimate.
      estimated_step_seconds: their sum, a lower bound.
      estimated_mfu: an upper bound.
      compile_seconds: the time that lowering and compiling took.
      fixes: if it does not fit, changes that should help, with the bytes per chip that the ledger predicts.
      warnings: what the numbers leave out, and what looks wasteful.
      versions: the versions of the compiler.
    """

    experiment: str
    program: str
    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    fits: bool
    hbm_per_chip_bytes: Hbm
    model_flops: int
    executed_flops: int | None
    hlo_flops: int | None
    collectives: tuple[Traffic, ...] | None
    roofline_seconds: Terms | None
    estimated_step_seconds: float | None
    estimated_mfu: float | None
    compile_seconds: float
    fixes: tuple[advice.Fix, ...]
    warnings: tuple[str, ...]
    versions: dict[str, str]


class Compilation(NamedTuple):
    """A workload, where it was compiled for, and the outcome.

    Attributes:
      cfg: the run.
      topology: the slices.
      mesh: the mesh of their devices.
      workload: the program.
      executable: the compiled program; None if the compiler refused it for want of memory.
      requested_bytes: the temporaries on each device that it was refused for.
      seconds: the time that lowering and compiling took.
    """

    cfg: Config
    topology: Topology
    mesh: Mesh
    workload: Workload
    executable: jax.stages.Compiled | None
    requested_bytes: int
    seconds: float


class _Estimate(NamedTuple):
    """The part of a report that only an executable can tell."""

    hlo_flops: int | None = None
    collectives: tuple[Traffic, ...] | None = None
    roofline_seconds: Terms | None = None
    estimated_step_seconds: float | None = None
    estimated_mfu: float | None = None
    warnings: tuple[str, ...] = ()


def make_report(compilation: Compilation) -> CompileReport:
    """Return the report of a compilation."""
    cfg, topology, workload = compilation.cfg, compilation.topology, compilation.workload
    hbm = hbm_per_chip(topology, workload, compilation.executable, compilation.requested_bytes)
    fits = compilation.executable is not None and hbm.headroom >= 0
    advisable = workload.kind == "train" and not fits
    estimate = _estimate(compilation, compilation.executable) if compilation.executable else _Estimate()
    return CompileReport(
        experiment=cfg.name,
        program=workload.name,
        topology=topology.name,
        slices=topology.slices,
        chips=topology.chips,
        mesh=dict(compilation.mesh.shape),
        fits=fits,
        hbm_per_chip_bytes=hbm,
        model_flops=workload.model_flops,
        executed_flops=workload.executed_flops,
        compile_seconds=round(compilation.seconds, 1),
        fixes=tuple(advice.fixes(cfg, topology, hbm.peak)) if advisable else (),
        versions={"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")},
        **estimate._asdict(),
    )


def _estimate(compilation: Compilation, executable: jax.stages.Compiled) -> _Estimate:
    topology, workload = compilation.topology, compilation.workload
    costs = hlo.analyse(executable.as_text() or "", workload.trip_counts)
    hlo_flops = sum(kernel.runs * kernel.flops for kernel in costs.kernels) * topology.devices
    executed = max(hlo_flops + workload.kernel_flops, workload.executed_flops or 0)
    collectives = roofline.traffic(costs, roofline.Network(topology, list(compilation.mesh.devices.flat)))
    terms = roofline.terms(costs, collectives, topology, executed / topology.devices)
    return _Estimate(
        hlo_flops=hlo_flops,
        collectives=tuple(collectives),
        roofline_seconds=terms,
        estimated_step_seconds=terms.total,
        estimated_mfu=workload.model_flops / (terms.total * topology.chips * topology.chip.peak_flops),
        warnings=tuple(_warnings(workload, costs, hlo_flops)),
    )


def _warnings(workload: Workload, costs: hlo.ProgramCosts, hlo_flops: int) -> Iterator[str]:
    executed, expected = hlo_flops + workload.kernel_flops, workload.executed_flops
    if expected and executed > 1.02 * expected:
        yield f"devices repeat each other's work: {executed / expected - 1:.0%} more matmul FLOPs than the model needs"
    if any(kernel.custom for kernel in costs.kernels):
        yield "kernels in custom calls hide their FLOPs from the compiled program; the model's formulas supply them"
    if costs.unknown_loops:
        yield (
            f"{costs.unknown_loops} loops run as long as the data require and count once here: the figures are for one "
            "denoising step, with the logits of one group of positions"
        )
