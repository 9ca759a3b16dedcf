"""Several processes as one run: how they find each other, agree, fail together, and stop together.

One process a host, all with the same command. `initialize` is called first by `trainer.train`; a notebook on a pod
calls it before it looks at a device.
"""

import json
import logging
import os
import socket
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from diffusionlm.errors import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")

# A host that has died is missed, and one that has failed is no longer waited for, after so long; JAX's own 100 s and
# 300 s are time that all other chips stand idle.
PATIENCE_SECONDS = 60
SEEN_SECONDS = 30.0  # a network file system may show what another host wrote this late


def initialize(patience_seconds: int = PATIENCE_SECONDS) -> None:
    """Joins the other processes of this run; does nothing where there are none, or when it was done before.

    What counts is the environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID where they are set,
    else Slurm, Open MPI, or a Cloud TPU (virtual machines and GKE, slices included). A machine for itself is recognised
    by having none of these, without a look at the network.

    Raises:
      UserError: there are others, but they cannot be joined, or a device was used before.
    """
    if jax.distributed.is_initialized() or (count := process_count()) == 1:
        return
    given: dict[str, Any] = {}
    if "JAX_NUM_PROCESSES" in os.environ:
        given = {
            "coordinator_address": _variable("JAX_COORDINATOR_ADDRESS"),
            "num_processes": count,
            "process_id": _number("JAX_PROCESS_ID", at_least=0),
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(
            **given, heartbeat_timeout_seconds=patience_seconds, shutdown_timeout_seconds=patience_seconds
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"cannot join the {count} processes of this run: {_one_line(error)}") from error


def process_count() -> int:
    """How many processes the environment says that this run has: 1 where it says nothing."""
    if "JAX_NUM_PROCESSES" in os.environ:
        return _number("JAX_NUM_PROCESSES", at_least=1)
    if "JAX_COORDINATOR_ADDRESS" in os.environ and "SLURM_PROCID" not in os.environ:
        raise UserError("JAX_COORDINATOR_ADDRESS is set, and JAX_NUM_PROCESSES is not; set it and JAX_PROCESS_ID too")
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if name in os.environ:
            return _number(name, at_least=1)
    if "tpu" in (jax.config.jax_platforms or ""):  # set by JAX where it finds a TPU
        return _tpu_hosts()
    return 1


def _tpu_hosts() -> int:
    """Hosts of all slices of this Cloud TPU."""
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")  # of GKE
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "")
    if not hosts and "TPU_SKIP_MDS_QUERY" not in os.environ:  # on a virtual machine, its metadata server tells
        hosts = _metadata("worker-network-endpoints")
        for line in _metadata("tpu-env").splitlines():  # MEGASCALE_NUM_SLICES: '2'
            name, _, value = line.partition(":")
            if name.strip() == "MEGASCALE_NUM_SLICES":
                slices = slices or value.strip(" '")
    return len(hosts.split(",")) * int(slices or 1)


def _metadata(name: str) -> str:
    """An attribute of this virtual machine; empty where there is none, as on Colab."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=10
        ) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _variable(name: str) -> str:
    if name not in os.environ:
        raise UserError(f"JAX_NUM_PROCESSES is set, and {name} is not; set both, or neither")
    return os.environ[name]


def _number(name: str, at_least: int) -> int:
    text = _variable(name)
    if not text.isdigit() or int(text) < at_least:
        raise UserError(f"{name}={text!r} must be a whole number of at least {at_least}")
    return int(text)


def check_joined() -> None:
    """Raises `UserError` where JAX knows of other processes, and this one has not joined them."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this is one of {jax.process_count()} processes that have not been joined; call "
            "diffusionlm.runtime.initialize() before anything else, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID"
        )


# Agreement: what can fail, or be another, on one host alone goes through one of these, or the others wait for ever.


def gather(text: str) -> list[str]:
    """The texts of all processes, by process number. Every process must call this, in the same order."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(max(sizes.max(), 1), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def run_on_all_processes(attempt: Callable[[], T]) -> T:
    """`attempt()`, once it has succeeded on every process.

    Raises:
      UserError: it failed on any; on all processes alike, and it names those that failed.
    """
    if jax.process_count() == 1:
        return attempt()
    result, failure = None, None
    try:
        result = attempt()
    except Exception as error:  # whatever it is, the others must hear of it
        failure = error
    said = gather("" if failure is None else f"{socket.gethostname()}\n{_one_line(failure)}")
    if not any(said):
        return result
    if failure is not None and not isinstance(failure, (UserError, OSError)):
        raise failure  # not a user's mistake: with its traceback, here
    raise UserError(_failures(said)) from failure


def _failures(said: list[str]) -> str:
    """One line for what processes said, "host\\nreason" or nothing."""
    reasons: dict[str, list[str]] = {}
    for number, text in enumerate(said):
        if text:
            host, reason = text.split("\n", 1)
            reasons.setdefault(reason, []).append(f"{number} ({host})")
    if len(reasons) == 1 and all(said):
        return next(iter(reasons))  # a mistake that all made
    shown = [f"process {_some(who)} of {len(said)}: {reason}" for reason, who in reasons.items()]
    return "; ".join([*shown[:3], *([f"and {len(shown) - 3} more reasons"] if len(shown) > 3 else [])])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def require_equal(values: dict[str, Any], fix: str) -> None:
    """Raises `UserError` on every process unless all have the same `values`, which are JSON."""
    theirs = [json.loads(text) for text in gather(json.dumps({**values, "host": socket.gethostname()}))]
    for number, other in enumerate(theirs):
        if differ := [name for name in values if other[name] != theirs[0][name]]:
            shown = ", ".join(f"{name}={other[name]} (process 0: {theirs[0][name]})" for name in differ[:3])
            more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise UserError(f"process {number} of {len(theirs)} ({other['host']}) has {shown}{more}; {fix}")


def require_shared(directory: epath.Path) -> None:
    """Raises `UserError` on every process unless all see what process 0 writes to `directory`, which it makes."""
    if jax.process_count() == 1:
        return
    probe = directory / f".seen-by-all-{gather(uuid.uuid4().hex)[0]}"

    def write() -> None:
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("")

    def see() -> None:
        deadline = time.monotonic() + SEEN_SECONDS
        while not probe.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{directory} is not the directory that process 0 writes to; give one that all hosts share, on a "
                    "bucket or a network file system, with --workdir"
                )
            time.sleep(0.1)

    run_on_all_processes(write)
    try:
        run_on_all_processes(see)
    finally:
        if jax.process_index() == 0:
            try:
                probe.unlink()
            except OSError as error:  # it is empty, and in nobody's way
                log.warning("cannot delete %s: %s", probe, error)


def any_across_processes(*wishes: bool) -> list[bool]:
    """What any process wishes. To ask is to wait for the devices."""
    if jax.process_count() == 1:
        return list(wishes)
    return multihost_utils.process_allgather(np.array(wishes)).any(axis=0).tolist()


@contextmanager
def log_lost_processes() -> Iterator[None]:
    """Says where to look when a computation fails that several processes share."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        if jax.process_count() > 1:
            log.error(
                "process %d of %d cannot go on, most likely because another one died: its log says why; start all "
                "processes again to go on from the newest checkpoint",
                jax.process_index(),
                jax.process_count(),
            )
        raise


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: {text}"
