"""Silence Orbax's logging, and nobody else's.

It logs every save at length, and a failure many times over on three channels, some of it long after the call. Every
failure is raised as one line (see `failures`), so the rest is dropped. If absl's log has an explicit level, it stays.
"""

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from diffusionlm.checkpoint.failures import is_storage_error, root_cause


def quieten() -> None:
    """Install the filters, unless they are installed.

    This is called before Orbax is, so that importing this package changes nothing for the process.
    """
    logging.getLogger("absl").addFilter(_keep_absl)
    logging.getLogger("asyncio").addFilter(_keep_asyncio)
    if getattr(sys.unraisablehook, "func", None) is not _report:
        sys.unraisablehook = functools.partial(_report, report=sys.unraisablehook)


def _in_orbax(filename: str) -> bool:
    return os.path.join("orbax", "checkpoint") in filename


def _keep_absl(record: logging.LogRecord) -> bool:
    return logging.getLogger("absl").level != logging.NOTSET or not _in_orbax(record.pathname)


def _keep_asyncio(record: logging.LogRecord) -> bool:
    """Drop tasks that failed beside the one that was reported."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not is_storage_error(root_cause(error))


def _report(unraisable: Any, report: Callable[[Any], Any]) -> None:
    """Drop parts that were in flight: they end after Orbax has closed the event loop that they belong to."""
    code = getattr(unraisable.object, "cr_code", None)
    late = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
    if not late and not (code and _in_orbax(code.co_filename)):
        report(unraisable)
