"""Estimate the cost of a sweep before anything is rented."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from diffusionlm import flops, hardware
from diffusionlm.config_io import with_fields
from diffusionlm.errors import UserError
from diffusionlm.hardware import CHIPS
from diffusionlm.scaling.sweep.cost import credited_flops, evaluation_flops
from diffusionlm.scaling.sweep.recipe import Cell, Sweep, check_operational

MFU = 0.4  # MaxText's public runs on v5p and v6e reach 0.45 to 0.65; small models reach less
_GPUS = {"h100": "NVIDIA H100 SXM", "h200": "NVIDIA H200", "a100": "NVIDIA A100-SXM4-80GB"}
CHIP_NAMES = (*CHIPS, *_GPUS)


@dataclass(frozen=True)
class PlannedCell:
    """One cell, and what it will cost."""

    id: str
    objective: str  # the road of the cell: mdm, arm, or arm50 for half of the steps as an ARM
    arm_share: float  # of its steps
    preset: str
    recipe: str
    seed: int
    params: int  # N, as the laws of the recipe count it
    params_non_embedding: int
    budget_flops: float
    flops: float  # training FLOPs of the whole steps that the budget pays for, in the recipe's convention
    flops_6nd: float  # 6 N D with N non-embedding
    flops_model: float  # matmuls of all positions, attention and head included
    flops_credited: float  # flops_model without the part of the head that the objective need not run
    flops_evaluation: float  # FLOPs of the held-out evaluations, credited alike
    batch_size: int
    sequence_length: int
    tokens: int
    steps: int
    arm_steps: int  # of them, the first
    peak_lr: float
    arm_peak_lr: float  # of `arm_steps`
    chip_hours: dict[str, float]  # by chip, at the plan's MFU
    fits: bool | None = None  # whether it fits the slice that it was compiled for; None: it was not compiled
    fit_note: str = ""


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep, and what they will cost."""

    sweep: str
    cells: tuple[PlannedCell, ...]
    mfu: float
    topology: str = ""  # the slice of the fit check

    def chip_hours(self, chip: str) -> float:
        """Return the chip-hours of all cells on chips of one kind."""
        return sum(cell.chip_hours[chip] for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as `sweep plan --json` prints it."""
        hours = {chip: self.chip_hours(chip) for chip in CHIP_NAMES}
        return {
            "sweep": self.sweep,
            "mfu": self.mfu,
            "topology": self.topology,
            "flops": sum(cell.flops for cell in self.cells),
            "chip_hours": hours,
            "cells": [asdict(cell) for cell in self.cells],
        }


def plan(
    sweep: Sweep,
    *,
    everything: bool = False,
    mfu: float = MFU,
    topology: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """Work out what a sweep will cost, by arithmetic on its configs; nothing is traced unless a topology is given.

    Args:
      sweep: the sweep.
      everything: include the cells of less use.
      mfu: the model FLOPs utilisation that chip-hours assume: credited FLOPs over the chip's bfloat16 peak.
      topology: a TPU slice, such as v5e-8, for which the training step of every cell is compiled on this machine, to
        find out what does not fit before a chip is rented; needs libtpu.
      settings: dotted operational fields for that check, such as {"run.microbatches": 4}.

    Raises:
      UserError: an impossible MFU, or an unknown topology.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"mfu={mfu} must lie in (0, 1]; {MFU} is the default")
    check_operational(settings or {})
    cells = sweep.select(everything)
    fits = _compile(cells, topology, settings or {}) if topology else {}
    planned = tuple(_planned(cell, mfu, fits.get(cell.id, _Fit(None, ""))) for cell in cells)
    return Plan(sweep.name, planned, mfu, topology)


class _Fit(NamedTuple):
    """The answer of a compile check."""

    fits: bool | None
    note: str


def _planned(cell: Cell, mfu: float, fit: _Fit) -> PlannedCell:
    model, length = cell.config.model, cell.recipe.sequence_length
    sequences = cell.steps * cell.recipe.batch_size
    credited, evaluation = credited_flops(cell), evaluation_flops(cell)
    optim, arm_steps = cell.config.optim, cell.config.diffusion.arm_steps
    return PlannedCell(
        id=cell.id,
        objective=cell.road,
        arm_share=cell.arm_share,
        preset=cell.preset,
        recipe=cell.recipe.name,
        seed=cell.seed,
        params=cell.params,
        params_non_embedding=cell.params_non_embedding,
        budget_flops=cell.budget,
        flops=cell.flops,
        flops_6nd=float(6 * cell.params_non_embedding * cell.tokens),
        flops_model=float(sequences * flops.train(model, length, "model")),
        flops_credited=float(credited),
        batch_size=cell.recipe.batch_size,
        sequence_length=length,
        tokens=cell.tokens,
        steps=cell.steps,
        arm_steps=arm_steps,
        peak_lr=optim.peak_lr,
        arm_peak_lr=(optim.arm_peak_lr or optim.peak_lr) if arm_steps else 0.0,
        flops_evaluation=float(evaluation),
        chip_hours={chip: (credited + evaluation) / (mfu * peak_flops(chip)) / 3600 for chip in CHIP_NAMES},
        fits=fit.fits,
        fit_note=fit.note,
    )


def peak_flops(chip: str) -> float:
    """Return the dense bfloat16 FLOP/s of a chip.

    Args:
      chip: its short name, one of `CHIP_NAMES`.

    Raises:
      UserError: an unknown name.
    """
    peak = CHIPS[chip].peak_flops if chip in CHIPS else hardware.peak_flops(_GPUS.get(chip, ""))
    if peak is None:
        raise UserError(f"unknown chip {chip!r}; known: {', '.join(CHIP_NAMES)}")
    return peak


def _compile(cells: Sequence[Cell], topology: str, settings: Mapping[str, Any]) -> dict[str, _Fit]:
    """Check whether each cell fits; cells that share a program are compiled once."""
    from diffusionlm.compile_check import compile as compile_check
    from diffusionlm.compile_check.table import verdict
    from diffusionlm.progress import Progress
    from diffusionlm.training import parts
    from diffusionlm.training.programs import structure

    programs: dict[Any, list[Cell]] = {}
    for cell in cells:
        programs.setdefault(structure(cell.config), []).append(cell)
    fits: dict[str, _Fit] = {}
    with Progress(f"compile for {topology}", len(programs)) as progress:
        for k, (first, *others) in enumerate(programs.values()):
            progress.note(f"{first.road} {first.preset}")
            cfg = with_fields(first.config, settings)
            reports = [compile_check.compile(cfg, topology, part=part) for part in parts.parts(cfg)]
            report = min(reports, key=lambda report: report.hbm_per_chip_bytes.headroom)
            progress.update(k + 1, first.preset)
            fits |= {cell.id: _Fit(report.fits, verdict(report)) for cell in (first, *others)}
    return fits
