"""Shared set-up: eight CPU devices, so that meshes are real, strict numerics, and a cache of compiled programs."""

import functools
import gc
import inspect
import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of XLA's pool: with only as many as there are devices, two collectives of one program can wait for each other.
os.environ.setdefault("NPROC", "32")
# Most of the time of these tests goes into compiling programs that run once: without optimisation and, where XLA still
# has them, with its older code generators, which need half the time. The newer ones are faster on one thread, because
# pytest runs a process on each core.
_older = version("jaxlib").startswith("0.10.")
_flag = " --xla_cpu_use_fusion_emitters=false" if _older else " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0" + _flag)
# What one test module or one run has compiled, the next one loads; subprocesses share it through the environment.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

from diffusionlm.training import programs

# A parser of commands reads the comments of configurations in their source, and the tests make hundreds of parsers.
inspect.getsource = functools.cache(inspect.getsource)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# The programs of the last few runs are kept. Here modules take turns with the same runs, so all are.
programs.train_program = functools.cache(programs.train_program.__wrapped__)
programs.eval_program = functools.cache(programs.eval_program.__wrapped__)


def pytest_collection_finish():
    """Leave modules and tests, which stay to the end, out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Free compiled programs when their memory maps become too many: Linux allows a process 65,530."""
    yield
    if memory_maps() > 40_000:
        jax.clear_caches()
        for program in (programs.train_program, programs.eval_program):
            program.cache_clear()


def memory_maps():
    """Return the number of memory maps of this process, or 0 where the system does not tell it."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture
def data_dir():
    """Return the folder of real corpora, for tests that want them."""
    path = os.environ.get("DIFFUSIONLM_DATA")
    if not path:
        pytest.skip("needs the real corpora: set DIFFUSIONLM_DATA to their folder")
    return path
