"""IsoFLOP sweeps from plan to law, as the command line has them: `dlm.sweep.plan`, `run`, `status`, `report`."""

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from diffusionlm.errors import UserError
from diffusionlm.registry import sweeps
from diffusionlm.scaling.sweep import plan as planning
from diffusionlm.scaling.sweep.recipe import Sweep
from diffusionlm.storage import run_path

CONVENTIONS = {
    "6nd": "C = 6 N D with N non-embedding parameters; neither attention nor the head is counted.",
    "model": "C is three times the matmuls of a forward pass, attention and head included; N are the parameters that "
    "are multiplied, the head's too. Both objectives are charged alike.",
}

SLOW = 3.0  # seconds after which a report tells what it is at


def names() -> list[str]:
    """The registered sweeps, sorted."""
    return sweeps.names()


def register_sweep(name: str) -> Callable[[Callable[[], Sweep]], Callable[[], Sweep]]:
    """A decorator that makes a function without arguments, which returns a `Sweep`, a sweep of that name."""
    return sweeps.register(name)


def get(sweep: str | Sweep) -> Sweep:
    """The registered sweep of that name, or FILE.py:NAME for one that a file of your own registers.

    Raises:
      UserError: an unknown name, or something that is no sweep.
    """
    found = sweeps.get(sweep) if isinstance(sweep, str) else sweep
    if not isinstance(found, Sweep):
        raise UserError(f"sweep={sweep!r} is a {type(found).__name__}; give a Sweep, or the name of a registered one")
    return found


def plan(sweep: str | Sweep, **options: Any) -> planning.Plan:
    """What the sweep will take, before anything is rented; `options` as in `scaling.plan.plan`."""
    return planning.plan(get(sweep), **options)


def run(
    sweep: str | Sweep,
    workdir: epath.PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
):
    """Works on the sweep until it is done, beside any number of other workers; see `scaling.worker.run`."""
    from diffusionlm.scaling.sweep import worker

    return worker.run(get(sweep), directory(sweep, workdir), settings, **options)


def status(sweep: str | Sweep, workdir: epath.PathLike | None = None, *, everything: bool = False):
    """Where the sweep stands; see `scaling.status.status`."""
    from diffusionlm.scaling.sweep import status

    return status.status(get(sweep), directory(sweep, workdir), everything=everything)


def report(
    sweep: str | Sweep,
    workdir: epath.PathLike | None = None,
    *,
    everything: bool = False,
    output: epath.PathLike | None = None,
) -> dict[str, Any]:
    """Fits the laws to what is finished, and writes the report: a page, plots, CSV, JSON.

    Args:
      sweep: its name.
      workdir: its directory.
      everything: also the cells of less use.
      output: where the report goes; None: WORKDIR/report.

    Returns:
      The content of report.json.

    Raises:
      UserError: nothing is finished, the directory is of another sweep, or the report cannot be written.
    """
    from diffusionlm.progress import Progress
    from diffusionlm.scaling.report import document as report
    from diffusionlm.scaling.sweep import results

    sweep = get(sweep)
    workdir = directory(sweep, workdir)
    found, missing = results.read(sweep, workdir, everything=everything)
    if not found:
        from diffusionlm.scaling.sweep import worker  # with all of training, which a report does without

        worker.require_own_cells(sweep, workdir)  # which says it better
    cells = sweep.select(everything)
    context, warnings = report.describe(sweep, cells, workdir, results.read_identity(workdir))
    steps, began = itertools.count(), time.monotonic()
    with Progress("report", len({result.objective for result in found}) + 1) as bar:

        def note(what: str) -> None:
            bar.update(next(steps), what)
            if time.monotonic() - began > SLOW:  # a line that stays, also where there is no terminal
                bar.say(f"report: {what}")

        return report.write(
            found,
            output or workdir / "report",
            title=sweep.name,
            convention=CONVENTIONS[sweep.convention],
            overlay=sweep.overlay,
            incomplete=missing,
            context=context,
            warnings=warnings,
            note=note,
        )


def directory(sweep: str | Sweep, workdir: epath.PathLike | None) -> epath.Path:
    """Where a sweep is run by default: sweeps/NAME."""
    return run_path(workdir or f"sweeps/{get(sweep).name}")
