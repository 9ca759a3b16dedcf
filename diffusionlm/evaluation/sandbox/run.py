"""Find a sandbox that works on this machine, and run programs in it."""

import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from diffusionlm.errors import UserError
from diffusionlm.evaluation.sandbox import backends
from diffusionlm.evaluation.sandbox.backends import Job, Layout, Limits
from diffusionlm.untrusted import printable

_HELLO = "import os; os.write(1, b'works')"


class Outcome(NamedTuple):
    """Hold how a program ended.

    Attributes:
      ending: "exit", "time" if it took too long, or "output" if it wrote too much.
      code: its exit code, from 128 on if a signal ended it; None unless it ended by itself.
      output: what it wrote, up to the limit.
    """

    ending: Literal["exit", "time", "output"]
    code: int | None
    output: str


@dataclass(frozen=True)
class Sandbox:
    """A way to run programs.

    Attributes:
      name: a key of `backends.SANDBOXES`, or "unprotected".
      layout: what programs may see.
      limits: what they may use.
    """

    name: str
    layout: Layout
    limits: Limits = Limits()

    @property
    def note(self) -> str:
        """A sentence about where programs ran."""
        protected = self.name in backends.SANDBOXES
        return f"programs ran in the sandbox {self.name}" if protected else "programs ran WITHOUT a sandbox"

    def run(self, program: str) -> Outcome:
        """Run a program of Python and return how it ended; everything that it started is killed then.

        The exit code of a sandbox that could not be made is 127 or that of its tool, and its output says why.
        """
        with tempfile.TemporaryDirectory(prefix="diffusionlm-") as directory:
            os.chmod(directory, 0o755)  # the sandbox may run as another user
            path, root = Path(directory) / "program.py", Path(directory) / "root"
            path.write_text(program, encoding="utf-8", errors="backslashreplace")
            path.chmod(0o644)
            root.mkdir()
            lowered = self.name == "bubblewrap" and os.geteuid() == 0  # limits on processes do not hold for root
            user, group = (backends.NOBODY,) * 2 if os.geteuid() == 0 else (os.geteuid(), os.getegid())
            job = Job(str(path), str(root), self.limits, self.layout, user, group)
            make = backends.SANDBOXES.get(self.name, backends.unprotected)
            return _run(make(job), str(root), self.limits, user if lowered else None)


def find(*, allow_code_execution: bool) -> Sandbox:
    """Return the first sandbox that works on this machine.

    Args:
      allow_code_execution: where none works, run programs without one, with the rights of this process.

    Raises:
      UserError: none works, and `allow_code_execution` is False.
    """
    layout, reasons = backends.layout(), []
    for name in backends.SANDBOXES:
        sandbox = Sandbox(name, layout)
        if (reason := why_not(sandbox)) is None:
            return sandbox
        reasons.append(f"{name}: {reason}")
    if allow_code_execution:
        return Sandbox("unprotected", layout)
    raise UserError(
        f"what a model writes runs only in a sandbox, and none works here ({'; '.join(reasons)}); install bubblewrap, "
        "or pass --allow_code_execution where the code may do anything that you may"
    )


def why_not(sandbox: Sandbox) -> str | None:
    """Return in words why a sandbox does not work on this machine, None if it does."""
    tool = backends.PROGRAMS.get(sandbox.name)
    if tool is not None and shutil.which(tool) is None:
        return f"{tool} is not installed"
    try:
        outcome = sandbox.run(_HELLO)
    except OSError as error:
        return error.strerror or str(error)
    if outcome == ("exit", 0, "works"):
        return None
    return printable(" ".join(outcome.output.split())[:120]) or f"it ended with code {outcome.code}"


def _run(command: list[str], directory: str, limits: Limits, user: int | None) -> Outcome:
    """Run a command in a session of its own, and kill the session at the end."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=directory,
        env=backends.ENVIRONMENT | {"PATH": os.environ.get("PATH", backends.ENVIRONMENT["PATH"])},
        start_new_session=True,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )
    try:
        ending, output = _read(process, time.monotonic() + limits.seconds, limits.output)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return Outcome(ending, code if ending == "exit" else None, output.decode(errors="replace"))


def _read(
    process: subprocess.Popen[bytes], deadline: float, most: int
) -> tuple[Literal["exit", "time", "output"], bytes]:
    """Read a process' output until it ends, writes more than `most` bytes, or the time is over."""
    assert process.stdout is not None
    output, ended = b"", False
    os.set_blocking(process.stdout.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            # Once the process has ended, what it left behind may hold the pipe: only what is there is read.
            ready = selector.select(0 if ended else min(0.05, max(0.0, deadline - time.monotonic())))
            data = process.stdout.read(1 << 16) if ready else None
            output += data or b""
            if len(output) > most:
                return "output", output[:most]
            if ended and not data:
                return "exit", output
            if not ended and time.monotonic() >= deadline:
                return "time", output
            if data == b"":  # it has closed its output, and may still run
                selector.unregister(process.stdout)
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    return "time", output
                return "exit", output
            ended = process.poll() is not None
