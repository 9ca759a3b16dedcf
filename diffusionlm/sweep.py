"""IsoFLOP sweeps from plan to law, as the command line has them: `dlm.sweep.plan`, `run`, `status`, `report`."""

from collections.abc import Callable
from typing import Any

from etils import epath

from diffusionlm.config import Config
from diffusionlm.files import run_path
from diffusionlm.registry import sweeps
from diffusionlm.scaling import plan as planning
from diffusionlm.scaling.recipe import Sweep


def names() -> list[str]:
    """The registered sweeps, sorted."""
    return sweeps.names()


def register_sweep(name: str) -> Callable[[Callable[[], Sweep]], Callable[[], Sweep]]:
    """A decorator that makes a function without arguments, which returns a `Sweep`, a sweep of that name."""
    return sweeps.register(name)


def get(sweep: str | Sweep) -> Sweep:
    """The registered sweep of that name, or FILE.py:NAME for one that a file of your own registers.

    Raises:
      UserError: an unknown name.
    """
    return sweeps.get(sweep) if isinstance(sweep, str) else sweep


def plan(sweep: str | Sweep, **options: Any) -> planning.Plan:
    """What the sweep will take, before anything is rented; `options` as in `scaling.plan.plan`."""
    return planning.plan(get(sweep), **options)


def run(sweep: str | Sweep, workdir: epath.PathLike | None = None, settings: Config | None = None, **options: Any):
    """Works on the sweep until it is done, beside any number of other workers; see `scaling.worker.run`."""
    from diffusionlm.scaling import worker

    return worker.run(get(sweep), directory(sweep, workdir), settings, **options)


def status(sweep: str | Sweep, workdir: epath.PathLike | None = None, *, everything: bool = False):
    """Where the sweep stands; see `scaling.status.status`."""
    from diffusionlm.scaling import status

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
      UserError: nothing is finished, or the directory is of another sweep.
    """
    from diffusionlm.scaling import report, results

    sweep = get(sweep)
    workdir = directory(sweep, workdir)
    found, missing = results.read(sweep, workdir, everything=everything)
    output = run_path(output or workdir / "report")
    output.mkdir(parents=True, exist_ok=True)
    results.save(found, output / "results.json")
    return report.write(
        found,
        output,
        title=sweep.name,
        convention=sweep.cells[0].recipe.convention,
        overlay=sweep.overlay,
        incomplete=missing,
    )


def directory(sweep: str | Sweep, workdir: epath.PathLike | None) -> epath.Path:
    """Where a sweep is run by default: sweeps/NAME."""
    return run_path(workdir or f"sweeps/{get(sweep).name}")
