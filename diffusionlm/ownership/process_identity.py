"""Processes as other processes name them, and whether a named process has ended."""

import os
import socket
from pathlib import Path

from diffusionlm.schema import Record

_EXITING = 0x4  # PF_EXITING of the flags in /proc/PID/stat


class Process(Record, frozen=True):
    """A process of some machine.

    Numbers of processes are used again; so are the names of machines, by containers above all. Where the system
    tells, `machine` and `started` tell them apart.
    """

    host: str
    pid: int
    machine: str = ""  # the boot and the namespace of process numbers
    started: str = ""  # in clock ticks since the boot


def this_process() -> Process:
    """Return this process."""
    _, _, started = _stat(os.getpid())
    return Process(host=socket.gethostname(), pid=os.getpid(), machine=_machine(), started=started)


def is_local(process: Process) -> bool:
    """Return True if a process is of this machine, so that `has_ended` knows about it."""
    return (process.host, process.machine) == (socket.gethostname(), _machine())


def has_ended(process: Process) -> bool:
    """Return True if a process of this machine has ended or is about to; False if that is not known."""
    if not is_local(process):
        return False
    try:
        os.kill(process.pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        pass
    state, flags, started = _stat(process.pid)
    # A process that was killed is a zombie until its parent has asked about it.
    return state in ("Z", "X") or bool(flags & _EXITING) or (bool(started) and started != process.started)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _stat(pid: int) -> tuple[str, int, str]:
    """Return the state, the flags and the start of a process; empty where the system does not tell."""
    try:
        # The name of the program, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[6]), fields[19]
    except (OSError, IndexError, ValueError):
        return "", 0, ""
