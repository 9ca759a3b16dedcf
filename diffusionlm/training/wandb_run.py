"""The metrics of a run in Weights & Biases, for those who ask for it; the run directory stays the record."""

import logging
import os
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any

import msgspec
from etils import epath

from diffusionlm import fingerprint, schema
from diffusionlm.config import Config
from diffusionlm.config_io import to_dict
from diffusionlm.errors import UserError
from diffusionlm.storage import in_bucket, write_atomically

log = logging.getLogger(__name__)

FILE = "wandb.json"
PROJECT = "diffusionlm"  # unless WANDB_PROJECT names another


class _Identity(schema.Record, frozen=True):
    """The content of wandb.json."""

    id: str
    project: str = PROJECT


class WandbRun:
    """A run of Weights & Biases that mirrors the lines of metrics.jsonl; a context manager.

    The id of the run is kept in the run directory, so that a resumed run continues it. No failure of Weights & Biases
    stops the training: it is said once, and nothing more is sent. Where and whether it sends is its own affair
    (`WANDB_MODE=offline` keeps everything on the disk).

    Args:
      cfg: the settings of the run.
      workdir: the run directory.
    """

    def __init__(self, cfg: Config, workdir: epath.Path):
        self._cfg, self._workdir = cfg, workdir
        self._run: Any = None

    def __enter__(self) -> "WandbRun":
        self._try(self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._try(lambda: self._run.finish(exit_code=0 if kind is None else 1))
        self._run = None

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send a line of metrics."""
        # The x axis is a metric: W&B's own step only grows, and a run that is rolled back repeats steps.
        self._try(lambda: self._run.log({"step": step, **values}))

    def _start(self) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        identity = _recorded(self._workdir) or _Identity(
            id=uuid.uuid4().hex, project=os.environ.get("WANDB_PROJECT", PROJECT)
        )
        self._run = wandb.init(
            project=identity.project,
            id=identity.id,
            resume="allow",
            name=self._workdir.name,
            dir=None if in_bucket(self._workdir) else os.fspath(self._workdir),
            config=to_dict(self._cfg) | {"fingerprint": fingerprint.fingerprint(self._cfg)},
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")
        write_atomically(self._workdir / FILE, msgspec.json.encode(identity) + b"\n")

    def _try(self, action: Callable[[], Any]) -> None:
        """Do something with the run, if there is one; after a failure there is none."""
        if self._run is None and action != self._start:
            return
        try:
            action()
        except Exception as error:  # of whatever kind: none is a reason to stop training
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("Weights & Biases failed, and gets no more metrics of this run: %s", reason[:300])


def _recorded(workdir: epath.Path) -> _Identity | None:
    """Return the identity in the run directory, or None; a damaged file gives the run a new one."""
    path = workdir / FILE
    try:
        return schema.read_json(path, _Identity) if path.exists() else None
    except UserError as error:
        log.warning("%s; the run gets a new one in Weights & Biases", error)
        return None
