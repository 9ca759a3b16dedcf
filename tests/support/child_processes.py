"""Processes that a test starts: their environment, their compiled programs, and an end for those that hang."""

import contextlib
import os
import threading

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def compiled_programs(directory):
    """Keeps compiled programs in `directory`: nearly all of these runs, in whatever process, are of the same few."""
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def at_most(seconds, processes):
    """Kills the processes once `seconds` have passed: a test that waits for them then fails instead of hanging."""
    timer = threading.Timer(seconds, lambda: [process.kill() for process in processes])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def environment(compiled=None):
    """Return the environment of a process that plays a scenario, with compiled programs in `compiled` or as here."""
    if compiled is None:
        return {**os.environ, "JAX_PLATFORMS": "cpu"}
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return {**os.environ, "JAX_PLATFORMS": "cpu", **cache}
