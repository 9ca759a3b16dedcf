"""JAX is told to compute on the CPU only where libtpu is installed and nothing else speaks for another platform."""

import importlib.util

import pytest

from diffusionlm import platforms


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A laptop with libtpu: a directory in the place of /dev and /sys, without any device."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None)
    for name in ("_TPU_DEVICES", "_OTHER_ACCELERATORS"):
        monkeypatch.setattr(platforms, name, tuple(f"{tmp_path}{path}" for path in getattr(platforms, name)))
    monkeypatch.setattr(platforms, "_PCI_VENDORS", f"{tmp_path}{platforms._PCI_VENDORS}")
    return tmp_path


def make(machine, path, content=""):
    (machine / path).parent.mkdir(parents=True, exist_ok=True)
    (machine / path).write_text(content)


def test_a_laptop_with_libtpu_computes_on_its_cpu(machine):
    make(machine, "dev/vfio/vfio")  # of virtual machines
    make(machine, "sys/bus/pci/devices/0000:00:1f.0/vendor", "0x8086\n")
    environment = {"HOME": "/root"}
    assert platforms.leave_out_absent_tpus(environment)
    assert environment == {"HOME": "/root", "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    "device", ["dev/accel0", "dev/vfio/0", "dev/nvidiactl", "dev/dxg", "dev/kfd", "sys/bus/pci/devices/00:05.0/vendor"]
)
def test_any_accelerator_leaves_the_choice_to_jax(machine, device):
    make(machine, device, "0x1ae0\n")
    environment = {}
    assert not platforms.leave_out_absent_tpus(environment) and environment == {}


@pytest.mark.parametrize("name", ["JAX_PLATFORMS", "TPU_WORKER_ID", "TPU_LIBRARY_PATH", "JAX_FORCE_TPU_INIT"])
def test_what_the_user_says_stays(machine, name):
    environment = {name: "x"}
    assert not platforms.leave_out_absent_tpus(environment) and environment == {name: "x"}


def test_without_libtpu_nothing_is_set(machine, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    environment = {}
    assert not platforms.leave_out_absent_tpus(environment) and environment == {}
