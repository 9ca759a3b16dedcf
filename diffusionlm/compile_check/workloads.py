"""The programs that the compile check compiles: a training step, and the sampling loop."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from diffusionlm import flops
from diffusionlm.compile_check import executed_flops
from diffusionlm.config import Config
from diffusionlm.diffusion.cross_entropy import LOOP, head_turns
from diffusionlm.diffusion.objectives import predicted_share
from diffusionlm.errors import UserError
from diffusionlm.model.attention_kernels import SPLASH_LENGTHS
from diffusionlm.model.spec import ModelSpec
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import batch_sharding, check_batch, row_ways, tree_shardings
from diffusionlm.sampling import generate
from diffusionlm.sampling.canvas import CANVAS_MULTIPLE, padded_rows
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.training import parts
from diffusionlm.training.parts import Part
from diffusionlm.training.programs import make_train_step
from diffusionlm.training.state import abstract_state
from diffusionlm.tree_types import PyTree


@dataclass(frozen=True)
class Workload:
    """A program to compile, and the FLOPs that our formulas expect of it, on all devices together.

    Attributes:
      kind: "train" or "sample".
      part: the part of the run that the program trains; empty where the run has one program.
      lower: lowers the program, inside the mesh.
      params: the abstract parameters.
      optimizer: the abstract state of the optimizer, None without one.
      model_flops: the FLOPs that MFU credits.
      executed_flops: the FLOPs that run; None where they are not counted.
      kernel_flops: the part of them inside hand-written kernels, which HLO does not show.
      trip_counts: trip counts of loops whose length depends on data, by their `jax.named_scope`.
    """

    kind: Literal["train", "sample"]
    lower: Callable[[], jax.stages.Lowered]
    params: PyTree
    optimizer: PyTree
    model_flops: int
    executed_flops: int | None
    kernel_flops: int = 0
    trip_counts: Mapping[str, int] = field(default_factory=dict)
    part: Part | Literal[""] = ""

    @property
    def name(self) -> str:
        """Return the name of the program in a report."""
        return f"{self.kind}, {self.part} part" if self.part else self.kind


def training_step(run: Config, mesh: Mesh, part: Part | None = None) -> Workload:
    """Return the step that `train` runs, with arguments laid out as the trainer lays them out.

    Args:
      run: the run.
      mesh: the mesh of its devices.
      part: the part of the run whose program is meant; None: its first.

    Raises:
      UserError: the mesh cannot split the batch.
    """
    names = list(parts.parts(run))
    part = part or names[0]
    cfg = parts.config_of(run, part)
    size, length = cfg.data.batch_size, cfg.data.sequence_length
    check_batch(mesh, size, cfg.run.microbatches)
    state = abstract_state(cfg, mesh)
    tokens = jax.ShapeDtypeStruct((size, length + 1), jnp.int32, sharding=batch_sharding(mesh, size))
    batch = {"tokens": tokens, "segment_ids": tokens}
    if cfg.data.sources:
        batch["source"] = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=batch_sharding(mesh, size, ndim=1))
    index = jax.ShapeDtypeStruct((), jnp.int32)
    rows = size // (mesh.shape["data"] * mesh.shape["fsdp"] * cfg.run.microbatches)
    share = predicted_share(cfg)
    # While attention opens, its mask is data, which no kernel takes.
    splash = length % SPLASH_LENGTHS == 0 and part != "opening"
    return Workload(
        kind="train",
        part=part if len(names) > 1 else "",
        lower=lambda: make_train_step(run, mesh).lower(part, state, batch, index),  # pyright: ignore[reportArgumentType]: abstract
        params=state.params,
        optimizer=state.opt_state,
        model_flops=size * flops.train(cfg.model, length, "model", predicted=share),
        executed_flops=size * executed_flops.train(cfg.model, length, rows, share, splash),
        kernel_flops=size * executed_flops.splash_kernels(cfg.model, length) if splash else 0,
        trip_counts={LOOP: head_turns(rows, length, cfg.model.head_chunk, share)},
    )


def sampling_loop(cfg: Config, mesh: Mesh, sampling: SamplingConfig, count: int) -> Workload:
    """Return the loop that generates `count` texts, with parameters as a loaded model has them.

    Prompts have one token, because models without BOS need one.

    Raises:
      UserError: `count` is not positive.
    """
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
    executed_passes = passes // count * padded_rows(count, row_ways(mesh.shape))
    splash = length % SPLASH_LENGTHS == 0
    return Workload(
        kind="sample",
        lower=lambda: generate.lower(params, spec, prompts, sampling),
        params=params,
        optimizer=None,
        model_flops=passes * (sum(forward.values()) - forward["head"]),
        executed_flops=None,
        kernel_flops=executed_passes * executed_flops.splash_forward(cfg.model, length) if splash else 0,
    )
