"""The `diffusionlm` command. Every verb is thin: the work is a call that a notebook can make too.

A new verb is one function in a file of this package and one entry in `VERBS`. A user's mistake is one line on stderr
and exit code 2.
"""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from diffusionlm.allocator import keep_freed_memory
from diffusionlm.cli import app, chat, completion, data, evaluate, experiments, sample, sharing, sweep, train, weights
from diffusionlm.cli import compile as cli_compile
from diffusionlm.cli.output import PROGRAM, fail, summary
from diffusionlm.console import write
from diffusionlm.errors import LostProcess, UserError, naming, suggest
from diffusionlm.parallel.signals import never_deaf
from diffusionlm.platforms import leave_out_absent_tpus
from diffusionlm.version import __version__


def _completion(args: list[str], prog: str) -> int:
    """Print a script with which a shell completes this command: completion bash, zsh or tcsh."""
    return completion.completion(args, prog, VERBS)


# Each takes the words after the verb and the name by which the verb is called; it returns the exit code.
VERBS: dict[str, Callable[[list[str], str], int]] = {
    "train": train.train,
    "sample": sample.sample,
    "chat": chat.chat,
    "app": app.app,
    "evaluate": evaluate.evaluate,
    "import": weights.import_weights,
    "export": weights.export_weights,
    "card": sharing.card,
    "push": sharing.push,
    "compile": cli_compile.compile_check,
    "data prepare": data.data_prepare,
    "data inspect": data.data_inspect,
    "experiments": experiments.list_experiments,
    "sweep plan": sweep.plan,
    "sweep run": sweep.run,
    "sweep status": sweep.status,
    "sweep report": sweep.report,
    "completion": _completion,
}


def entry_point() -> None:
    """Run `main` with the logging and warnings of a program rather than of a library."""
    on_cpu = leave_out_absent_tpus()  # before JAX looks for them
    keep_freed_memory()  # before JAX starts its threads
    never_deaf()
    _prepare_streams()
    if on_cpu and sys.argv[1:2] in (["train"], ["sweep"]):
        write("libtpu finds no TPU here, so this computes on the CPU; JAX_PLATFORMS=tpu insists on one", error=True)
    logging.getLogger().addHandler(StderrHandler())
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of third parties, which a user cannot act on
    try:
        code = main(sys.argv[1:])
    except BrokenPipeError:  # `diffusionlm experiments | head`
        code = 1
    try:
        sys.stdout.flush()
    except OSError:  # `main` has reported it; the interpreter would try and report it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _prepare_streams() -> None:
    """Open the standard streams that the caller closed, and let none refuse a character that its encoding lacks."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:  # or the next file that is opened gets its number, and what is printed
            descriptor = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=descriptor > 2))
            assert descriptor >= number
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str]) -> int:
    """Run one command; return its exit code: 0, 2 for a user's mistake, 1 for a run that failed, 130 for Ctrl-C."""
    try:
        code = _dispatch(list(argv))
        with naming("standard output"):
            sys.stdout.flush()
        return code
    except UserError as error:
        return fail(str(error), 2)
    except LostProcess as error:
        return fail(str(error), 1)
    except BrokenPipeError:
        raise
    except OSError as error:  # a disk, a network or a path refuses
        file = error.filename2 or error.filename
        return fail(f"{error.strerror}: {file}" if file else error.strerror or str(error), 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except SystemExit as stop:  # after --help
        return int(stop.code or 0)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        write(_help(list(VERBS)))
        return 0
    if argv == ["--version"]:
        write(f"{PROGRAM} {__version__}")
        return 0
    for words in (2, 1):
        verb = " ".join(argv[:words])
        if verb in VERBS:
            return VERBS[verb](argv[words:], f"{PROGRAM} {verb}")
    family = [verb for verb in VERBS if verb.startswith(f"{argv[0]} ")]
    if family and argv[1:2] in ([], ["-h"], ["--help"]):
        write(_help(family))
        return 0
    verb = " ".join(argv[: 2 if family else 1])
    raise UserError(f"unknown verb {verb!r}{suggest(verb, VERBS)}")


def _help(verbs: Sequence[str]) -> str:
    width = max(map(len, verbs))
    lines = [f"{verb:{width}}  {summary(VERBS[verb])}" for verb in verbs]
    return "\n".join(
        [
            f"usage: {PROGRAM} VERB [...] | --version",
            "",
            "Masked diffusion language models: prepare text, train, sample, evaluate, find scaling laws.",
            "",
            *lines,
            "",
            f"`{PROGRAM} VERB --help` lists everything that a verb takes.",
        ]
    )


class StderrHandler(logging.Handler):
    """Prints warnings of this package and of JAX as one line each; of other libraries, errors only."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record if it matters to the user."""
        known = record.name.split(".")[0] in ("diffusionlm", "jax")
        if record.levelno >= (logging.WARNING if known else logging.ERROR):
            write(f"{PROGRAM}: {record.levelname.lower()}: {' '.join(record.getMessage().split())}", error=True)
