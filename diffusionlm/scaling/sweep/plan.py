"""What a sweep will cost before anything is rented: cells, FLOPs under each convention, chip-hours, money, fit."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from diffusionlm import flops, hardware
from diffusionlm.config_io import with_fields
from diffusionlm.diffusion.objectives import predicted_share
from diffusionlm.errors import UserError
from diffusionlm.hardware import CHIPS
from diffusionlm.scaling.sweep.recipe import Cell, Sweep, check_operational

MFU = 0.4  # what MaxText's public runs on v5p and v6e have is 0.45 to 0.65; small models have less
_GPUS = {"h100": "NVIDIA H100 SXM", "h200": "NVIDIA H200", "a100": "NVIDIA A100-SXM4-80GB"}
CHIP_NAMES = (*CHIPS, *_GPUS)


@dataclass(frozen=True)
class PlannedCell:
    """One cell, and what it will take."""

    id: str
    objective: str
    preset: str
    recipe: str
    seed: int
    params: int  # the N of the recipe's laws
    params_non_embedding: int
    budget_flops: float
    flops: float  # of the whole steps that the budget pays for, in the recipe's convention
    flops_6nd: float  # 6 N D with N non-embedding
    flops_model: float  # matmuls of all positions, attention and head included
    flops_credited: float  # the same without the part of the head that the objective need not run
    flops_evaluation: float  # of the held-out evaluation at the end, credited alike
    batch_size: int
    sequence_length: int
    tokens: int
    steps: int
    peak_lr: float
    chip_hours: dict[str, float]  # by chip, at the plan's MFU
    fits: bool | None = None  # on the slice that it was compiled for; None: it was not compiled
    fit_note: str = ""


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep, and what they will take."""

    sweep: str
    cells: tuple[PlannedCell, ...]
    mfu: float
    topology: str = ""  # of the fit check

    def chip_hours(self, chip: str) -> float:
        """Of all cells, on chips of this kind."""
        return sum(cell.chip_hours[chip] for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
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
    """What the sweep will take, by arithmetic on its configs; nothing is traced unless a topology is given.

    Args:
      sweep: whose cells.
      everything: also the cells of less use.
      mfu: model FLOPs utilisation that chip-hours assume: credited FLOPs over the chip's bfloat16 peak.
      topology: a TPU slice, such as v5e-8, for which the training step of every cell is compiled here and now, so that
        what does not fit is known before a chip is rented; needs libtpu.
      settings: dotted operational fields for that check, such as {"run.microbatches": 4}.

    Raises:
      UserError: an impossible MFU, or an unknown topology.
    """
    if not 0 < mfu <= 1:
        raise UserError(f"mfu={mfu} must lie in (0, 1]; {MFU} is the default")
    check_operational(settings or {})
    cells = sweep.select(everything)
    fits = _compile(cells, topology, settings or {}) if topology else {}
    return Plan(sweep.name, tuple(_planned(cell, mfu, *fits.get(cell.id, (None, ""))) for cell in cells), mfu, topology)


def _planned(cell: Cell, mfu: float, fits: bool | None, note: str) -> PlannedCell:
    model, length, share = cell.config.model, cell.recipe.sequence_length, predicted_share(cell.config)
    sequences = cell.steps * cell.recipe.batch_size
    credited = sequences * flops.train(model, length, "model", predicted=share)
    draws = cell.recipe.eval_draws if cell.objective == "mdm" else 1
    forward = flops.train(model, length, "model", predicted=share) / 3  # a backward pass takes twice as much
    evaluation = cell.recipe.eval_records * draws * forward
    return PlannedCell(
        id=cell.id,
        objective=cell.objective,
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
        peak_lr=cell.config.optim.peak_lr,
        flops_evaluation=float(evaluation),
        chip_hours={chip: (credited + evaluation) / (mfu * peak_flops(chip)) / 3600 for chip in CHIP_NAMES},
        fits=fits,
        fit_note=note,
    )


def peak_flops(chip: str) -> float:
    """Dense bfloat16 FLOP/s of a chip by its short name.

    Raises:
      UserError: an unknown name.
    """
    if chip in CHIPS:
        return CHIPS[chip].peak_flops
    if chip in _GPUS:
        return hardware.peak_flops(_GPUS[chip])
    raise UserError(f"unknown chip {chip!r}; known: {', '.join(CHIP_NAMES)}")


def _compile(cells: Sequence[Cell], topology: str, settings: Mapping[str, Any]) -> dict[str, tuple[bool, str]]:
    """Whether each cell fits, and a line about it; cells of the same program are compiled once."""
    from diffusionlm.compile_check import compile as aot
    from diffusionlm.compile_check.table import verdict
    from diffusionlm.progress import Progress
    from diffusionlm.training.programs import structure

    same: dict[Any, list[Cell]] = {}
    for cell in cells:
        same.setdefault(structure(cell.config), []).append(cell)
    found: dict[str, tuple[bool, str]] = {}
    with Progress(f"compile for {topology}", len(same)) as progress:
        for k, alike in enumerate(same.values()):
            progress.note(f"{alike[0].objective} {alike[0].preset}")
            report = aot.compile(with_fields(alike[0].config, settings), topology)
            progress.update(k + 1, alike[0].preset)
            found |= {cell.id: (report.fits, verdict(report)) for cell in alike}
    return found


def show(plan: Plan, chip: str, price: float | None = None, *, cells: bool = False) -> None:
    """Prints a plan as a table, a row for each objective and budget, or for each cell, and what it comes to.

    Args:
      plan: of `plan`.
      chip: whose hours are shown.
      price: of an hour of one such chip; None: no money is shown.
      cells: show every cell.
    """
    peak_flops(chip)  # refuses an unknown one
    console = wide_console()
    columns = ["objective", "FLOPs", "cells", "N", "tokens", "steps", f"{chip}-hours", "of it evaluation"]
    table = Table(*(["cell"] if cells else []), *columns, *(["money"] if price is not None else []), title=plan.sweep)
    groups: dict[Any, list[PlannedCell]] = {}
    for cell in plan.cells:
        groups.setdefault(cell.id if cells else (cell.objective, cell.budget_flops), []).append(cell)
    for group in groups.values():
        table.add_row(*([group[0].id] if cells else []), *_row(group, chip, price))
    console.print(table)
    total = sum(cell.flops for cell in plan.cells)
    hours = plan.chip_hours(chip)
    money = f", {hours * price:,.2f} at {price:g} an hour" if price is not None else ""
    console.print(
        f"{plan.sweep}: {len(plan.cells)} cells, {total:.3g} FLOPs; "
        f"{hours:,.3g} {chip}-hours at {plan.mfu:.0%} MFU{money}",
        highlight=False,
        soft_wrap=True,
    )
    for note in dict.fromkeys(cell.fit_note for cell in plan.cells if cell.fit_note):
        console.print(note, highlight=False, soft_wrap=True)


def _row(cells: Sequence[PlannedCell], chip: str, price: float | None) -> list[str]:
    """What these cells have in common, from where to where the rest goes, and what they take together."""

    def between(values: list[float]) -> str:
        low, high = f"{min(values):.3g}", f"{max(values):.3g}"
        return low if low == high else f"{low} to {high}"

    hours = sum(cell.chip_hours[chip] for cell in cells)
    evaluation = sum(c.flops_evaluation for c in cells) / sum(c.flops_evaluation + c.flops_credited for c in cells)
    row = [cells[0].objective, f"{cells[0].budget_flops:.3g}", str(len(cells))]
    row += [between([getattr(cell, name) for cell in cells]) for name in ("params", "tokens", "steps")]
    row += [f"{hours:,.3g}", f"{evaluation:.1%}"]
    return row + ([f"{hours * price:,.2f}"] if price is not None else [])


def wide_console() -> Console:
    """One that does not cut tables off where their width is nobody's: in files and pipes."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=200)
