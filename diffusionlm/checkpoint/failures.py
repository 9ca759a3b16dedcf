"""Turn errors of checkpoint I/O into one-line messages."""

import contextlib
import os
import re
import textwrap
from collections.abc import Iterator

import jax
from etils import epath

from diffusionlm.errors import LostProcess, UserError, shows_lost_process


def root_cause(error: BaseException) -> BaseException:
    """Return the error that was raised first; Orbax wraps it, sometimes repeatedly."""
    return root_cause(error.__cause__) if error.__cause__ else error


def is_storage_error(error: BaseException) -> bool:
    """Return True if an error is TensorStore's: a ValueError that begins with the name of a status."""
    return isinstance(error, ValueError) and bool(re.match(r"[A-Z_]+: ", str(error)))


@contextlib.contextmanager
def reading(path: epath.Path) -> Iterator[None]:
    """Turn what is raised while `path` is read into a `UserError`, unless the device or the host caused it."""
    try:
        yield
    except Exception as error:  # a damaged file surfaces as any of a dozen types
        if isinstance(root_cause(error), jax.errors.JaxRuntimeError | MemoryError):
            raise
        raise UserError(f"cannot read the checkpoint {path}, a file is damaged or missing: {_reason(error)}") from error


@contextlib.contextmanager
def writing(directory: epath.Path) -> Iterator[None]:
    """Turn what the storage raises while `directory` is written into a `UserError`, or `LostProcess`."""
    try:
        yield
    except Exception as error:
        cause = root_cause(error)
        if jax.process_count() > 1 and shows_lost_process(error):
            raise LostProcess(f"complete the checkpoints in {directory}", error) from error
        if isinstance(cause, OSError) or is_storage_error(cause):
            raise UserError(f"cannot write checkpoints to {directory}: {_reason(error)}") from error
        raise


def _reason(error: BaseException) -> str:
    cause = root_cause(error)
    if code := re.search(r"os_error_code='(\d+)'", str(cause)):
        return os.strerror(int(code[1]))
    return textwrap.shorten(str(cause) or type(cause).__name__, 200)
