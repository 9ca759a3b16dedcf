"""The report of a sweep: one self-contained page, its pictures, two tables and the numbers, from results alone."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusionlm.errors import UserError, require_package
from diffusionlm.scaling.laws import published
from diffusionlm.scaling.laws.analysis import Analysis, analyse
from diffusionlm.scaling.laws.noise import NoiseOption
from diffusionlm.scaling.report import interactive, page, plots
from diffusionlm.scaling.report.content import to_json
from diffusionlm.scaling.report.csv_files import cells_csv, optima_csv
from diffusionlm.scaling.sweep.points import LeftOut
from diffusionlm.scaling.sweep.results import CellResult, of_others
from diffusionlm.scaling.sweep.results import to_json as results_to_json
from diffusionlm.storage import require_directory, run_path, write_atomically

OWN = "finished cells. Losses are in nats per token on held-out text"
OTHERS = "points. Losses are as their source gives them, in nats per token"


def write(
    results: Sequence[CellResult],
    directory: str | os.PathLike,
    *,
    title: str,
    convention: str,
    overlay: Sequence[str] = (),
    incomplete: int = 0,
    context: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
    noise: NoiseOption = None,
    left_out: Sequence[LeftOut] = (),
    note: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Write report.html, report.json, results.json, two CSV files and PNG files, each whole or not at all.

    Args:
      results: the results of the finished cells.
      directory: the directory of the report, which is made if missing; the files of an earlier report are replaced.
      title: the title of the page.
      convention: a sentence that says what N and C count.
      overlay: names of published laws to draw, as in `published.names()`.
      incomplete: the number of planned cells that have not finished.
      context: what was measured, for a table.
      warnings: further warnings, for instance about the data, which come first.
      noise: the noise between seeds, as `analyse` takes it.
      left_out: runs that no fit uses, to be shown beside the others.
      note: called with the name of each step as it begins, to show progress.

    Returns:
      The content of report.json.

    Raises:
      UserError: no finished cell, an unknown law, matplotlib missing, or a directory that cannot be written.
    """
    require_package("matplotlib", "the report of a sweep", "matplotlib", "plots")
    laws = [published.get(name) for name in overlay]
    analysis = analyse(results, noise=noise, note=note)
    if incomplete:
        state = f"{incomplete} planned cells have not finished, {len(results)} have"
        warnings = [f"the sweep is incomplete: {state}", *warnings]
    analysis = dataclasses.replace(analysis, warnings=(*warnings, *analysis.warnings), left_out=tuple(left_out))
    note("drawing plots")
    pictures = plots.render(analysis, laws)
    content = to_json(analysis) | {
        "title": title,
        "context": dict(context or {}) | {"counts": convention},
        "convention": convention,
        "about": OTHERS if of_others(results) else OWN,
        "cells": len(results),
        "incomplete": incomplete,
        "overlay": {law.name: law.source for law in laws},
    }
    html = page.render(analysis, content, pictures, laws, interactive.elements(analysis))
    tables = _tables(results, analysis, content)
    _write_files(pictures | tables | {"report.html": html.encode("ascii", "xmlcharrefreplace")}, directory)
    return content


def _tables(results: Sequence[CellResult], analysis: Analysis, content: Mapping[str, Any]) -> dict[str, bytes]:
    return {
        "cells.csv": cells_csv(results, analysis),
        "optima.csv": optima_csv(analysis),
        "results.json": results_to_json(results).encode(),
        "report.json": (json.dumps(content, indent=1, allow_nan=False) + "\n").encode(),
    }


def _write_files(files: Mapping[str, bytes], directory: str | os.PathLike) -> None:
    """Write the files of a report in their order, and delete the pictures of an earlier report that this one lacks."""
    target = run_path(directory)
    require_directory(target, "output")
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in set(plots.PICTURES) - set(files):
            (target / name).unlink(missing_ok=True)
        for name, data in files.items():  # the page last, so that the files beside a page belong to it
            write_atomically(target / name, data)
    except OSError as error:
        raise UserError(f"cannot write the report to {str(directory)!r}: {error.strerror or error}") from error
