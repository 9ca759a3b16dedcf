"""The directory of a sweep, which all its workers share, and the file that says which sweep and dataset it belongs to.

DIR/sweep.json          the sweep's name, and the dataset that all cells are trained on
DIR/leases/CELL         which worker has the cell (see `lease`), that it is done, or why it failed
DIR/cells/CELL/         the run directory of the cell; DONE.json ends it
DIR/data/               the dataset, where the sweep prepares its own
DIR/report/             the output of `diffusionlm sweep report`
"""

import json
import logging
from typing import TypedDict

from etils import epath

from diffusionlm import schema, untrusted
from diffusionlm.errors import UserError
from diffusionlm.ownership.conditional_writes import write_once
from diffusionlm.scaling.sweep.recipe import Sweep

log = logging.getLogger(__name__)


class Identity(TypedDict):
    """The content of sweep.json."""

    sweep: str  # the name of the sweep
    dataset: str  # sha256 of the dataset
    unique_tokens: int  # tokens of its training split


class _Identity(schema.Record, frozen=True):
    sweep: str
    dataset: str
    unique_tokens: schema.Positive


def leases_directory(workdir: epath.Path) -> epath.Path:
    """Return the directory of the leases."""
    return workdir / "leases"


def cell_directory(workdir: epath.Path, cell: str) -> epath.Path:
    """Return the run directory of a cell."""
    return workdir / "cells" / cell


def unplanned_cells(sweep: Sweep, workdir: epath.Path) -> tuple[list[str], int]:
    """Return the cells in the directory that the sweep does not have, sorted, and the number of all cells there."""
    cells = workdir / "cells"
    if not cells.exists():
        return [], 0
    existing = {path.name for path in cells.iterdir()}
    return sorted(existing - {cell.id for cell in sweep.select(everything=True)}), len(existing)


def require_own_cells(sweep: Sweep, workdir: epath.Path) -> None:
    """Warn about cells in the directory that the sweep does not have, as when its recipe was changed.

    Raises:
      UserError: there are cells, and none belongs to the sweep.
    """
    others, count = unplanned_cells(sweep, workdir)
    if others and len(others) == count:
        raise UserError(
            f"{workdir} holds {count} cells, and none is of this sweep, whose recipe must have changed since (such as "
            f"{others[0]}); use another --workdir, or delete {workdir}/cells and {workdir}/leases"
        )
    if others:
        log.warning("%d of the %d cells in %s are not of this sweep; they stay there", len(others), count, workdir)


def read_identity(workdir: epath.Path) -> Identity | None:
    """Read sweep.json; None if there is none.

    Raises:
      UserError: it cannot be read, or is damaged.
    """
    path = workdir / "sweep.json"
    if not path.exists():
        return None
    try:
        return _parse_identity(untrusted.read_bytes(path, 1 << 16), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def require_identity(workdir: epath.Path, identity: Identity) -> None:
    """Write sweep.json, or refuse a directory that belongs to another sweep or dataset.

    Raises:
      UserError: the directory holds another sweep, or was begun with other data.
    """
    text = write_once(workdir, "sweep.json", json.dumps(identity, indent=2) + "\n")
    existing = _parse_identity(text, workdir / "sweep.json")
    if differences := [name for name in ("sweep", "dataset") if existing[name] != identity[name]]:
        shown = ", ".join(f"{name} {existing[name]} there, {identity[name]} here" for name in differences)
        if differences == ["dataset"]:
            raise UserError(f"{workdir} was begun with other data: {shown}; give its --data.path, or another --workdir")
        raise UserError(f"{workdir} holds another sweep: {shown}; use another --workdir")


def _parse_identity(text: str | bytes, path: epath.Path) -> Identity:
    try:
        content = schema.decode(text, _Identity, "it")
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and the next worker rewrites it") from error
    return Identity(sweep=content.sweep, dataset=content.dataset, unique_tokens=content.unique_tokens)
