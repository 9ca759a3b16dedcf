"""What the finished cells of a sweep measured, read from their files, as the fits and the report take it."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from etils import epath

from diffusionlm.errors import UserError
from diffusionlm.scaling.sweep.recipe import Cell, Sweep
from diffusionlm.storage import read_json_lines, run_path, write_atomically

CURVE_POINTS = 100  # of a training curve that are kept
READS = 32  # at once, as a bucket takes some 50 ms for each

T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class CellResult:
    """One finished run of a sweep."""

    id: str
    objective: str  # mdm, arm
    preset: str  # name of the model size
    seed: int
    budget: float  # FLOPs that the cell was planned for
    flops: float  # FLOPs that it spent, in the convention of the sweep's recipe
    params: int  # the N that the fits use, as the recipe counts it
    params_non_embedding: int
    tokens: int  # that it was trained on
    unique_tokens: int  # of the training split; fewer than `tokens` means that data were repeated
    steps: int
    loss: float  # held-out nats per token: the bound of an MDM, the cross-entropy of an ARM
    loss_stderr: float  # of the Monte Carlo noise of the masks; 0 for an ARM
    loss_per_draw: tuple[float, ...]  # the same by noise draw, which all cells of a sweep have in common
    bits_per_byte: float
    curve: tuple[tuple[float, float], ...]  # (FLOPs spent, training loss) along the run, thinned


def read(sweep: Sweep, workdir: epath.PathLike, *, everything: bool = False) -> tuple[list[CellResult], int]:
    """The results of the finished cells, and how many cells are not finished.

    Raises:
      UserError: the directory is not that of this sweep, or a file in it is damaged.
    """
    workdir = run_path(workdir)
    identity = read_identity(workdir)
    if identity is None or identity["sweep"] != sweep.name:
        there = f"is of sweep {identity['sweep']!r}" if identity else "has no sweep.json, so no worker has begun there"
        raise UserError(f"{workdir} {there}; give the --workdir of `diffusionlm sweep run {sweep.name}`")
    cells = sweep.select(everything)
    try:
        found = at_once(lambda cell: _result(cell, workdir / "cells" / cell.id, identity["unique_tokens"]), cells)
    except OSError as error:
        raise UserError(f"cannot read the sweep in {workdir}: {error}") from error
    finished = [result for result in found if result]
    return finished, len(cells) - len(finished)


def _result(cell: Cell, directory: epath.Path, unique_tokens: int) -> CellResult | None:
    path = directory / "DONE.json"
    if not path.exists():
        return None
    try:
        held_out = json.loads(path.read_text())["eval"]
        measured = {
            "loss": float(held_out["nelbo_nats_per_token"]),
            "loss_stderr": float(held_out["nelbo_stderr"]),
            "loss_per_draw": tuple(map(float, held_out["nelbo_per_draw"])),
            "bits_per_byte": float(held_out["bits_per_byte"]),
            "curve": _curve(read_json_lines(directory / "metrics.jsonl"), cell.flops / cell.steps),
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}, or metrics.jsonl beside it, is damaged ({type(error).__name__}: {error}); delete {directory} and "
            "the cell's lease"
        ) from error
    return CellResult(
        id=cell.id,
        objective=cell.objective,
        preset=cell.preset,
        seed=cell.seed,
        budget=cell.budget,
        flops=cell.flops,
        params=cell.params,
        params_non_embedding=cell.params_non_embedding,
        tokens=cell.tokens,
        unique_tokens=unique_tokens,
        steps=cell.steps,
        **measured,
    )


def _curve(lines: Sequence[dict[str, Any]], flops_per_step: float) -> tuple[tuple[float, float], ...]:
    """The training loss, averaged over stretches of equal length."""
    points = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    group = -(-len(points) // CURVE_POINTS)
    groups = [points[i : i + group] for i in range(0, len(points), group)] if points else []
    return tuple((part[-1][0] * flops_per_step, sum(loss for _, loss in part) / len(part)) for part in groups)


def as_json(results: Sequence[CellResult]) -> str:
    """Results as JSON, small enough to keep."""
    return json.dumps([asdict(result) for result in results]) + "\n"


def save(results: Sequence[CellResult], path: epath.Path) -> None:
    """Writes results to a JSON file."""
    write_atomically(path, as_json(results))


def load(path: epath.PathLike) -> list[CellResult]:
    """Reads what `save` wrote."""
    values = json.loads(epath.Path(path).read_text())
    for value in values:
        value["loss_per_draw"] = tuple(value["loss_per_draw"])
        value["curve"] = tuple(map(tuple, value["curve"]))
    return [CellResult(**value) for value in values]


def at_once(read: Callable[[T], R], of: Sequence[T]) -> list[R]:
    """`read` of each, many at a time, in order."""
    with ThreadPoolExecutor(READS) as pool:
        return list(pool.map(read, of))


def read_identity(workdir: epath.Path) -> dict[str, Any] | None:
    """The content of sweep.json, by which a directory is that of one sweep on one dataset; None where there is none.

    Raises:
      UserError: it is damaged.
    """
    path = workdir / "sweep.json"
    if not path.exists():
        return None
    try:
        return as_identity(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def as_identity(text: str | bytes, path: epath.Path) -> dict[str, Any]:
    """The content of sweep.json, which has been read from `path`; a `UserError` if it is damaged."""
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
        for name, kind in {"sweep": str, "dataset": str, "unique_tokens": int}.items():
            if not isinstance(found.get(name), kind):
                raise ValueError(f"{name} is {found.get(name)!r}")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and the next worker writes it anew") from error
    return found
