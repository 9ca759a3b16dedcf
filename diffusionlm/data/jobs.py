"""Work in parts: jobs that leave receipts, by which work that was interrupted goes on, and who does them.

A job is a small value that can be pickled. It writes its files into a directory that all workers see, and then its
receipt. Doing it twice gives the same files, so a job may be repeated at any time, by any worker.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from etils import epath

from diffusionlm.data.ordered_map import Map
from diffusionlm.errors import StorageError, UserError
from diffusionlm.storage import write_atomically

FAILED = ".failed"  # the ending of the file that says why a job has no receipt

Receipt = dict[str, Any]  # in JSON types


class Job(Protocol):
    """A part of the work of preparing data."""

    @property
    def receipt(self) -> str:
        """The path of its receipt, which is there once the job is done."""
        ...

    def work(self) -> Receipt:
        """Do the job and return its receipt; raise `UserError` if the input is not usable."""
        ...


Runner = Callable[[Iterable[Job]], Iterator[Receipt]]
"""Does jobs and yields their receipts, in order; raises the `UserError` of the first job that fails."""


class Failure(NamedTuple):
    """The message of the `UserError` of a job."""

    message: str


def perform(job: Job) -> Receipt | Failure:
    """Do a job, unless it has a receipt already; return its receipt.

    What fails because of the input is returned, and not raised: a cluster would try it again, as it should what fails
    because of the storage (`StorageError`).
    """
    receipt = epath.Path(job.receipt)
    if (values := read_receipt(receipt)) is not None:
        return values
    try:
        values = job.work()
    except StorageError:
        raise
    except UserError as error:
        message = str(error).encode(errors="backslashreplace")
        write_atomically(receipt.with_name(receipt.name + FAILED), message)
        return Failure(message.decode())
    write_atomically(receipt, json.dumps(values))
    return values


def read_receipt(path: epath.Path) -> Receipt | None:
    """Return a receipt; None if there is none, or one that a crash of the machine left empty."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def checked(receipts: Iterable[Receipt | Failure]) -> Iterator[Receipt]:
    """Yield receipts until one is a failure; raise that as `UserError`."""
    for receipt in receipts:
        if isinstance(receipt, Failure):
            raise UserError(receipt.message)
        yield receipt


def local_runner(map_jobs: Map) -> Runner:
    """Return a runner that does jobs in this process, or in several of this machine (see `ordered_map`)."""
    return lambda jobs: checked(map_jobs(perform, jobs))


def write_array(path: epath.Path, array: np.ndarray) -> None:
    """Write an array into a file that appears whole."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomically(path, buffer.getvalue())


def read_array(path: epath.Path) -> np.ndarray:
    """Return an array that `write_array` wrote."""
    return np.load(io.BytesIO(path.read_bytes()))
