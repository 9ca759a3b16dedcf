"""Turn errors of checkpoint I/O into one-line messages."""

import contextlib
import json
import os
import re
import textwrap
from collections.abc import Iterator

import jax
from etils import epath

from diffusionlm import untrusted
from diffusionlm.errors import LostProcess, UserError, shows_lost_process
from diffusionlm.storage import in_bucket


def root_cause(error: BaseException) -> BaseException:
    """Return the error that was raised first; Orbax wraps it, sometimes repeatedly."""
    return root_cause(error.__cause__) if error.__cause__ else error


def is_storage_error(error: BaseException) -> bool:
    """Return True if an error is TensorStore's: a ValueError that begins with a status, or with what it was doing."""
    return isinstance(error, ValueError) and bool(re.match(r"[A-Z_]+: |Error (opening|reading|writing) ", str(error)))


@contextlib.contextmanager
def reading(path: epath.Path, item: str) -> Iterator[None]:
    """Turn what is raised while an item of a checkpoint is read into a `UserError`, unless the machine caused it."""
    _require_regular_files(path)
    try:
        yield
    except Exception as error:  # a damaged file surfaces as any of a dozen types
        if isinstance(root_cause(error), jax.errors.JaxRuntimeError | MemoryError):
            raise
        reason = _malformed(path / item) or _reason(error)
        what = f"cannot read the checkpoint {path}, a file of {item}/ is damaged or missing"
        raise UserError(f"{what} ({reason}); use another step, or a copy") from error


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


def _require_regular_files(path: epath.Path) -> None:
    """Refuse a checkpoint with a pipe or a device, which Orbax would wait for or read without end."""
    if in_bucket(path):
        return
    for directory, _, names in os.walk(path):
        for name in names:
            if os.path.exists(file := os.path.join(directory, name)):
                untrusted.require_regular(file)


def _malformed(item: epath.Path) -> str:
    """Return the file of an item that should be JSON and is not, if any: Orbax does not say which it could not read."""
    for file in (item / "_METADATA", item / "_sharding", *sorted((item / "array_metadatas").glob("*"))):
        try:
            json.loads(file.read_text())
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as error:
            return f"{file.relative_to(item)} ({textwrap.shorten(str(error), 100)})"
    return ""


def _reason(error: BaseException) -> str:
    cause = root_cause(error)
    text = str(cause) or type(cause).__name__
    if code := re.search(r"os_error_code='(\d+)'", text):
        return os.strerror(int(code[1]))
    if array := re.search(r'Error reading shard entry.* in "([^"]+)/c[/"]', text):
        return f"the array {array[1]} differs from what was written"
    if file := re.findall(r'local file "([^"]+)": ([^"]*)', text.partition(" [")[0]):  # the innermost says most
        text = ": ".join(file[-1])
    return textwrap.shorten(text, 200)
