"""The verbs `sweep plan | run | status | report`, over `diffusionlm.scaling.commands`."""

import os
from typing import Annotated, Any, Literal

from diffusionlm import hardware
from diffusionlm.cli.output import print_json, require_name
from diffusionlm.config import Config
from diffusionlm.config_io import flat
from diffusionlm.console import write
from diffusionlm.errors import UserError
from diffusionlm.options import SETTINGS, given, parse
from diffusionlm.registry import sweeps


def plan(args: list[str], prog: str) -> int:
    """Estimate what a sweep costs: sweep plan NAME [--all] [--chip v5e --price 1.2] [--topology v5e-8] [--json]."""
    args = _sweep_first(args, prog, "[...]")

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
        """Estimate what a sweep costs, before anything is rented.

        Args:
          name: the sweep.
          everything: (--all) include the less useful cells.
          mfu: the model FLOPs utilisation that chip-hours assume.
          chip: the chip whose hours are shown: v4, v5e, v5p, v6e, tpu7x, h100, h200 or a100; JSON has all.
          price: the price of an hour of one such chip, in any currency; prices change, so none is built in.
          topology: a TPU slice, such as v5e-8; every cell is compiled for it on this machine, to see if it fits.
          settings: operational fields for that check, such as --run.microbatches.
          cells: show every cell.
          json: print JSON.
        """
        from diffusionlm.scaling import commands as sweep
        from diffusionlm.scaling.sweep import tables
        from diffusionlm.scaling.sweep.plan import peak_flops

        peak_flops(chip)
        if price is not None and not price >= 0:
            raise UserError(f"price={price} must not be negative")
        if topology:
            hardware.require_libtpu()
            os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX looks for a TPU
        planned = sweep.plan(
            name, everything=everything, mfu=mfu, topology=topology, settings=_given_fields(settings, args)
        )
        if json:
            print_json(planned.to_json())
        else:
            tables.show_plan(planned, chip, price, cells=cells)
        return 1 if any(cell.fits is False for cell in planned.cells) else 0

    return parse(bind, args, prog)()


def run(args: list[str], prog: str) -> int:
    """Run cells of a sweep, beside any number of other workers: sweep run NAME [--workdir DIR] [--data.path DIR]."""
    args = _sweep_first(args, prog)

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
        """Run one cell of a sweep after another, each claimed for as long as this worker lives.

        Args:
          name: the sweep.
          workdir: the sweep's directory, which all workers share, on a disk or in a bucket; None: sweeps/NAME.
          settings: operational fields of every cell: the prepared data, the mesh, micro-batches.
          everything: (--all) include the less useful cells.
          retry_failed: run failed cells again.
          leave: for rented chips: return when no cell is free and every other worker has shown a heartbeat; without it,
            the worker stays until all cells are done, and takes over those whose worker dies.
          lease_seconds: after so long without a heartbeat, another worker may take a worker's cell over.
        """
        from diffusionlm.scaling import commands as sweep

        outcome = sweep.run(
            name,
            workdir,
            _given_fields(settings, args),
            everything=everything,
            retry_failed=retry_failed,
            wait=not leave,
            lease_seconds=lease_seconds,
        )
        state = "was stopped" if outcome.stopped else "found no more cells to run"
        where = f" --workdir {workdir}" if workdir else ""
        write(
            f"{name}: this worker {state}; cells it finished: {len(outcome.ran)}; of the whole sweep done: "
            f"{len(outcome.done)}, failed: {len(outcome.failed)}; next: diffusionlm sweep status {name}{where}"
        )
        return 0  # even if cells have failed: starting this worker again would not help them

    return parse(bind, args, prog)()


def status(args: list[str], prog: str) -> int:
    """Show the progress of a sweep: sweep status NAME [--workdir DIR] [--watch] [--json]."""
    return parse(_status, _sweep_first(args, prog), prog)()


def report(args: list[str], prog: str) -> int:
    """Fit the scaling laws, and write a report: sweep report NAME|POINTS.csv [--workdir DIR] [--output DIR]."""
    words = _sweep_first(args, prog, points=True)
    for name in ("overlay", "use"):
        words = _joined(words, f"--{name}")
    return parse(_report, words, prog)()


def _joined(words: list[str], option: str) -> list[str]:
    """Return the words of a command with all values of an option that is given more than once in one, with commas."""
    values, others, rest = [], [], iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != option:
            others.append(word)
        elif equals or not (value := next(rest, "--")).startswith("--"):
            values.append(value)
        else:
            return words  # a value is missing, which `parse` says
    return [*others, option, ",".join(filter(None, values))] if values else words


def _sweep_first(
    args: list[str], prog: str, options: str = "[--workdir DIR] [...]", *, points: bool = False
) -> list[str]:
    """Return `args`, with --all spelled as the parameter `everything`.

    Their first word must name the sweep or, where `points` are taken, a file of them.
    """
    from diffusionlm.scaling import commands as sweep

    usage = f"{prog} NAME {options}"
    if not args or args[0].startswith("-") and args[0] not in ("-h", "--help"):
        raise UserError(f"name the sweep first; usage: {usage}; known: {', '.join(sweep.names())}")
    if not args[0].startswith("-") and not (points and sweep.of_points(args[0])):
        require_name(args[0], sweeps, usage)
    return ["--everything" if word == "--all" else word for word in args]


def _given_fields(settings: Config, args: list[str]) -> dict[str, Any]:
    """Return the fields that the command line sets, including those set to a default."""
    names = given(args)
    return {name: value for name, value in flat(settings).items() if name in names}


def _status(
    name: str, /, workdir: str | None = None, everything: bool = False, watch: bool = False, json: bool = False
) -> int:
    """Show the progress of a sweep: which cells are done, running, failed and pending.

    Args:
      name: the sweep.
      workdir: the sweep's directory; None: sweeps/NAME.
      everything: (--all) include the less useful cells.
      watch: refresh the table until all cells are done.
      json: print JSON.
    """
    from diffusionlm.scaling import commands as sweep
    from diffusionlm.scaling.sweep import tables

    if json and watch:
        raise UserError("json and watch exclude each other; drop one")
    directory = sweep.directory(name, workdir)
    if not (directory / "sweep.json").exists():
        state = "has no sweep.json" if directory.exists() else "does not exist"
        write(f"{directory} {state}: no worker of {name} has begun there; another place needs --workdir", error=True)
        if not json and not watch:  # a row for each cell would say no more
            cells = sweep.get(name).select(everything)
            write(f"{name}: {len(cells)} cells pending; `diffusionlm sweep plan {name} --cells` lists them")
            return 0
    if watch:
        tables.watch(sweep.get(name), directory, everything=everything)
        return 0
    progress = sweep.status(name, workdir, everything=everything)
    if json:
        print_json(progress.to_json())
    else:
        tables.show_status(progress)
    return 0


def _report(
    name: str,
    /,
    workdir: str | None = None,
    output: str | None = None,
    everything: bool = False,
    reuse: str | None = None,
    noise: str | None = None,
    overlay: str | None = None,
    unit: Literal["nats", "bits"] = "nats",
    counted: str = "",
    use: str = "",
    json: bool = False,
) -> int:
    """Fit the scaling laws to the finished cells of a sweep, or to points in a file, and write a report.

    Args:
      name: the sweep; or a CSV file of points, with columns objective, params, tokens, loss and perhaps budget_flops,
        flops, seed, source, corpus and flag; or the results.json of a report.
      workdir: the sweep's directory; None: sweeps/NAME.
      output: the report's directory; None: WORKDIR/report. A file of points needs it.
      everything: (--all) include the less useful cells.
      reuse: the results.json of another sweep's report; cells that both sweeps have are taken from it.
      noise: the standard deviation of the loss between seeds, in the unit of the losses (nats, or bits with --unit
        bits); or residuals: the scatter about the fitted curves; None: as repeated seeds show it.
      overlay: published laws to draw, by their names; several with commas between them (smdm_mdm,smdm_arm), or the
        option again for each; None: those of the sweep.
      unit: the unit of the losses of points and of --noise, per token.
      counted: which parameters the points count, in words, for the page.
      use: flags of the points to use, with commas between them or the option again for each, "unflagged" among them;
        empty: unflagged, synthetic and no_budget.
      json: print report.json.
    """
    from diffusionlm.scaling import commands as sweep

    content = sweep.report(
        name,
        workdir,
        everything=everything,
        reuse=reuse,
        output=output,
        noise=noise,  # pyright: ignore[reportArgumentType]  # the function reads numbers that are written as text
        overlay=None if overlay is None else _names(overlay),
        unit=unit,
        counted=counted,
        use=_names(use),
    )
    if json:
        print_json(content)
        return 0
    where = output or sweep.directory(name, workdir) / "report"
    for group, report in ({"": content} | content.get("groups", {})).items():
        of_group = f"{group}: " if group else ""
        if "verdict" in report:  # the report of several groups has none of its own
            write(f"{of_group}{report['verdict']}")
        for warning in report.get("warnings", []):
            write(f"warning: {of_group}{warning}", error=True)
    write(f"written: {where}/report.html")
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
