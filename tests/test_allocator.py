"""The allocator of a process that computes on CPUs: freed memory is kept, where that is wanted, and nowhere else."""

import os
import platform
import subprocess
import sys

import pytest

from diffusionlm import allocator

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is about glibc's malloc")

# Page faults of ten buffers of 40 MB, each freed before the next, on a thread of its own as those of XLA's pool are.
FAULTS = """
import resource, sys, threading
import numpy as np
import diffusionlm
{setup}
def work():
    global faults
    np.ones(5 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(5 << 20)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(faults)
"""


def faults(setup, **variables):
    environment = {name: value for name, value in os.environ.items() if not allocator._is_tuned({name: value})}
    # Without huge pages, which NumPy asks for and which would take a fault for 2 MB instead of 4 kB.
    environment |= {"JAX_PLATFORMS": "cpu", "NUMPY_MADVISE_HUGEPAGE": "0", **variables}
    command = [sys.executable, "-c", FAULTS.format(setup=setup)]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@glibc
def test_freed_memory_is_used_again_without_page_faults():
    call = "from diffusionlm.allocator import keep_freed_memory; assert keep_freed_memory()"
    assert faults(call) < 500


@glibc
def test_importing_the_library_changes_nothing():
    assert faults("") > 50_000


@glibc
def test_an_allocator_that_the_user_has_set_up_stays(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "")
            assert not allocator.keep_freed_memory()


def test_an_accelerator_is_no_cpu(monkeypatch):
    assert allocator._computes_on_cpu({"JAX_PLATFORMS": "cpu"})
    assert not allocator._computes_on_cpu({"JAX_PLATFORMS": "tpu,cpu"})
    for exists in (True, False):
        monkeypatch.setattr(os.path, "exists", lambda path, exists=exists: exists)
        assert allocator._computes_on_cpu({}) is not exists
        monkeypatch.setenv("JAX_PLATFORMS", "cuda")
        assert not allocator.keep_freed_memory()


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert not allocator.keep_freed_memory()
