"""The compile check: a run compiled ahead of time for a TPU slice, on a machine without a TPU.

`compile` takes the very programs that `train` and `sample` run, with abstract arguments laid out as theirs are, and
reads off what the compiler says (memory, collectives) and what follows from it (a roofline of the time of a step).
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import Mesh
from rich.console import Console

from diffusionlm import flops
from diffusionlm import hardware as topology_lib
from diffusionlm.compile_check import advice, hlo, roofline
from diffusionlm.compile_check.roofline import Terms, Traffic
from diffusionlm.config import Config
from diffusionlm.diffusion.cross_entropy import LOOP
from diffusionlm.diffusion.objectives import predicted_share
from diffusionlm.errors import UserError
from diffusionlm.hardware import Topology
from diffusionlm.model.spec import ModelSpec
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import batch_sharding, check_batch, make_mesh, tree_shardings
from diffusionlm.registry import experiments
from diffusionlm.sampling import generate
from diffusionlm.sampling.canvas import CANVAS_MULTIPLE
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.training.programs import make_train_step
from diffusionlm.training.state import abstract_state

# libtpu compiles for any TPU anywhere; off a TPU these only keep it from asking the cloud what machine it is on, and
# let several processes compile at once.
_OFF_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Hbm:
    """Bytes on each chip."""

    limit: int  # that a program may use
    params: int
    optimizer: int
    temporary: int  # activations, gradients, gathered weights
    peak: int  # everything at once, the batch and the program included

    @property
    def headroom(self) -> int:
        return self.limit - self.peak


@dataclass(frozen=True)
class CompileReport:
    """What a run needs on a topology; None stands for what only a program that fits can tell.

    Attributes:
      experiment: its name.
      program: "train", one optimizer step; or "sample", one denoising step over the whole canvas.
      topology: as the cloud names a slice.
      slices: how many of them.
      chips: of all slices.
      mesh: devices along each axis.
      fits: whether the program and its arguments fit into the memory of the chips.
      hbm_per_chip_bytes: what they take.
      model_flops: of one step on all chips, as MFU credits them.
      executed_flops: the same with what is computed twice.
      hlo_flops: matmul FLOPs found in the compiled program, on all chips, without those of hand-written kernels.
      collectives: the traffic of one step.
      roofline_seconds: the parts of the estimate.
      estimated_step_seconds: their sum, a lower bound.
      estimated_mfu: an upper bound.
      compile_seconds: of the compiler.
      fixes: if it does not fit, what should help, with the bytes per chip that a ledger predicts.
      warnings: what the numbers leave out, or what looks wasteful.
      versions: of the compiler.
    """

    experiment: str
    program: str
    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    fits: bool
    hbm_per_chip_bytes: Hbm
    model_flops: int
    executed_flops: int | None
    hlo_flops: int | None
    collectives: tuple[Traffic, ...] | None
    roofline_seconds: Terms | None
    estimated_step_seconds: float | None
    estimated_mfu: float | None
    compile_seconds: float
    fixes: tuple[advice.Fix, ...]
    warnings: tuple[str, ...]
    versions: dict[str, str]


def compile(
    cfg: Config | str,
    topology: str,
    *,
    slices: int = 1,
    sampling: SamplingConfig | None = None,
    count: int = 8,
) -> CompileReport:
    """Compiles a training step of `cfg`, or with `sampling` its sampler, for a TPU slice; no TPU is needed.

    Args:
      cfg: a configuration, or the name of an experiment; its mesh says how the model is split.
      topology: a slice by the name that the cloud gives it, such as "v5p-128" or "v5e-256".
      slices: how many of them, joined by the data-centre network; mesh.data must be a multiple.
      sampling: compile generation with these settings instead, from an empty prompt.
      count: with `sampling`, how many texts at a time.

    Raises:
      UserError: an inconsistent configuration, an unknown topology, a mesh or batch that does not fit it, or no libtpu.
    """
    cfg = (experiments.get(cfg) if isinstance(cfg, str) else cfg).validate()
    where = topology_lib.parse(topology, slices)
    mesh = make_mesh(cfg.mesh, tpu_devices(where))
    program = _sampler(cfg, mesh, sampling, count) if sampling else _training(cfg, mesh)
    place = f"{slices} x {where.name}" if slices > 1 else where.name
    what = f"compiling {program.kind} of {cfg.name} for {place} ({where.chips} chips); large models take minutes"
    with _saying(what):
        started = time.perf_counter()
        with jax.set_mesh(mesh):
            lowered = program.lower()
        compiled, needed = None, 0
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = _exhausted(str(error))
            if not needed:
                raise
        seconds = time.perf_counter() - started
    return _report(cfg, where, mesh, program, compiled, seconds, needed)


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a topology, to compile for and not to run on.

    Raises:
      UserError: libtpu is missing.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for TPUs needs libtpu, which has packages for Linux on x86 only: in a checkout of diffusionlm, "
            "pip install -e '.[tpu]'"
        )
    if not (Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()):
        for name, value in _OFF_TPU.items():
            os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip, as on a real v4
    if topology.chips == topology.slices:  # hosts with a single chip
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology.physical, **options)
    return list(described.devices)


# --- what is compiled


@dataclass(frozen=True)
class _Program:
    kind: str
    lower: Any  # () -> jax.stages.Lowered, under the mesh
    params: Any  # abstract
    optimizer: Any  # abstract
    model_flops: int
    executed_flops: int | None  # None: not counted
    kernel_flops: int = 0  # of these, inside of kernels
    turns: dict[str, int] = field(default_factory=dict)  # of loops whose length the data decide, by their scope


def _training(cfg: Config, mesh: Mesh) -> _Program:
    size, length = cfg.data.batch_size, cfg.data.sequence_length
    check_batch(mesh, size, cfg.run.microbatches)
    state = abstract_state(cfg, mesh)
    tokens = jax.ShapeDtypeStruct((size, length + 1), jnp.int32, sharding=batch_sharding(mesh, size))
    batch = {"tokens": tokens, "segment_ids": tokens}
    index = jax.ShapeDtypeStruct((), jnp.int32)
    rows = size // (mesh.shape["data"] * mesh.shape["fsdp"] * cfg.run.microbatches)
    # The program of the batches with annealed attention, if there are any: no kernel takes such a mask.
    share, splash = predicted_share(cfg), length % flops.SPLASH_LENGTHS == 0 and not cfg.diffusion.anneal_steps
    return _Program(
        kind="train",
        lower=lambda: make_train_step(cfg, mesh).lower(state, batch, index),
        params=state.params,
        optimizer=state.opt_state,
        model_flops=size * flops.train(cfg.model, length, "model", predicted=share),
        executed_flops=size * flops.train(cfg.model, length, "executed", rows, share, splash),
        kernel_flops=size * flops.splash_kernels(cfg.model, length) if splash else 0,
        turns={LOOP: flops.head_turns(rows, length, cfg.model.head_chunk, share)},
    )


def _sampler(cfg: Config, mesh: Mesh, sampling: SamplingConfig, count: int) -> _Program:
    """Parameters as `sampling.load` lays them out; prompts of one token, as models without one need it."""
    if count < 1:
        raise UserError(f"count={count} must be at least 1")
    spec, prompts = ModelSpec.of(cfg), [[0]] * count
    boxed = jax.eval_shape(Transformer(cfg.model).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(cfg.model.dtype), sharding=sharding),
        nn.unbox(boxed["params"]),
        tree_shardings(boxed["params"], mesh),
    )
    length = math.ceil((sampling.length + 1) / CANVAS_MULTIPLE) * CANVAS_MULTIPLE
    forward, passes = flops.forward(cfg.model, length), count * (2 if sampling.guidance else 1)
    attention = forward["attention_scores"] + forward["attention_values"]
    return _Program(
        kind="sample",
        lower=lambda: generate.lower(params, spec, prompts, sampling),
        params=params,
        optimizer=None,
        model_flops=passes * (sum(forward.values()) - forward["head"]),
        executed_flops=None,
        kernel_flops=passes * attention if length % flops.SPLASH_LENGTHS == 0 else 0,
    )


# --- what comes out


def _report(
    cfg: Config, where: Topology, mesh: Mesh, program: _Program, compiled: Any, seconds: float, needed: int
) -> CompileReport:
    known = {
        "experiment": cfg.name,
        "program": program.kind,
        "topology": where.name,
        "slices": where.slices,
        "chips": where.chips,
        "mesh": dict(mesh.shape),
        "model_flops": program.model_flops,
        "executed_flops": program.executed_flops,
        "compile_seconds": round(seconds, 1),
        "versions": {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")},
    }
    hbm = _hbm(where, program, compiled, needed)
    fits = compiled is not None and hbm.headroom >= 0
    train = program.kind == "train"
    fixes = tuple(advice.fixes(cfg, where, hbm.peak)) if train and not fits else ()
    if compiled is None:
        nothing = dict.fromkeys(
            ("hlo_flops", "collectives", "roofline_seconds", "estimated_step_seconds", "estimated_mfu")
        )
        return CompileReport(**known, **nothing, fits=False, hbm_per_chip_bytes=hbm, fixes=fixes, warnings=())

    found = hlo.analyse(compiled.as_text(), program.turns)
    counted = sum(kernel.runs * kernel.flops for kernel in found.kernels) * where.devices
    kernels = any(kernel.custom for kernel in found.kernels)
    executed = max(counted + program.kernel_flops, program.executed_flops or 0)
    collectives = roofline.traffic(found, roofline.Network(where, list(mesh.devices.flat)))
    terms = roofline.terms(found, collectives, where, executed / where.devices)
    return CompileReport(
        **known,
        fits=fits,
        hbm_per_chip_bytes=hbm,
        hlo_flops=counted,
        collectives=tuple(collectives),
        roofline_seconds=terms,
        estimated_step_seconds=terms.total,
        estimated_mfu=program.model_flops / (terms.total * where.chips * where.chip.peak_flops),
        fixes=fixes,
        warnings=tuple(_warnings(program, found, counted, kernels)),
    )


def _hbm(where: Topology, program: _Program, compiled: Any, needed: int) -> Hbm:
    """Per chip. Of a program that does not fit the compiler tells its temporaries only."""
    devices = where.chip.devices
    params, optimizer = (_bytes_per_device(tree) * devices for tree in (program.params, program.optimizer))
    if compiled is None:
        return Hbm(where.chip.hbm_bytes, params, optimizer, needed * devices, params + optimizer + needed * devices)
    stats = compiled.memory_analysis()
    arguments = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = arguments + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    return Hbm(where.chip.hbm_bytes, params, optimizer, stats.temp_size_in_bytes * devices, peak * devices)


def _bytes_per_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _exhausted(message: str) -> int:
    """The bytes of HBM that a program asked for, if that was why it did not compile; else 0."""
    found = re.search(r"temporaries \(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?) of", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return 0
    size, unit = [part for part in found.groups() if part is not None]
    return int(float(size) * _UNITS[unit])


def _warnings(program: _Program, found: hlo.Program, counted: int, kernels: bool) -> Iterator[str]:
    if program.executed_flops and counted + program.kernel_flops > 1.02 * program.executed_flops:
        extra = (counted + program.kernel_flops) / program.executed_flops - 1
        yield f"devices repeat each other's work: {extra:.0%} more matmul FLOPs than the model needs"
    if kernels:
        yield "kernels in custom calls hide their FLOPs from the compiled program; the model's ledger has them"
    if found.endless:
        yield (
            f"{found.endless} loops run as long as the data say and count once here: the figures are of one denoising "
            "step, with logits of one group of positions"
        )


@contextlib.contextmanager
def _saying(what: str) -> Iterator[None]:
    """Shows on stderr what goes on: a spinner in a terminal, a line elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        console.print(what, soft_wrap=True, highlight=False, markup=False)
        yield
