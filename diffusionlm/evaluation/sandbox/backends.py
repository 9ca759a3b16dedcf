"""The ways to run a program, as command lines: pure functions of what is run, the limits and the machine's layout."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

NOBODY = 65534
WORK = "/work"  # the program's directory inside of a sandbox
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
STARTER = str(Path(__file__).with_name("starter.py"))
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store")


@dataclass(frozen=True)
class Limits:
    """Limit what a program may use.

    Attributes:
      seconds: time of a processor, of each process.
      clock: seconds on the clock, more than `seconds` because the machine may be busy.
      memory: bytes of addresses of each process.
      processes: processes and threads at a time, those that the sandbox itself needs among them.
      file: bytes of one file, without a sandbox; in a sandbox no file can be written.
      open_files: files open at a time.
      output: bytes of output.
    """

    seconds: int = 10
    clock: int = 30
    memory: int = 512 << 20
    processes: int = 4
    file: int = 16 << 20
    open_files: int = 32
    output: int = 1 << 20


@dataclass(frozen=True)
class Layout:
    """Describe what of a machine a program sees.

    Attributes:
      python: the interpreter.
      read_only: files and directories that are shown under their own names.
      links: symbolic links, (what it holds, its path).
    """

    python: str
    read_only: tuple[str, ...]
    links: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Job:
    """One program to run.

    Attributes:
      program: the path of its text.
      directory: an empty directory of its own on the host.
      limits: what it may use.
      layout: what it may see.
      user: the user that the sandbox runs as, outside.
      group: the group of that user.
    """

    program: str
    directory: str
    limits: Limits
    layout: Layout
    user: int
    group: int


def layout(python: str | None = None) -> Layout:
    """Return what an interpreter needs: itself, its library and those of the system; None: the one that runs this."""
    executable = os.path.realpath(python or getattr(sys, "_base_executable", sys.executable))
    prefix = os.path.dirname(os.path.dirname(executable))
    paths, links = [executable], []
    for path in (*LIBRARIES, f"{prefix}/lib", f"{prefix}/lib64"):
        if os.path.islink(path):
            links.append((os.readlink(path), path))
        elif os.path.isdir(path) and path not in paths:
            paths.append(path)
    # Directories first, as a later mount would hide an earlier one below it.
    return Layout(executable, tuple(sorted(paths)), tuple(dict.fromkeys(links)))


def bubblewrap(job: Job) -> list[str]:
    """Return the command line of bubblewrap (0.8 or later), https://github.com/containers/bubblewrap.

    No directory can be written: bubblewrap cannot limit the number of files, each of which takes memory of the kernel.
    """
    words = ["bwrap", "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    words += ["--unshare-cgroup-try", "--disable-userns", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    words += ["--uid", str(NOBODY), "--gid", str(NOBODY), "--hostname", "sandbox", "--clearenv"]
    for path in job.layout.read_only:
        words += ["--ro-bind", path, path]
    for target, path in job.layout.links:
        words += ["--symlink", target, path]
    for path in DEVICES:
        words += ["--dev-bind", path, path]
    words += ["--ro-bind", job.program, f"{WORK}/program.py", "--ro-bind", STARTER, f"{WORK}/starter.py"]
    words += ["--remount-ro", "/", "--chdir", WORK, "--"]
    return words + [job.layout.python, "-I", "-S", "-B", f"{WORK}/starter.py", "inside", _spec(job, WORK)]


def namespaces(job: Job) -> list[str]:
    """Return the command line of a sandbox of Linux namespaces, by `starter.py`."""
    return [job.layout.python, "-I", "-S", "-B", STARTER, "isolated", _spec(job, WORK)]


def unprotected(job: Job) -> list[str]:
    """Return the command line of a process with limits that is in no sandbox."""
    return [job.layout.python, "-I", "-S", "-B", STARTER, "limited", _spec(job, job.directory)]


SANDBOXES: dict[str, Callable[[Job], list[str]]] = {"bubblewrap": bubblewrap, "namespaces": namespaces}
PROGRAMS = {"bubblewrap": "bwrap"}  # what must be installed


def _environment(directory: str) -> dict[str, str]:
    return ENVIRONMENT | {"HOME": directory, "TMPDIR": directory}


def _command(job: Job, directory: str) -> list[str]:
    program = job.program if directory != WORK else f"{WORK}/program.py"
    return [job.layout.python, "-s", "-P", "-B", program]


def _spec(job: Job, directory: str) -> str:
    """Return what `starter.py` needs to know."""
    lists: dict[str, Sequence] = {"read_only": job.layout.read_only, "links": job.layout.links, "devices": DEVICES}
    return json.dumps(
        {
            "command": _command(job, directory),
            "directory": directory,
            "environment": _environment(directory),
            "limits": asdict(job.limits),
            "program": job.program,
            "root": job.directory,
        }
        | lists
    )
