"""The compile check: a run compiled ahead of time for a TPU slice, on a machine without a TPU.

`compile` takes the very programs that `train` and `sample` run, with abstract arguments laid out as theirs, and reports
what the compiler says (memory, collectives) and what follows from it (a roofline of the time of a step).
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from rich.text import Text

from diffusionlm import hardware
from diffusionlm.compile_check.report import Compilation, CompileReport, make_report
from diffusionlm.compile_check.workloads import Workload, sampling_loop, training_step
from diffusionlm.config import Config
from diffusionlm.console import Console
from diffusionlm.errors import UserError
from diffusionlm.hardware import Topology
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.registry import experiments
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.scalars import whole
from diffusionlm.training import parts
from diffusionlm.training.parts import Part

# libtpu compiles for any TPU on any machine. Without a TPU, these stop it from querying the cloud about the machine,
# and let several processes compile at once.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compile(
    cfg: Config | str,
    topology: str,
    *,
    slices: int = 1,
    sampling: SamplingConfig | None = None,
    count: int = 8,
    part: Part | None = None,
) -> CompileReport:
    """Compile a training step of `cfg`, or with `sampling` its sampler, for a TPU slice; no TPU is needed.

    Args:
      cfg: a configuration, or the name of an experiment; its mesh says how the model is split.
      topology: a slice by its name in the cloud, such as "v5p-128" or "v5e-256".
      slices: the number of slices, joined by the data-centre network; mesh.data must be a multiple of it.
      sampling: compile generation with these settings instead, from an empty prompt.
      count: with `sampling`, the number of texts at a time.
      part: the part of a run that has several programs (`diffusion.arm_steps`, `diffusion.anneal_steps`); None: its
        first.

    Raises:
      UserError: the configuration is inconsistent, the topology unknown, the mesh or the batch does not fit it, or
        libtpu is missing.
    """
    cfg = (experiments.get(cfg) if isinstance(cfg, str) else cfg).validate()
    if part not in (None, *parts.parts(cfg)):
        raise UserError(f"part={part!r} must be one of those of {cfg.name}: {', '.join(parts.parts(cfg))}")
    slices, count = whole("slices", slices, 1), whole("count", count, 1)
    where = hardware.parse(topology, slices)
    mesh = make_mesh(cfg.mesh, tpu_devices(where))
    workload = sampling_loop(cfg, mesh, sampling, count) if sampling else training_step(cfg, mesh, part)
    place = f"{slices} x {where.name}" if slices > 1 else where.name
    with _progress(
        f"compiling {workload.name} of {cfg.name} for {place} ({where.chips} chips); large models take minutes"
    ):
        started = time.perf_counter()
        executable, requested = _compile(workload, mesh)
        seconds = time.perf_counter() - started
    return make_report(Compilation(cfg, where, mesh, workload, executable, requested, seconds))


def tpu_devices(topology: Topology) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]: a class at run time
    """Return the devices of a topology, to compile for and not to run on.

    Raises:
      UserError: libtpu is missing.
    """
    hardware.require_libtpu()
    if not (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()):
        for name, value in _WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on a real v4
    if topology.chips == topology.slices:  # hosts with a single chip
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology.physical, **options)
    return list(description.devices)


def _compile(workload: Workload, mesh: Mesh) -> tuple[jax.stages.Compiled | None, int]:
    """Return the executable; or None, and the bytes that each device lacks room for."""
    with jax.set_mesh(mesh):
        lowered = workload.lower()
    try:
        with _without_compilation_cache():
            return lowered.compile(), 0
    except jax.errors.JaxRuntimeError as error:
        requested = _requested_bytes(str(error))
        if not requested:
            raise
        return None, requested


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    """Turn the persistent cache off: it cannot load programs for devices that are not here, and warns about them."""
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]: added at run time
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX looks at the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _requested_bytes(message: str) -> int:
    """Return the bytes of HBM that a program asked for, if that is why it did not compile; else 0."""
    match = re.search(r"temporaries \(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?) of", message)
    if "RESOURCE_EXHAUSTED" not in message or not match:
        return 0
    size, unit = [part for part in match.groups() if part is not None]
    return int(float(size) * _UNITS[unit])


@contextlib.contextmanager
def _progress(message: str) -> Iterator[None]:
    """Show a message on stderr while the body runs: with a spinner in a terminal, as a line elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(Text(message)):
            yield
    else:
        console.print(message, soft_wrap=True, highlight=False)
        yield
