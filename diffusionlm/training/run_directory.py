"""What a run directory says of its run: config.json, environment.json, and whether another may go on there."""

import json
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax
from etils import epath

from diffusionlm import config_io
from diffusionlm.config import Config
from diffusionlm.errors import UserError
from diffusionlm.parallel import processes as runtime
from diffusionlm.storage import write_atomically
from diffusionlm.version import __version__


def begun(workdir: epath.Path) -> Config | None:
    """The configuration of the run in `workdir`; None where there is none, or `refuse_another_run` cannot read it."""
    try:
        return config_io.from_json((workdir / "config.json").read_text())
    except (OSError, ValueError):
        return None


def refuse_another_run(cfg: Config, workdir: epath.Path) -> None:
    """Raises `UserError` unless the directory is free, or the run in it is of the same science."""
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        theirs = config_io.from_json(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is damaged, or of another version ({e}); use another --workdir") from e
    if config_io.fingerprint(theirs) != config_io.fingerprint(cfg):
        old, new = config_io.scientific_fields(theirs), config_io.scientific_fields(cfg)
        differ = [k for k in new if old[k] != new[k]]
        shown = ", ".join(f"{k} ({old[k]} there, {new[k]} here)" for k in differ)
        fix = "the settings of that run"
        if "run.init_id" in differ:
            start = f"--run.init_from {theirs.run.init_from}" if theirs.run.init_from else "no --run.init_from"
            fix += f", with {start}"
        raise UserError(f"{workdir} holds another run: {shown}; use another --workdir to train anew, or {fix}")


def require_same_command(cfg: Config, workdir: epath.Path) -> None:
    """Raises `UserError` on every process unless all were given the same settings.

    A host may have its own copy of the data, and its own clock.
    """
    values = config_io.flat(cfg) | {"workdir": str(workdir)}
    for name in ("data.path", "run.checkpoint_minutes"):
        del values[name]
    runtime.require_equal(values, "start every process with the same command")


def finished(workdir: epath.Path) -> dict[str, Any] | None:
    """The content of DONE.json as process 0 sees it; None where there is none."""
    done = workdir / "DONE.json"

    def read() -> str:
        return done.read_text() if jax.process_index() == 0 and done.exists() else ""

    text = runtime.gather(runtime.everywhere(read))[0]
    try:
        return json.loads(text) if text else None
    except ValueError as e:
        raise UserError(f"{done} is damaged ({e}); delete it, and the same command ends the run again") from e


def record_run(cfg: Config, workdir: epath.Path) -> None:
    """Writes config.json and environment.json; the environments of earlier starts go on in its "earlier"."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / "config.json", config_io.to_json(cfg))
        path = workdir / "environment.json"
        last = _last_environment(path)
        earlier = [*last.pop("earlier", []), last] if last else []
        write_atomically(path, json.dumps({**environment(), "earlier": earlier}, indent=2) + "\n")
    except OSError as e:
        raise UserError(f"cannot write to the run directory {workdir}: {e.strerror}; choose another --workdir") from e


def _last_environment(path: epath.Path) -> dict[str, Any]:
    """What environment.json says, or nothing: it is a record, and no reason to refuse a run."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def environment() -> dict[str, Any]:
    """Versions, devices and source revision, for the record."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
    return {
        "diffusionlm": __version__,
        "git": git_revision(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in names},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "command": sys.argv,
    }


def git_revision() -> str | None:
    """The commit that this package runs from; None where it is no checkout, or there is no git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, cwd=epath.Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return git.stdout.strip() or None
