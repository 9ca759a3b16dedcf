"""Find a sandbox that works on this machine, and run programs in it."""

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple

from diffusionlm.errors import UserError
from diffusionlm.evaluation.sandbox import backends
from diffusionlm.evaluation.sandbox.backends import Job, Layout, Limits
from diffusionlm.untrusted import printable

_File = int | IO[bytes]  # what `subprocess` takes for a stream

_OUT_OF_TIME = 128 + signal.SIGXCPU  # the exit code of a sandbox whose program had no time of a processor left
_HELLO = "import os; os.write(1, b'works')"


class Outcome(NamedTuple):
    """Hold how a program ended.

    Attributes:
      ending: "exit", "time" if it used up its time of a processor, "late" if it did not and the clock ran out, as on a
        busy machine or in a sleep, or "output" if it wrote too much.
      code: its exit code, from 128 on if a signal ended it; None unless it ended by itself.
      output: what it wrote, up to the limit.
    """

    ending: Literal["exit", "time", "late", "output"]
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
        with self._started(program, subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT) as process:
            return _outcome(process, process.stdout, self.limits)

    def converse(self, answering: str, asking: str) -> Outcome:
        """Run two programs, each in a sandbox of its own, which see nothing of each other but what they write.

        What one writes to its standard output is the standard input of the other. Both are killed when the second ends.

        Args:
          answering: the first program; what it writes to its error stream is lost.
          asking: the second program.

        Returns:
          How the second program ended; its output is what it wrote to its error stream. If it fails because the first
          one has used up its time, the ending is "time".
        """
        with contextlib.ExitStack() as running:
            asked, asks, replied, replies = ends = (*os.pipe(), *os.pipe())
            try:
                answers = running.enter_context(self._started(answering, asked, replies, subprocess.DEVNULL))
                process = running.enter_context(self._started(asking, replied, asks, subprocess.PIPE))
            finally:  # each program has its ends; without ours, one notices when the other is gone
                for end in ends:
                    os.close(end)
            outcome = _outcome(process, process.stderr, self.limits)
            if outcome.ending == "exit" and outcome.code != 0 and _ran_out(answers):
                return outcome._replace(ending="time", code=None)
            return outcome

    @contextlib.contextmanager
    def _started(self, program: str, stdin: _File, stdout: _File, stderr: _File) -> Iterator[subprocess.Popen[bytes]]:
        """Start a program; at the end kill everything in its session."""
        with tempfile.TemporaryDirectory(prefix="diffusionlm-") as directory:
            os.chmod(directory, 0o755)  # the sandbox may run as another user
            path, root = Path(directory) / "program.py", Path(directory) / "root"
            path.write_text(program, encoding="utf-8", errors="backslashreplace")
            path.chmod(0o644)
            root.mkdir()
            lowered = self.name == "bubblewrap" and os.geteuid() == 0  # limits on processes do not hold for root
            user, group = (backends.NOBODY,) * 2 if os.geteuid() == 0 else (os.geteuid(), os.getegid())
            job = Job(str(path), str(root), self.limits, self.layout, user, group)
            command = backends.SANDBOXES.get(self.name, backends.unprotected)(job)
            with session(command, str(root), user if lowered else None, stdin, stdout, stderr) as process:
                yield process


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


@contextlib.contextmanager
def session(
    command: list[str], directory: str, user: int | None, stdin: _File, stdout: _File, stderr: _File
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a session of its own, as another user if one is given, and kill the session at the end."""
    process = subprocess.Popen(
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=directory,
        env=backends.ENVIRONMENT | {"PATH": os.environ.get("PATH", backends.ENVIRONMENT["PATH"])},
        start_new_session=True,
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        for file in (process.stdout, process.stderr):
            if file is not None:
                file.close()


def _outcome(process: subprocess.Popen[bytes], pipe: IO[bytes] | None, limits: Limits) -> Outcome:
    """Return how a process ended, with what it wrote to a pipe; whatever still runs of it is killed."""
    assert pipe is not None
    ending, output = _read(process, pipe, time.monotonic() + limits.clock, limits.output)
    text = output.decode(errors="replace")
    if ending != "exit":
        return Outcome(ending, None, text)
    code = _code(process.wait())
    return Outcome("time", None, text) if code == _OUT_OF_TIME else Outcome(ending, code, text)


def _code(status: int) -> int:
    return status if status >= 0 else 128 - status


def _ran_out(process: subprocess.Popen[bytes]) -> bool:
    """Return True if a process ends for want of time; it has a few seconds to notice that the other one is gone."""
    try:
        return _code(process.wait(5)) == _OUT_OF_TIME
    except subprocess.TimeoutExpired:
        return False


def _read(
    process: subprocess.Popen[bytes], pipe: IO[bytes], deadline: float, most: int
) -> tuple[Literal["exit", "late", "output"], bytes]:
    """Read a pipe from a process until it ends, writes more than `most` bytes, or the time is over."""
    output, ended = b"", False
    os.set_blocking(pipe.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            # Once the process has ended, what it left behind may hold the pipe: only what is there is read.
            ready = selector.select(0 if ended else min(0.05, max(0.0, deadline - time.monotonic())))
            data = pipe.read(1 << 16) if ready else None
            output += data or b""
            if len(output) > most:
                return "output", output[:most]
            if ended and not data:
                return "exit", output
            if not ended and time.monotonic() >= deadline:
                return "late", output
            if data == b"":  # it has closed its output, and may still run
                selector.unregister(pipe)
                try:
                    process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    return "late", output
                return "exit", output
            ended = process.poll() is not None
