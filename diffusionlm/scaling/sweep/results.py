"""Measurements of the finished cells of a sweep: the input of the fits and of the report."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Annotated, Any, TypeVar

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
    objective: str  # the road: mdm, arm, or arm50 where half of the steps of an MDM are autoregressive
    preset: str  # the name of the model size
    seed: int
    budget: float  # FLOPs that the cell was planned for; NaN for a point of others that belongs to no budget
    flops: float  # FLOPs that it spent, in the convention of the sweep's recipe
    params: int  # the N that the fits use, as the recipe counts it
    params_non_embedding: int
    tokens: int  # tokens that it was trained on
    unique_tokens: int  # tokens of the training split; fewer than `tokens` means that data were repeated
    steps: int
    loss: float  # held-out nats per token: the bound of an MDM, the cross-entropy of an ARM; NaN if not finite
    loss_stderr: float  # Monte Carlo error of the masks; 0 for an ARM, NaN for a point of others
    loss_per_draw: tuple[float, ...]  # the loss by noise draw; all cells of a sweep share the draws
    bits_per_byte: float
    curve: tuple[tuple[float, float], ...]  # (FLOPs spent, training loss of the part) along the run, thinned
    # Of cells whose first steps are autoregressive: the share of these, and the exact loss of next-token prediction, in
    # nats per token, of the final network and at the end of these steps; None where it was not measured.
    arm_share: float = 0.0
    autoregressive_loss: float | None = None
    first_autoregressive_loss: float | None = None


# The objectives that points of others may have, and what their losses are.
OBJECTIVES: Mapping[str, str] = {
    "arm": "autoregressive: the exact cross-entropy",
    "mdm": "masked diffusion: a bound on the likelihood (NELBO)",
    "uniform": "diffusion with uniform noise: a bound on the likelihood",
    "mlm": "a masked language model: the cross-entropy of masked tokens, which is no bound on the likelihood",
    "prime": "MDM-Prime: its published losses are no bounds on the likelihood",
}


def of_others(results: Iterable[CellResult]) -> bool:
    """Return True for points of others, of which it is not known on what their losses were scored."""
    return all(math.isnan(result.loss_stderr) for result in results)


# Left out of results.json at these values, which all cells of before have.
LATER: Mapping[str, Any] = {field.name: field.default for field in fields(CellResult) if field.default is not MISSING}

_Real = Annotated[float, msgspec.Meta(gt=0)]


class _Row(schema.Record, frozen=True):
    """A `CellResult` in results.json, where null stands for a number that is not finite."""

    id: str
    objective: Annotated[str, msgspec.Meta(pattern=rf"^({'|'.join(OBJECTIVES)}|arm[0-9.]+(e-[0-9]+)?)$")]
    preset: str
    seed: schema.Count
    budget: _Real | None
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
    arm_share: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    autoregressive_loss: float | None = None
    first_autoregressive_loss: float | None = None


def read(
    sweep: Sweep, workdir: epath.PathLike, *, everything: bool = False, reuse: epath.PathLike | None = None
) -> tuple[list[CellResult], int]:
    """Return the results of the finished cells, and the number of unfinished ones.

    Args:
      sweep: the sweep.
      workdir: its directory.
      everything: include the cells of less use.
      reuse: the results.json of a report. Its cells that belong to this sweep, those of less use included, stand in for
        cells that have not finished here.

    Raises:
      UserError: the directory does not belong to this sweep, a file is damaged, or `reuse` has none of its cells or was
        measured on other text.
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
    if reuse:
        finished += _reused(sweep, reuse, tokens, {result.id for result in finished})
    return finished, len({cell.id for cell in cells} - {result.id for result in finished})


def _reused(sweep: Sweep, path: epath.PathLike, unique_tokens: int, finished: Collection[str]) -> list[CellResult]:
    """Return the results of a results.json for cells of the sweep that have not finished, in the order of the sweep."""
    try:
        found = {result.id: result for result in load(path)}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    ids = [cell.id for cell in sweep.select(everything=True) if cell.id in found]
    if not ids:
        raise UserError(
            f"reuse={path} has no cell of sweep {sweep.name!r}; give the results.json of one that shares some"
        )
    for other in {found[name].unique_tokens for name in ids} - {unique_tokens}:
        raise UserError(
            f"reuse={path} was measured after training on other text: {other:,} different tokens there, "
            f"{unique_tokens:,} in this sweep; the two are not comparable"
        )
    return [found[name] for name in ids if name not in finished]


def _result(cell: Cell, directory: epath.Path, unique_tokens: int) -> CellResult | None:
    path = directory / outcome.FILE
    if not path.exists():
        return None
    try:
        evaluation = outcome.read(path)["eval"]
        lines = read_json_lines(directory / "metrics.jsonl", outcome.MetricsLine)
        first = outcome.autoregressive_part(lines)
        return CellResult(
            id=cell.id,
            objective=cell.road,
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
            curve=_curve(lines, cell.flops / cell.steps),
            arm_share=cell.arm_share,
            autoregressive_loss=evaluation.get("autoregressive_nats_per_token"),
            first_autoregressive_loss=first["nats_per_token"] if first else None,
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
    rows = [
        {name: value for name, value in asdict(result).items() if name not in LATER or value != LATER[name]}
        for result in results
    ]
    return dump_numbers(rows) + "\n"


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
