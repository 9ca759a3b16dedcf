"""The platform that JAX computes on, chosen before JAX looks: libtpu without a TPU prints pages of noise.

The extra `tpu` installs libtpu on a laptop, where `compile` needs it. JAX would then ask it for TPUs at the start of
every command.
"""

import glob
import importlib.util
import os
from collections.abc import MutableMapping

_TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_PCI_VENDORS, _GOOGLE = "/sys/bus/pci/devices/*/vendor", "0x1ae0"
_OTHER_ACCELERATORS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
# Where one of these is set, somebody has said something about TPUs or platforms, and JAX decides.
_SAYINGS = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_FORCE_TPU_INIT", "PJRT_DEVICE")


def leave_out_absent_tpus(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Let JAX compute on the CPU where libtpu is installed and no accelerator is attached; return True if this is so.

    Call it at the start of a process, before JAX is imported, and never from a library. When in doubt it does nothing:
    any sign of a TPU or of another accelerator, or a setting of the user, leaves the choice to JAX.
    """
    if any(name in _SAYINGS or name.startswith("TPU_") for name in environment):
        return False
    if importlib.util.find_spec("libtpu") is None or _has_accelerator():
        return False
    environment["JAX_PLATFORMS"] = "cpu"
    return True


def _has_accelerator() -> bool:
    if any(glob.glob(pattern) for pattern in (*_TPU_DEVICES, *_OTHER_ACCELERATORS)):
        return True
    return any(_first_word(path) == _GOOGLE for path in glob.glob(_PCI_VENDORS))


def _first_word(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(16).strip()
    except OSError:
        return ""
