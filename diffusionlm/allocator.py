"""Keep glibc from returning freed memory to the system, which slows XLA on CPUs.

By itself glibc gives every large buffer back to the system when it is freed, so that each step of a program takes page
faults for all of its temporaries again. XLA on CPUs allocates with it.
"""

import ctypes
import os
import platform
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
TRIM_BYTES = (1 << 31) - 1  # free memory at the top of the heap that is kept; mallopt takes an int


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next buffer, in one heap; return True if it does.

    Call it at the start of a process, before threads are started, and never from a library. It does nothing where the
    program will not compute on a CPU, as far as the environment and the devices of this machine tell, nor where the
    user has set glibc's tunables or preloaded another allocator.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    if not _computes_on_cpu(os.environ) or _is_tuned(os.environ):
        return False
    libc = ctypes.CDLL(None)
    # All of them: a buffer of its own mapping, or in an arena of its own, would be unmapped when it is freed.
    settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, TRIM_BYTES))
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)


def _computes_on_cpu(environment: Mapping[str, str]) -> bool:
    """Return True unless JAX will use an accelerator."""
    if platforms := environment.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return not any(os.path.exists(device) for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0"))


def _is_tuned(environment: Mapping[str, str]) -> bool:
    names = ("GLIBC_TUNABLES", "LD_PRELOAD")
    return any(name in environment for name in names) or any(name.startswith("MALLOC_") for name in environment)
