"""Reports of points of others: one for each source and corpus, and a page over them where there are several."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusionlm import templates
from diffusionlm.errors import UserError
from diffusionlm.scaling.laws.noise import NoiseOption
from diffusionlm.scaling.report import document
from diffusionlm.scaling.report.formatting import Table
from diffusionlm.scaling.sweep.points import Points
from diffusionlm.storage import run_path, write_atomically

NAMED = 4  # rows that are left out of a group without others
CONVENTION = "N: {parameters}; C is the budget or the FLOPs of the row, or 6 N D where it gives neither."


def write(
    groups: Sequence[Points],
    directory: str | os.PathLike,
    *,
    title: str,
    noise: NoiseOption = None,
    overlay: Sequence[str] = (),
    note: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Write the report of each group; of several, each in a directory of its own below a page that lists them.

    Args:
      groups: the points, as `point_groups.groups` returns them.
      directory: the directory of the report.
      title: the title of the page.
      noise: the noise between seeds, as `analyse` takes it.
      overlay: names of published laws to draw.
      note: called with the name of each step as it begins.

    Returns:
      The content of report.json; of several groups {"title", "groups": the content of each by its directory,
      "warnings": a line for each group without a row to fit}.

    Raises:
      UserError: as `document.write`.
    """
    if len(groups) == 1:
        return _one(groups[0], directory, title, noise, overlay, note)
    target, contents = run_path(directory), {}
    for name, group in _directories(groups).items():
        if group.results:
            note(group.name)
            contents[name] = _one(group, target / name, f"{title}: {group.name}", noise, overlay, note)
    content = {"title": title, "groups": contents, "warnings": _empty(groups)}
    page = templates.environment("diffusionlm.scaling.report").get_template("groups.html.j2")
    text = page.render(title=title, groups=contents, empty=content["warnings"], laws=_laws(contents))
    try:
        write_atomically(target / "report.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
        write_atomically(target / "report.html", text.encode("ascii", "xmlcharrefreplace"))
    except OSError as error:
        raise UserError(f"cannot write the report to {str(directory)!r}: {error.strerror or error}") from error
    return content


def _one(
    group: Points,
    directory: str | os.PathLike,
    title: str,
    noise: NoiseOption,
    overlay: Sequence[str],
    note: Callable[[str], None],
) -> dict[str, Any]:
    return document.write(
        group.results,
        directory,
        title=title,
        convention=CONVENTION.format(parameters=group.context["parameters"]),
        overlay=overlay,
        context=group.context,
        warnings=group.warnings,
        noise=noise,
        left_out=group.left_out,
        note=note,
    )


def _directories(groups: Sequence[Points]) -> dict[str, Points]:
    """Return the groups by names of directories, which are all different."""
    names: dict[str, Points] = {}
    for group in groups:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", group.name).strip("_") or "points"
        name, count = stem, 2
        while name in names:
            name, count = f"{stem}_{count}", count + 1
        names[name] = group
    return names


def _empty(groups: Sequence[Points]) -> list[str]:
    """Name the groups without a row to fit, with their first rows and why these are left out."""
    return [f"{group.name}: no row is left to fit ({_reasons(group)})" for group in groups if not group.results]


def _reasons(group: Points) -> str:
    named = [f"{left.run.id}: {left.reason}" for left in group.left_out[:NAMED]]
    more = len(group.left_out) - len(named)
    return ", ".join([*named, f"and {more:,} more"] if more else named)


def _laws(contents: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a row for each group and objective: the exponents of both approaches."""
    rows = []
    for name, content in contents.items():
        for objective, laws in content["laws"].items():
            check = content["cross_checks"][objective].get("parametric") or {}
            surface = f"{check['params_exponent']:.3g}" if check.get("determined") else "not determined"
            exponents = [_exponent(laws.get(key)) for key in ("params", "tokens", "loss")]
            if objective in content["hanging"]:  # a law that hangs on a suspected cell is not quoted
                exponents = ["hangs on a suspected cell", "", ""]
            rows.append([name, objective.upper(), str(content["runs"][objective]), *exponents, surface])
    return Table(["", "", "runs", "N*", "D*", "L*", "N*, Approach 3"], rows)


def _exponent(law: Mapping[str, Any] | None) -> str:
    if not law:
        return ""
    exponent = law["exponent"]
    if exponent["interval"] == "unknown":
        return f"{exponent['value']:.3g}"
    return f"{exponent['value']:.3g} [{exponent['low']:.3g}, {exponent['high']:.3g}]"
