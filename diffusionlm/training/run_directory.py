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

from diffusionlm import config_io, config_mixture, fingerprint, schema, untrusted
from diffusionlm.checkpoint import store
from diffusionlm.config import Config
from diffusionlm.errors import UserError
from diffusionlm.parallel import processes
from diffusionlm.parallel.processes import on_all_processes
from diffusionlm.storage import write_atomically
from diffusionlm.training import growth, outcome
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
    """Raise `UserError` unless the directory is free, or the run in it has the same scientific settings.

    A run may have more steps than before where its learning rates allow it (`growth`).
    """
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
    differing = [name for name in here if there[name] != here[name]]
    if differing == ["run.steps"] and cfg.run.steps > recorded.run.steps:
        growth.require_may_grow(recorded, cfg, workdir, _steps_taken(workdir))
    elif differing:
        shown = ", ".join(f"{name} ({there[name]} there, {here[name]} here)" for name in differing)
        fix = "the settings of that run"
        for begun in ("init", "continue"):
            if f"run.{begun}_id" in differing:
                path = getattr(recorded.run, f"{begun}_from")
                fix += f", with --run.{begun}_from {path}" if path else f", with no --run.{begun}_from"
        raise UserError(f"{workdir} holds another run: {shown}; use another --workdir to start a new run, or {fix}")


def grown_from(cfg: Config, workdir: epath.Path, clock: int) -> int | None:
    """Return the steps of the run in `workdir` if `cfg` is that run with more of them, or None.

    Args:
      cfg: the run.
      workdir: its directory, whose config.json is that of before.
      clock: what the learning rate of the restored state has come to, in steps, or batches where it counts those.

    Raises:
      UserError: it must not grow any more; on all processes if on one.
    """

    @on_all_processes
    def look() -> int | None:
        recorded = recorded_config(workdir)
        if recorded is None or recorded.run.steps >= cfg.run.steps:
            return None
        growth.require_may_grow(recorded, cfg, workdir, clock)
        return recorded.run.steps

    return look()


def _steps_taken(workdir: epath.Path) -> int:
    """Return the steps of the newest checkpoint; 0 if there is none."""
    try:
        return int(store.find(workdir).name)
    except (UserError, ValueError):
        return 0


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
    values["data.mixture"] = config_mixture.canonical(cfg.data.mixture)
    for name in ("data.path", "run.checkpoint_minutes"):
        del values[name]
    processes.require_equal(values, "start every process with the same command")


def finished(workdir: epath.Path, steps: int = 0) -> dict[str, Any] | None:
    """Return the content of DONE.json as process 0 sees it, with NaN for null; None where there is none.

    One of fewer than `steps` steps, of a run that has grown since, is none.
    """
    done = workdir / outcome.FILE

    @on_all_processes
    def read() -> str:
        return untrusted.read_text(done) if jax.process_index() == 0 and done.exists() else ""

    text = processes.gather(read())[0]
    try:
        result = outcome.parse(text, "it") if text else None
    except UserError as error:
        raise UserError(f"{done} is damaged ({error}); delete it, and the same command ends the run again") from error
    return result if result and result["step"] >= steps else None


@on_all_processes
def record_run(cfg: Config, workdir: epath.Path) -> None:
    """Write config.json and environment.json, on the first process."""
    if jax.process_index():
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _set_aside_result(cfg, workdir)
        write_atomically(workdir / "config.json", config_io.to_json(cfg))
        path = workdir / "environment.json"
        last = _last_environment(path)
        earlier = [*last.pop("earlier", []), last] if last else []
        write_atomically(path, json.dumps({**environment(), "earlier": earlier}, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to the run directory {workdir}: {error.strerror}; choose another --workdir"
        ) from error


def _set_aside_result(cfg: Config, workdir: epath.Path) -> None:
    """Rename the result of a run that has grown since; it is all that is left of its end if the rest of it fails."""
    if not (done := workdir / outcome.FILE).exists():
        return
    steps = outcome.parse(untrusted.read_text(done), str(done))["step"]
    if steps < cfg.run.steps:
        done.rename(workdir / f"DONE-{steps}.json")


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
