"""Run several processes as one: join, gather, agree, and fail together.

Every host runs one process with the same command. `train` calls `initialize` first; a notebook on a pod calls it before
it uses a device.
"""

import functools
import json
import logging
import os
import socket
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar, cast

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from diffusionlm.errors import LostProcess, UserError, shows_lost_process

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

# After so long without a heartbeat, a host counts as dead, and a host that failed stops waiting for the others. With
# JAX's defaults, 100 s and 300 s, all other chips would be idle for longer.
PATIENCE_SECONDS = 60
VISIBLE_SECONDS = 30.0  # a network file system may show another host's files so late


def initialize(patience_seconds: int = PATIENCE_SECONDS) -> None:
    """Join the other processes of this run; do nothing if there are none or if this process has joined them before.

    The environment says which processes there are: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID if
    they are set, else Slurm, Open MPI, or a Cloud TPU (virtual machines and GKE, with several slices too). A machine
    with none of these is a run of one process, and nothing asks the network about it.

    Args:
      patience_seconds: time without a heartbeat after which a host counts as dead.

    Raises:
      UserError: the other processes cannot be joined, or this process has used a device already.
    """
    if jax.distributed.is_initialized() or (count := process_count()) == 1:
        return
    addresses: dict[str, Any] = {}
    if "JAX_NUM_PROCESSES" in os.environ:
        addresses = {
            "coordinator_address": _variable("JAX_COORDINATOR_ADDRESS"),
            "num_processes": count,
            "process_id": _number("JAX_PROCESS_ID", at_least=0),
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(
            **addresses, heartbeat_timeout_seconds=patience_seconds, shutdown_timeout_seconds=patience_seconds
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"cannot join the {count} processes of this run: {_one_line(error)}") from error


def process_count() -> int:
    """Return the number of processes of this run by the environment; 1 if it names none.

    Raises:
      UserError: the variables of the environment contradict each other or are not numbers.
    """
    if "JAX_NUM_PROCESSES" in os.environ:
        return _number("JAX_NUM_PROCESSES", at_least=1)
    if "JAX_COORDINATOR_ADDRESS" in os.environ and "SLURM_PROCID" not in os.environ:
        raise UserError("JAX_COORDINATOR_ADDRESS is set, and JAX_NUM_PROCESSES is not; set it and JAX_PROCESS_ID too")
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if name in os.environ:
            return _number(name, at_least=1)
    # JAX sets this flag where it finds a TPU; it defines its flags at run time.
    if "tpu" in (jax.config.jax_platforms or ""):  # pyright: ignore[reportAttributeAccessIssue]: added at run time
        return _tpu_hosts()
    return 1


def _tpu_hosts() -> int:
    """Return the number of hosts of this Cloud TPU, over all of its slices."""
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")  # on GKE
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "")
    if not hosts and "TPU_SKIP_MDS_QUERY" not in os.environ:  # a virtual machine asks its metadata server
        hosts = _metadata("worker-network-endpoints")
        for line in _metadata("tpu-env").splitlines():  # MEGASCALE_NUM_SLICES: '2'
            name, _, value = line.partition(":")
            if name.strip() == "MEGASCALE_NUM_SLICES":
                slices = slices or value.strip(" '")
    return len(hosts.split(",")) * int(slices or 1)


def _metadata(name: str) -> str:
    """Return an attribute of this virtual machine; empty if it has none, as on Colab."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{name}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=10
        ) as response:
            return response.read().decode()
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
    """Raise `UserError` if JAX knows of other processes that this one has not joined."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this is one of {jax.process_count()} processes that have not been joined; call "
            "diffusionlm.runtime.initialize() before anything else, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID"
        )


# What can fail or differ on one host alone goes through one of the functions below; else the others wait for ever.


def gather(text: str) -> list[str]:
    """Return the texts of all processes, by process number.

    Every process must call this, and all must make such calls in the same order.
    """
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(max(sizes.max(), 1), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def run_on_all_processes(attempt: Callable[[], T]) -> T:
    """Call `attempt` on every process, and return its result if it succeeded on all of them.

    Raises:
      UserError: it failed on some process; every process raises it, with the names of those that failed. A process
        whose own failure is not a user's mistake raises that instead.
    """
    if jax.process_count() == 1:
        return attempt()
    result, failure = None, None
    try:
        result = attempt()
    except Exception as error:  # any failure must reach the others
        failure = error
    reports = gather("" if failure is None else f"{socket.gethostname()}\n{_one_line(failure)}")
    if not any(reports):
        return cast(T, result)
    if failure is not None and not isinstance(failure, (UserError, OSError)):
        raise failure  # not a user's mistake: its traceback is needed
    raise UserError(_failures(reports)) from failure


def on_all_processes(function: Callable[P, T]) -> Callable[P, T]:
    """Make every call of `function` one of `run_on_all_processes`."""

    @functools.wraps(function)
    def call(*args: P.args, **named: P.kwargs) -> T:
        return run_on_all_processes(lambda: function(*args, **named))

    return call


@contextmanager
def on_first_process(context: Callable[[], AbstractContextManager[T]]) -> Iterator[T | None]:
    """Enter a context on the first process alone; yield its value there, and None elsewhere.

    Raises:
      UserError: it cannot be entered (see `run_on_all_processes`).
    """
    with ExitStack() as stack:
        yield run_on_all_processes(lambda: None if jax.process_index() else stack.enter_context(context()))


def _failures(reports: list[str]) -> str:
    r"""Return one line for the reports of all processes, each "host\nreason" or empty."""
    reasons: dict[str, list[str]] = {}
    for number, text in enumerate(reports):
        if text:
            host, reason = text.split("\n", 1)
            reasons.setdefault(reason, []).append(f"{number} ({host})")
    if len(reasons) == 1 and all(reports):
        return next(iter(reasons))  # all made the same mistake
    shown = [f"process {_some(processes)} of {len(reports)}: {reason}" for reason, processes in reasons.items()]
    return "; ".join([*shown[:3], *([f"and {len(shown) - 3} more reasons"] if len(shown) > 3 else [])])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def require_equal(values: dict[str, Any], fix: str) -> None:
    """Raise `UserError` on every process unless all have the same values, which must be JSON.

    Args:
      values: the values of this process by name.
      fix: the advice at the end of the message.
    """
    gathered = [json.loads(text) for text in gather(json.dumps({**values, "host": socket.gethostname()}))]
    for number, other in enumerate(gathered):
        if different := [name for name in values if other[name] != gathered[0][name]]:
            shown = ", ".join(f"{name}={other[name]} (process 0: {gathered[0][name]})" for name in different[:3])
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise UserError(f"process {number} of {len(gathered)} ({other['host']}) has {shown}{more}; {fix}")


def require_shared(directory: epath.Path) -> None:
    """Raise `UserError` on every process unless all see a file that process 0 writes to `directory`.

    Process 0 makes the directory if it does not exist.
    """
    if jax.process_count() == 1:
        return
    probe = directory / f".visible-to-all-{gather(uuid.uuid4().hex)[0]}"

    def write() -> None:
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("")

    def wait_for_probe() -> None:
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not probe.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{directory} is not the directory that process 0 writes to; give one that all hosts share, on a "
                    "bucket or a network file system, with --workdir"
                )
            time.sleep(0.1)

    run_on_all_processes(write)
    try:
        run_on_all_processes(wait_for_probe)
    finally:
        if jax.process_index() == 0:
            try:
                probe.unlink()
            except OSError as error:  # the file is empty and harmless
                log.warning("cannot delete %s: %s", probe, error)


def any_across_processes(*flags: bool) -> list[bool]:
    """Return, for each flag, whether it is true on any process.

    The call waits for the work that the devices have in their queues.
    """
    if jax.process_count() == 1:
        return list(flags)
    return multihost_utils.process_allgather(np.array(flags)).any(axis=0).tolist()


@contextmanager
def name_lost_processes() -> Iterator[None]:
    """Raise `LostProcess` for what fails in this context because another process died."""
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and not isinstance(error, LostProcess) and shows_lost_process(error):
            raise LostProcess(f"continue process {jax.process_index()} of {jax.process_count()}", error) from error
        raise


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: {text}"
