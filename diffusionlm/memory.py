"""The memory that there is, and the refusal of what cannot fit, before it is allocated.

An allocation that XLA refuses surfaces late and, on CPUs, in the middle of a computation. This module imports no JAX.
"""

import os
import re
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusionlm.errors import UserError

GIB = 2**30
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")  # the control groups of this process


def host_limit() -> tuple[int, str] | None:
    """Return the bytes that this process may use, and what sets that limit; None where the system does not tell."""
    limits = [(size, "this machine has") for size in _physical()]
    limits += [(size, "its control group allows") for size in _control_groups()]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append((address_space, "`ulimit -v` allows"))
    return min(limits, default=None)


def device_limit(device: Any) -> tuple[int, str] | None:
    """Return the bytes of a `jax.Device`, and what sets that limit; None if unknown, and for CPUs."""
    if device.platform == "cpu":
        return None
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return (limit, "it has") if limit else None


def require_room(what: str, parts: Mapping[str, int], devices: Sequence[Any] | None, fix: str) -> None:
    """Refuse what cannot fit into the memory of its devices, even if nothing else needs any.

    Args:
      what: what needs the memory, such as "training demo".
      parts: bytes on each device by name, such as {"parameters": 10**9}: a lower bound.
      devices: the `jax.Device`s of this process that hold as much each; those of the host share its memory. None: the
        host itself.
      fix: the advice at the end of the message.

    Raises:
      UserError: they do not fit; the message has the estimate.
    """
    if devices is None:
        limit, copies, place = host_limit(), 1, "memory"
    elif not devices:
        return
    elif devices[0].platform == "cpu":
        limit, copies, place = host_limit(), len(devices), "memory"
    else:
        limit, copies, place = device_limit(devices[0]), 1, f"memory on each {devices[0].device_kind}"
    if limit is None or copies * sum(parts.values()) <= limit[0]:
        return
    shown = ", ".join(f"{name} {gib(copies * size)}" for name, size in parts.items())
    raise UserError(
        f"{what} needs at least {gib(copies * sum(parts.values()))} of {place} ({shown}), and {limit[1]} "
        f"{gib(limit[0])}; {fix}"
    )


def gib(size: float) -> str:
    """Return a number of bytes in GiB, or in MiB where it is small, with three figures."""
    number, unit = (size / GIB, "GiB") if size >= GIB else (size * 1024 / GIB, "MiB")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def _physical() -> list[int]:
    """Return the memory of this machine with its swap space."""
    try:
        fields = dict(re.findall(r"^(\w+): +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
        return [1024 * (int(fields["MemTotal"]) + int(fields.get("SwapTotal", 0)))]
    except (OSError, KeyError):
        pass
    try:
        return [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (ValueError, OSError):
        return []


def _control_groups() -> list[int]:
    """Return the limits of the control groups that this process is in, and of those around them."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:  # "0::/path", or "5:memory:/path" with version 1
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, name = (_CGROUPS / "memory", "memory.limit_in_bytes") if controllers else (_CGROUPS, "memory.max")
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            try:
                text = (root / group / name).read_text().strip()
            except OSError:  # the root has no limit, and a container may see only its own group, as the root
                continue
            if text.isdigit():
                limits.append(int(text))
    return limits
