"""IsoFLOP sweeps from plan to law: the module `dlm.sweep`, with the functions `plan`, `run`, `status` and `report`."""

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from etils import epath

from diffusionlm.errors import UserError, require_package
from diffusionlm.registry import sweeps
from diffusionlm.scaling.sweep.recipe import Sweep
from diffusionlm.storage import require_directory, run_path

if TYPE_CHECKING:
    from diffusionlm.scaling.laws.noise import NoiseOption
    from diffusionlm.scaling.sweep.plan import Plan
    from diffusionlm.scaling.sweep.points import Unit
    from diffusionlm.scaling.sweep.status import SweepStatus
    from diffusionlm.scaling.sweep.worker import Finished

CONVENTIONS = {
    "6nd": "C = 6 N D with N non-embedding parameters; neither attention nor the head is counted.",
    "model": "C is three times the matmuls of a forward pass, attention and head included; N are the parameters that "
    "are multiplied, the head's too. Both objectives are charged alike.",
}

SLOW = 3.0  # seconds after which a report prints its progress as lines


def names() -> list[str]:
    """Return the names of the registered sweeps, sorted."""
    return sweeps.names()


def register_sweep(name: str) -> Callable[[Callable[[], Sweep]], Callable[[], Sweep]]:
    """Return a decorator that registers a sweep: a function without arguments that returns a `Sweep`."""
    return sweeps.register(name)


def get(sweep: str | Sweep) -> Sweep:
    """Return a sweep by its registered name, or by FILE.py:NAME if a file of the user's own registers it.

    Raises:
      UserError: an unknown name, or an object that is not a sweep.
    """
    built = sweeps.get(sweep) if isinstance(sweep, str) else sweep
    if not isinstance(built, Sweep):
        raise UserError(
            f"sweep={repr(sweep)[:40]} is a {type(built).__name__}; give a Sweep, or the name of a registered one"
        )
    return built


def directory(sweep: str | Sweep, workdir: epath.PathLike | None) -> epath.Path:
    """Return the directory of a sweep: `workdir`, or sweeps/NAME.

    Raises:
      UserError: there is a file instead.
    """
    path = run_path(workdir or f"sweeps/{get(sweep).name}")
    require_directory(path, "workdir")
    return path


def plan(sweep: str | Sweep, **options: Any) -> "Plan":
    """Work out what a sweep will cost, before anything is rented; `options` are those of `scaling.sweep.plan.plan`."""
    from diffusionlm.scaling.sweep.plan import plan

    return plan(get(sweep), **options)


def run(
    sweep: str | Sweep,
    workdir: epath.PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> "Finished":
    """Run a sweep until it is done, beside any number of other workers; `options` as in `scaling.sweep.worker.run`."""
    from diffusionlm.scaling.sweep import worker

    return worker.run(get(sweep), directory(sweep, workdir), settings, **options)


def status(sweep: str | Sweep, workdir: epath.PathLike | None = None, *, everything: bool = False) -> "SweepStatus":
    """Return the status of a sweep; the arguments are those of `scaling.sweep.status.status`."""
    from diffusionlm.scaling.sweep.status import status

    return status(get(sweep), directory(sweep, workdir), everything=everything)


def report(
    sweep: str | Sweep | os.PathLike | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    workdir: epath.PathLike | None = None,
    *,
    everything: bool = False,
    reuse: epath.PathLike | None = None,
    output: epath.PathLike | None = None,
    noise: "NoiseOption" = None,
    overlay: Sequence[str] | None = None,
    unit: "Unit" = "nats",
    counted: str = "",
    use: Sequence[str] = (),
) -> dict[str, Any]:
    """Fit the laws to the finished cells of a sweep, or to points of others, and write the report.

    Points are a CSV file with the columns objective, params, tokens and loss, and those that there are of budget_flops,
    flops, seed, source, corpus and flag; a mapping of such columns, for instance a data frame; a list of mappings, one
    for each run; or the results.json of a report. Each source and corpus has a report of its own.

    Args:
      sweep: the sweep, its name, or points.
      workdir: the directory of the sweep.
      everything: include the cells of less use.
      reuse: the results.json of another sweep's report, from which cells that both sweeps have are taken.
      output: the directory of the report; None: WORKDIR/report. Points need it.
      noise: the standard deviation of the loss between seeds, in `unit`; "residuals": the scatter about the fitted
        curves, which contains misfit; None: as repeated seeds show it.
      overlay: names of published laws to draw; None: those of the sweep.
      unit: the unit of the losses of points and of `noise`, "nats" or "bits" per token.
      counted: which parameters the points count, for the page.
      use: flags of the points to use, "unflagged" among them; empty: unflagged, synthetic and no_budget.

    Returns:
      The content of report.json.

    Raises:
      UserError: no cell has finished, the directory belongs to another sweep, `reuse` has no cell of it or is of other
        text, points are wrong (the message names the row), an option does not go with what is reported, matplotlib is
        missing, or the report cannot be written.
    """
    require_package("matplotlib", "the report of a sweep", "matplotlib", "plots")
    from diffusionlm.scaling.laws.noise import check_noise

    noise = check_noise(noise)
    if isinstance(overlay, str):
        raise UserError(f"overlay={overlay!r} must be a list of names, such as [{overlay!r}]")
    if of_points(sweep):
        _only(sweep, workdir=workdir, everything=everything, reuse=reuse)
        return _report_points(sweep, output, noise, overlay or (), unit, counted, use)
    if unit != "nats" or counted or use:
        raise UserError("unit, counted and use are about points of others; leave them out for a sweep")
    return _report_sweep(sweep, workdir, everything, reuse, output, noise, overlay)  # pyright: ignore[reportArgumentType]


def of_points(source: object) -> bool:
    """Return True for points rather than a sweep: columns, records, or a file that ends in .csv or .json."""
    from diffusionlm.scaling.sweep.points import is_points

    return is_points(source) or (isinstance(source, str | os.PathLike) and str(source).endswith(".json"))


def _only(source: object, **options: object) -> None:
    for name, value in options.items():
        if value:
            raise UserError(f"{name}={value!r} is about a sweep that was run here; leave it out for points")


def _report_points(
    source: Any,
    output: epath.PathLike | None,
    noise: "NoiseOption",
    overlay: Sequence[str],
    unit: "Unit",
    counted: str,
    use: Sequence[str],
) -> dict[str, Any]:
    """Write the report of points, or the report again from its results.json."""
    from diffusionlm.scaling.report import document, groups
    from diffusionlm.scaling.sweep import point_groups, points, results

    if output is None:
        raise UserError("points have no directory of their own: give the report one (output, or --output DIR)")
    named = isinstance(source, str | os.PathLike)
    title = PurePath(os.fspath(source)).stem if named else "points"
    if named and not points.is_points(source):
        _only_csv(unit=unit != "nats", counted=counted, use=use)
        try:
            cells = results.load(source)
        except OSError as error:
            raise UserError(f"cannot read {os.fspath(source)}: {error.strerror or error}") from error
        convention = "N and C as in the report that the results are from."
        return document.write(cells, output, title=title, convention=convention, noise=noise, overlay=overlay)
    table = points.read(source, unit)
    built = point_groups.groups(table, use=use, unit=unit, counted=counted)
    if unit == "bits" and isinstance(noise, float):
        given = {"noise": f"given as {noise:g} bits per token, and multiplied by ln 2"}
        built = [dataclasses.replace(group, context={**group.context, **given}) for group in built]
        noise *= math.log(2)
    return groups.write(built, output, title=title, noise=noise, overlay=overlay)


def _only_csv(**options: object) -> None:
    for name, value in options.items():
        if value:
            raise UserError(f"{name} is about a CSV file or a table; leave it out for results.json")


def _report_sweep(
    sweep: str | Sweep,
    workdir: epath.PathLike | None,
    everything: bool,
    reuse: epath.PathLike | None,
    output: epath.PathLike | None,
    noise: "NoiseOption",
    overlay: Sequence[str] | None,
) -> dict[str, Any]:
    """Write the report of a sweep that was run here."""
    from diffusionlm.progress import Progress
    from diffusionlm.scaling.report import document
    from diffusionlm.scaling.report.context import describe
    from diffusionlm.scaling.sweep import results
    from diffusionlm.scaling.sweep.directory import read_identity, require_own_cells

    sweep = get(sweep)
    path = directory(sweep, workdir)
    finished, unfinished = results.read(sweep, path, everything=everything, reuse=reuse)
    if not finished:
        require_own_cells(sweep, path)  # its message says more than that of an empty report
    reported = {result.id for result in finished} | {cell.id for cell in sweep.select(everything)}
    cells = [cell for cell in sweep.select(everything=True) if cell.id in reported]
    context, warnings = describe(sweep, cells, path, read_identity(path))
    steps, start = itertools.count(), time.monotonic()
    with Progress("report", len({result.objective for result in finished}) + 1) as bar:

        def note(step: str) -> None:
            bar.update(next(steps), step)
            if time.monotonic() - start > SLOW:  # a line of its own, which also appears without a terminal
                bar.say(f"report: {step}")

        return document.write(
            finished,
            output or path / "report",
            title=sweep.name,
            convention=CONVENTIONS[sweep.convention],
            overlay=sweep.overlay if overlay is None else overlay,
            noise=noise,
            incomplete=unfinished,
            context=context,
            warnings=warnings,
            note=note,
        )
