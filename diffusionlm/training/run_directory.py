"""The files that identify the run of a directory, and the check that another run may resume there.

config.json holds the resolved configuration; environment.json the versions and the devices, with the environments of
earlier starts under "earlier"; DONE.json the final numbers (`records` writes it).
"""

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from etils import epath

from diffusionlm import config_io, fingerprint, schema, untrusted
from diffusionlm.checkpoint import store
from diffusionlm.config import Config
from diffusionlm.errors import UserError
from diffusionlm.parallel import processes
from diffusionlm.parallel.processes import on_all_processes
from diffusionlm.storage import write_atomically
from diffusionlm.training import outcome
from diffusionlm.version import __version__

PACKAGE = Path(__file__).resolve().parents[1]


def recorded_config(workdir: epath.Path) -> Config | None:
    """Return the configuration of the run in `workdir`; None if there is none, or it cannot be read."""
    try:
        return config_io.from_json(untrusted.read_text(workdir / "config.json"))
    except (OSError, ValueError):
        return None


@on_all_processes
def refuse_another_run(cfg: Config, workdir: epath.Path) -> None:
    """Raise `UserError` unless the directory is free, or the run in it has the same scientific settings."""
    path = workdir / "config.json"
    if not path.exists():
        _refuse_checkpoints_of_another_run(cfg, workdir / "checkpoints")
        return
    try:
        text = untrusted.read_text(path)
        recorded = config_io.from_json(text)
    except ValueError as error:
        if _is_earlier(path):
            raise UserError(
                f"{workdir} holds a run of an earlier diffusionlm, whose fingerprints differ; finish it with that "
                "version, or use another --workdir"
            ) from error
        raise UserError(f"{path} is damaged, or of another version ({error}); use another --workdir") from error
    there, here = fingerprint.scientific_fields(recorded), fingerprint.scientific_fields(cfg)
    if differing := [name for name in here if there[name] != here[name]]:
        shown = ", ".join(f"{name} ({there[name]} there, {here[name]} here)" for name in differing)
        fix = "the settings of that run"
        if "run.init_id" in differing:
            start = f"--run.init_from {recorded.run.init_from}" if recorded.run.init_from else "no --run.init_from"
            fix += f", with {start}"
        raise UserError(f"{workdir} holds another run: {shown}; use another --workdir to start a new run, or {fix}")


def _refuse_checkpoints_of_another_run(cfg: Config, checkpoints: epath.Path) -> None:
    """Raise `UserError` if a directory that lacks config.json has checkpoints, and the newest is another run's."""
    try:
        path = store.locate(checkpoints).path
    except UserError:  # there is none, or only what the saver refuses
        return
    recorded, here = store.load_sidecar(path).source.get("fingerprint"), fingerprint.fingerprint(cfg)
    if recorded != here:
        raise UserError(
            f"{path} was saved by a run with the fingerprint {recorded}, this run has {here}, and config.json, which "
            "would say what differs, is missing; use another --workdir"
        )


def _is_earlier(path: epath.Path) -> bool:
    try:
        return 1 <= schema.read_json(path, dict[str, Any]).get("format", 1) < config_io.FORMAT
    except (ValueError, TypeError):
        return False


def require_same_command(cfg: Config, workdir: epath.Path) -> None:
    """Raise `UserError` on every process unless all were given the same settings.

    A host may have its own copy of the data, and its own clock.
    """
    values = config_io.flat(cfg) | {"workdir": str(workdir)}
    for name in ("data.path", "run.checkpoint_minutes"):
        del values[name]
    processes.require_equal(values, "start every process with the same command")


def finished(workdir: epath.Path) -> dict[str, Any] | None:
    """Return the content of DONE.json as process 0 sees it, with NaN for null; None where there is none."""
    done = workdir / outcome.FILE

    @on_all_processes
    def read() -> str:
        return untrusted.read_text(done) if jax.process_index() == 0 and done.exists() else ""

    text = processes.gather(read())[0]
    try:
        return outcome.parse(text, "it") if text else None
    except UserError as error:
        raise UserError(f"{done} is damaged ({error}); delete it, and the same command ends the run again") from error


@on_all_processes
def record_run(cfg: Config, workdir: epath.Path) -> None:
    """Write config.json and environment.json, on the first process."""
    if jax.process_index():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / "config.json", config_io.to_json(cfg))
        path = workdir / "environment.json"
        last = _last_environment(path)
        earlier = [*last.pop("earlier", []), last] if last else []
        write_atomically(path, json.dumps({**environment(), "earlier": earlier}, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to the run directory {workdir}: {error.strerror}; choose another --workdir"
        ) from error


def _last_environment(path: epath.Path) -> dict[str, Any]:
    """Return the content of environment.json, or nothing: it is a record, and no reason to refuse a run."""
    try:
        return schema.read_json(path, dict[str, Any])
    except (FileNotFoundError, UserError):
        return {}


def environment() -> dict[str, Any]:
    """Return versions, devices and source revision, for the record."""
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


def git_revision(package: Path = PACKAGE) -> str | None:
    """Return the commit of the checkout that `package` is imported from.

    None where there is no git, or the package is not part of a checkout of its own: installed into a virtual
    environment, it may lie inside the user's repository, whose commit says nothing about it.
    """

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") if Path(git("rev-parse", "--show-toplevel")) == package.parent else None
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
