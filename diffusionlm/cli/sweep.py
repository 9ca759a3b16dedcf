"""The verbs `sweep plan | run | status | report`: thin, over `diffusionlm.scaling.sweep.commands`."""

import json as json_lib
import os
import sys
from typing import Annotated, Any

from diffusionlm.config import Config
from diffusionlm.config_io import flat
from diffusionlm.errors import UserError
from diffusionlm.options import SETTINGS, parse


def plan(args: list[str], prog: str) -> int:
    """Say what a sweep will take: sweep plan NAME [--all] [--chip v5e --price 1.2] [--topology v5e-8] [--json]."""
    args = _named(args, prog)

    def bind(
        name: str,
        /,
        everything: bool = False,
        mfu: float = 0.4,
        chip: str = "v5e",
        price: float | None = None,
        topology: str = "",
        settings: Annotated[Config, *SETTINGS] = Config(),  # noqa: B008
        cells: bool = False,
        json: bool = False,
    ) -> int:
        """Say what a sweep will take, before anything is rented.

        Args:
          name: the sweep.
          everything: (--all) also the cells of less use.
          mfu: model FLOPs utilisation that chip-hours assume.
          chip: whose hours are shown: v4, v5e, v5p, v6e, tpu7x, h100, h200 or a100; JSON has all.
          price: of an hour of one such chip, in any currency; prices change, so none is built in.
          topology: a TPU slice, such as v5e-8, for which every cell is compiled, on this machine, to see if it fits.
          settings: for that check, operational fields such as --run.microbatches.
          cells: show every cell.
          json: print JSON.
        """
        from diffusionlm.scaling.sweep import commands as sweep
        from diffusionlm.scaling.sweep import plan as planning

        planning.peak_flops(chip)
        if price is not None and not price >= 0:
            raise UserError(f"price={price} must not be negative")
        if topology:
            os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX looks for a TPU
        found = sweep.plan(name, everything=everything, mfu=mfu, topology=topology, settings=_given(settings, args))
        if json:
            print(json_lib.dumps(found.to_json(), indent=2))
        else:
            planning.show(found, chip, price, cells=cells)
        return 1 if any(cell.fits is False for cell in found.cells) else 0

    return parse(bind, args, prog)()


def run(args: list[str], prog: str) -> int:
    """Work on a sweep, beside any number of other workers: sweep run NAME [--workdir DIR] [--data.path DIR]."""
    args = _named(args, prog)

    def bind(
        name: str,
        /,
        workdir: str | None = None,
        settings: Annotated[Config, *SETTINGS] = Config(),  # noqa: B008
        everything: bool = False,
        retry_failed: bool = False,
        leave: bool = False,
        lease_seconds: float = 120.0,
    ) -> int:
        """Work on a sweep: run one cell after another, each claimed for as long as this worker lives.

        Args:
          name: the sweep.
          workdir: its directory, which all workers share, on a disk or in a bucket; None: sweeps/NAME.
          settings: operational fields of every cell: the prepared data, the mesh, micro-batches.
          everything: (--all) also the cells of less use.
          retry_failed: begin cells again that have failed.
          leave: return when no cell is free and those who have the others have given a sign of life, for rented chips;
            without it, the worker stays until all cells are done, and goes on with those whose worker dies.
          lease_seconds: after so long without a sign of life, a worker's cell is another's to go on with.
        """
        from diffusionlm.scaling.sweep import commands as sweep

        found = sweep.run(
            name,
            workdir,
            _given(settings, args),
            everything=everything,
            retry_failed=retry_failed,
            wait=not leave,
            lease_seconds=lease_seconds,
        )
        state = "was stopped" if found.stopped else "found no more cells to run"
        where = f" --workdir {workdir}" if workdir else ""
        print(
            f"{name}: this worker {state}; cells it finished: {len(found.ran)}; of the whole sweep done: "
            f"{len(found.done)}, failed: {len(found.failed)}; next: diffusionlm sweep status {name}{where}"
        )
        return 0  # also where cells have failed: to start this worker again would not help them

    return parse(bind, args, prog)()


def status(args: list[str], prog: str) -> int:
    """Show how far a sweep is: sweep status NAME [--workdir DIR] [--watch] [--json]."""
    return parse(_status, _named(args, prog), prog)()


def report(args: list[str], prog: str) -> int:
    """Fit the scaling laws, and write a page about them: sweep report NAME [--workdir DIR] [--output DIR]."""
    return parse(_report, _named(args, prog), prog)()


def _named(args: list[str], prog: str) -> list[str]:
    """`args`, whose first word must name the sweep, with --all under the name that Python has for it."""
    from diffusionlm.scaling.sweep import commands as sweep

    if not args or args[0].startswith("-") and args[0] not in ("-h", "--help"):
        raise UserError(f"name the sweep first: {prog} NAME [...]; known: {', '.join(sweep.names())}")
    return ["--everything" if word == "--all" else word for word in args]


def _given(settings: Config, args: list[str]) -> dict[str, Any]:
    """The fields that the user has given, whether or not they are the defaults of a config."""
    words = {word.lstrip("-").partition("=")[0].replace("-", "_") for word in args if word.startswith("--")}
    return {name: value for name, value in flat(settings).items() if name in words}


def _status(
    name: str, /, workdir: str | None = None, everything: bool = False, watch: bool = False, json: bool = False
) -> int:
    """Show how far a sweep is: which cells are done, running, failed and pending.

    Args:
      name: the sweep.
      workdir: its directory; None: sweeps/NAME.
      everything: (--all) also the cells of less use.
      watch: keep the table up to date until all is done.
      json: print JSON.
    """
    from diffusionlm.scaling.sweep import commands as sweep
    from diffusionlm.scaling.sweep import status as statuses

    if json and watch:
        raise UserError("json and watch exclude each other; drop one")
    if not sweep.directory(name, workdir).exists():
        print(f"no worker has begun in {sweep.directory(name, workdir)}", file=sys.stderr)
    if watch:
        statuses.watch(sweep.get(name), sweep.directory(name, workdir), everything=everything)
        return 0
    found = sweep.status(name, workdir, everything=everything)
    if json:
        print(json_lib.dumps(found.to_json(), indent=2))
    else:
        statuses.show(found)
    return 0


def _report(
    name: str,
    /,
    workdir: str | None = None,
    output: str | None = None,
    everything: bool = False,
    json: bool = False,
) -> int:
    """Fit the scaling laws to the cells that are finished, and write a page, plots, CSV and JSON about them.

    Args:
      name: the sweep.
      workdir: its directory; None: sweeps/NAME.
      output: where the report goes; None: WORKDIR/report.
      everything: (--all) also the cells of less use.
      json: print report.json.
    """
    from diffusionlm.scaling.sweep import commands as sweep

    found = sweep.report(name, workdir, everything=everything, output=output)
    if json:
        print(json_lib.dumps(found, indent=2))
    else:
        where = output or sweep.directory(name, workdir) / "report"
        for warning in found.get("warnings", []):
            print(f"warning: {warning}", file=sys.stderr)
        print(f"written: {where}/report.html")
    return 0
