"""Measurements of the finished cells of a sweep: the input of the fits and of the report."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from etils import epath

from diffusionlm import schema, untrusted
from diffusionlm.errors import UserError
from diffusionlm.scaling.sweep.directory import cell_directory, read_identity
from diffusionlm.scaling.sweep.recipe import Cell, Sweep
from diffusionlm.storage import dump_numbers, load_numbers, read_json_lines, run_path
from diffusionlm.training import outcome

CURVE_POINTS = 100  # points of a training curve that are kept
CONCURRENT_READS = 32  # a bucket takes some 50 ms for each

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class CellResult:
    """One finished run of a sweep."""

    id: str
    objective: str  # mdm, arm
    preset: str  # the name of the model size
    seed: int
    budget: float  # FLOPs that the cell was planned for
    flops: float  # FLOPs that it spent, in the convention of the sweep's recipe
    params: int  # the N that the fits use, as the recipe counts it
    params_non_embedding: int
    tokens: int  # tokens that it was trained on
    unique_tokens: int  # tokens of the training split; fewer than `tokens` means that data were repeated
    steps: int
    loss: float  # held-out nats per token: the bound of an MDM, the cross-entropy of an ARM; NaN if not finite
    loss_stderr: float  # Monte Carlo error of the masks; 0 for an ARM
    loss_per_draw: tuple[float, ...]  # the loss by noise draw; all cells of a sweep share the draws
    bits_per_byte: float
    curve: tuple[tuple[float, float], ...]  # (FLOPs spent, training loss) along the run, thinned


_Real = Annotated[float, msgspec.Meta(gt=0)]


class _Row(schema.Record, frozen=True):
    """A `CellResult` in results.json, where null stands for a number that is not finite."""

    id: str
    objective: Literal["mdm", "arm"]
    preset: str
    seed: schema.Count
    budget: _Real
    flops: _Real
    params: schema.Positive
    params_non_embedding: schema.Positive
    tokens: schema.Positive
    unique_tokens: schema.Positive
    steps: schema.Positive
    loss: float | None
    loss_stderr: schema.NonNegative | None
    loss_per_draw: list[float | None]
    bits_per_byte: float | None
    curve: list[tuple[float, float | None]]


def read(sweep: Sweep, workdir: epath.PathLike, *, everything: bool = False) -> tuple[list[CellResult], int]:
    """Return the results of the finished cells, and the number of unfinished ones.

    Raises:
      UserError: the directory does not belong to this sweep, or a file in it is damaged.
    """
    workdir = run_path(workdir)
    identity = read_identity(workdir)
    if identity is None or identity["sweep"] != sweep.name:
        state = f"is of sweep {identity['sweep']!r}" if identity else "has no sweep.json, so no worker has begun there"
        raise UserError(f"{workdir} {state}; give the --workdir of `diffusionlm sweep run {sweep.name}`")
    tokens, cells = identity["unique_tokens"], sweep.select(everything)
    try:
        results = read_concurrently(lambda cell: _result(cell, cell_directory(workdir, cell.id), tokens), cells)
    except OSError as error:
        raise UserError(f"cannot read the sweep in {workdir}: {error}") from error
    finished = [result for result in results if result]
    return finished, len(cells) - len(finished)


def _result(cell: Cell, directory: epath.Path, unique_tokens: int) -> CellResult | None:
    path = directory / outcome.FILE
    if not path.exists():
        return None
    try:
        evaluation = outcome.read(path)["eval"]
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
            loss=float(evaluation["nelbo_nats_per_token"]),
            loss_stderr=float(evaluation["nelbo_stderr"]),
            loss_per_draw=tuple(map(float, evaluation["nelbo_per_draw"])),
            bits_per_byte=float(evaluation["bits_per_byte"]),
            curve=_curve(read_json_lines(directory / "metrics.jsonl", outcome.MetricsLine), cell.flops / cell.steps),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}, or metrics.jsonl beside it, is damaged ({type(error).__name__}: {error}); delete {directory} and "
            "the cell's lease"
        ) from error


def _curve(lines: Sequence[Mapping[str, Any]], flops_per_step: float) -> tuple[tuple[float, float], ...]:
    """Average the logged training losses over at most `CURVE_POINTS` stretches of equal length."""
    points = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    length = -(-len(points) // CURVE_POINTS)
    stretches = [points[i : i + length] for i in range(0, len(points), length)] if points else []
    return tuple((part[-1][0] * flops_per_step, sum(loss for _, loss in part) / len(part)) for part in stretches)


def to_json(results: Sequence[CellResult]) -> str:
    """Return results as the content of results.json, which `load` reads."""
    return dump_numbers([asdict(result) for result in results]) + "\n"


def load(path: epath.PathLike) -> list[CellResult]:
    """Read the results.json of a report.

    Raises:
      UserError: it is damaged.
      OSError: it cannot be read.
    """
    path = run_path(path)
    text = untrusted.read_text(path)
    schema.decode(text, list[_Row], path)
    rows = load_numbers(text)
    for row in rows:
        row["loss_per_draw"] = tuple(row["loss_per_draw"])
        row["curve"] = tuple(map(tuple, row["curve"]))
    return [CellResult(**row) for row in rows]


def read_concurrently(read: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Apply `read` to many items at a time, and return its values in order."""
    with ThreadPoolExecutor(CONCURRENT_READS) as pool:
        return list(pool.map(read, items))
