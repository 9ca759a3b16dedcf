"""Our training step against the same network in plain PyTorch: python experiments/benchmarks/train_step.py [--help].

The whole step on one batch: forward and backward pass, clipping, AdamW; the masks are given. All contenders start from
the same parameters, and their losses are compared before they are measured. They take turns within one process, so
that a change of the machine's load meets all of them, and ratios are taken turn by turn.
"""

import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from measure import console, environment, in_turns, run, spread
from rich.table import Table

from diffusionlm import presets
from diffusionlm.allocator import keep_freed_memory
from diffusionlm.config import Config, DataConfig, OptimConfig, RunConfig
from diffusionlm.errors import UserError
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.training import optimizer as optim
from diffusionlm.training import programs
from diffusionlm.training import step as train_step
from diffusionlm.training.state import TrainState, create_state

OURS, EAGER, COMPILED = "ours", "torch eager", "torch.compile"
CHECKED_STEPS = 3
LOSS_TOLERANCE = 1e-4  # relative


def measure(
    preset: str = "smdm_6m",
    vocab: tuple[int, ...] = (4096, 32000),
    batch: int = 16,
    length: int = 256,
    chunk: int = 256,
    remat: Literal["none", "dots", "attention", "full"] = "dots",
    repetitions: int = 5,
    steps: int = 3,
    seed: int = 0,
    output: Path | None = None,
) -> int:
    """Measure a training step against PyTorch, eager and compiled, in float32.

    "all positions" is the head as most PyTorch code has it; "masked" indexes the masked positions before the head,
    which `torch.compile` compiles for one number of them.

    Args:
      preset: the network, one of SMDM's.
      vocab: sizes of the vocabulary.
      batch: sequences.
      length: tokens of each.
      chunk: our model.head_chunk.
      remat: our model.remat; on processors reading activations back costs more than making them again.
      repetitions: turns.
      steps: training steps of each turn.
      seed: of the parameters, the tokens and the masks.
      output: a JSON file for all measurements.
    """
    for name, value in (("repetitions", repetitions), ("steps", steps)):
        if value < 1:
            raise UserError(f"{name}={value} must be positive")
    try:
        import torch
    except ImportError:
        raise UserError('this needs PyTorch: pip install -e ".[parity]"') from None
    report = {"command": sys.argv, "environment": {**environment(), "torch": torch.__version__}, "cells": []}
    report["environment"]["torch_threads"] = torch.get_num_threads()
    settings = {"max_length": length, "dtype": "float32", "head_chunk": chunk, "remat": remat}
    for size in vocab:
        cfg = Config(
            model=replace(presets.get(preset), vocab_size=size, **settings),
            optim=OptimConfig(schedule="constant", warmup_steps=0, peak_lr=1e-3, decay_mask="all"),
            data=DataConfig(sequence_length=length, batch_size=batch),
            run=RunConfig(steps=1000, seed=seed),
        )
        found = _cell(cfg, repetitions, steps)
        report["cells"].append(found)
        console().print(_table(found))
        if output:  # after each cell, so that an interrupted run leaves something
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _cell(cfg: Config, repetitions: int, steps: int) -> dict[str, Any]:
    """Return the measurements at one vocabulary size, ready for JSON."""
    B, T = cfg.data.batch_size, cfg.data.sequence_length
    tokens_BxL = np.random.default_rng(cfg.run.seed).integers(0, cfg.model.vocab_size, (B, T + 1), dtype=np.int32)
    batch = {"tokens": tokens_BxL, "segment_ids": np.ones_like(tokens_BxL)}
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        start = jax.device_get(create_state(cfg, mesh))
        targets = jax.device_get(jax.jit(functools.partial(train_step.targets, cfg))(batch, jnp.int32(0)))
    ours = _ours(cfg, mesh, start, batch)
    theirs = _theirs(cfg, start.params, targets)
    contenders = {OURS: ours, **theirs}
    losses = {name: [step() for _ in range(CHECKED_STEPS)] for name, step in contenders.items()}
    for name, found in losses.items():
        difference = np.abs(np.divide(found, losses[OURS]) - 1).max()
        assert difference < LOSS_TOLERANCE, f"{name} has losses {found}, not {losses[OURS]}"

    def timed(step: Callable[[], float]) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - began) / steps

    measured = in_turns({name: functools.partial(timed, step) for name, step in contenders.items()}, repetitions)
    parts = in_turns(_our_parts(cfg, mesh, start, targets), repetitions)
    return {
        "vocab": cfg.model.vocab_size,
        "batch": B,
        "length": T,
        "masked": float(np.mean(targets.counted_BxT)),
        "losses": losses,
        "load_average": os.getloadavg()[0],
        "parts_of_ours": parts,
        "contenders": {
            name: {"seconds": seconds, "times_ours": [a / b for a, b in zip(seconds, measured[OURS], strict=True)]}
            for name, seconds in measured.items()
        },
    }


def _ours(cfg: Config, mesh: Any, start: TrainState, batch: Any) -> Callable[[], float]:
    """One step of ours, which returns its loss; batch 0 each time, with its noise."""
    compiled = programs.make_train_step(cfg, mesh)
    state = jax.device_put(start)

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            # Batch 0 again and again: what a step is given must not depend on how often it was called.
            state, metrics = compiled(state.replace(next_index=jnp.int32(0)), batch, np.int32(0))
        return float(metrics["loss"])

    return step


def _our_parts(cfg: Config, mesh: Any, start: TrainState, targets: Any) -> Mapping[str, Callable[[], float]]:
    """Seconds of the parts of our step, each a program of its own: what they add up to is not quite the step."""
    from diffusionlm.diffusion.cross_entropy import weighted_cross_entropy
    from diffusionlm.diffusion.objectives import predicted_share
    from diffusionlm.model.spec import suppression_mask
    from diffusionlm.model.transformer import Transformer

    model, params = Transformer(cfg.model), jax.device_put(start.params)
    inputs, suppressed = jnp.asarray(targets.inputs_BxT), jnp.asarray(suppression_mask(cfg.model, cfg.suppressed_ids))

    def trunk(params: Any) -> jax.Array:
        return model.apply({"params": params}, inputs)

    def head(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        weights = targets.labels_BxT, targets.weight_BxT, targets.counted_BxT > 0
        share = predicted_share(cfg)
        return weighted_cross_entropy(hidden, matrix, *weights, suppressed, cfg.model.head_chunk, share)[0]

    def plain_head(hidden: jax.Array, matrix: jax.Array) -> jax.Array:
        logits_NxV = jnp.where(suppressed[None], -jnp.inf, hidden.reshape(-1, hidden.shape[-1]) @ matrix)
        label_N = jnp.take_along_axis(logits_NxV, targets.labels_BxT.reshape(-1, 1), axis=-1)[:, 0]
        nll_N = jax.nn.logsumexp(logits_NxV, axis=-1) - label_N
        return (nll_N * targets.weight_BxT.reshape(-1)).sum()

    def update(params: Any, opt_state: Any) -> Any:
        return optim.build(cfg.optim, optim.learning_rate(cfg.optim, cfg.run.steps)).update(params, opt_state, params)

    hidden = jax.jit(trunk)(params)
    programs = {
        "trunk, forward": (jax.jit(trunk), (params,)),
        "trunk, forward and backward": (jax.jit(jax.grad(lambda p: (trunk(p) * hidden).sum())), (params,)),
        "head and loss, with gradients": (jax.jit(jax.grad(head, argnums=(0, 1))), (hidden, params["head"])),
        "head and loss over all positions, all logits at once": (
            jax.jit(jax.grad(plain_head, argnums=(0, 1))),
            (hidden, params["head"]),
        ),
        "clipping and AdamW": (jax.jit(update), (params, jax.device_put(start.opt_state))),
    }

    def seconds(program: Callable, arguments: tuple) -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        return time.perf_counter() - began

    return {name: functools.partial(seconds, *one) for name, one in programs.items()}


def _theirs(cfg: Config, params: Any, targets: Any) -> dict[str, Callable[[], float]]:
    """One step of each PyTorch contender, which returns its loss."""
    import torch
    import torch_network
    from torch.nn import functional as F

    inputs, labels = (torch.from_numpy(np.array(x)).long() for x in (targets.inputs_BxT, targets.labels_BxT))
    weight = torch.from_numpy(np.array(targets.weight_BxT))

    def all_positions(model: Any) -> Any:
        logits_BxTxV = model(inputs)
        nll = F.cross_entropy(logits_BxTxV.flatten(0, 1), labels.flatten(), reduction="none")
        return (nll * weight.flatten()).sum()

    def masked(model: Any) -> Any:
        places_N = (weight.flatten() > 0).nonzero()[:, 0]
        logits_NxV = model.head(model.hidden(inputs).flatten(0, 1)[places_N])
        nll = F.cross_entropy(logits_NxV, labels.flatten()[places_N], reduction="none")
        return (nll * weight.flatten()[places_N]).sum()

    def stepper(loss_of: Callable) -> Callable[[], float]:
        model = torch_network.from_params(params, cfg.model)
        o = cfg.optim
        adamw = torch.optim.AdamW(
            model.parameters(), lr=o.peak_lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay
        )

        def step() -> float:
            adamw.zero_grad(set_to_none=True)
            loss = loss_of(model)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
            adamw.step()
            return loss.item()

        return step

    torch.compiler.reset()  # programs of earlier shapes count towards its limit of recompilations
    return {
        f"{EAGER}, all positions": stepper(all_positions),
        f"{COMPILED}, all positions": stepper(torch.compile(all_positions, dynamic=False)),
        f"{EAGER}, masked": stepper(masked),
        f"{COMPILED}, masked": stepper(torch.compile(masked, dynamic=False)),
    }


def _table(found: Mapping[str, Any]) -> Table:
    contenders = found["contenders"]
    table = Table(title=f"vocabulary {found['vocab']}, {found['batch']} x {found['length']} tokens")
    table.add_column("step")
    for name in ("ms", "tokens/s", "times ours", "(fastest)"):
        table.add_column(name, justify="right")
    least = min(contenders[OURS]["seconds"])
    for name, one in contenders.items():
        table.add_row(
            name,
            spread([1e3 * x for x in one["seconds"]], "{:.0f}"),
            f"{found['batch'] * found['length'] / statistics.median(one['seconds']):.0f}",
            spread(one["times_ours"], "{:.2f}"),
            f"{min(one['seconds']) / least:.2f}",
        )
    table.add_section()
    for name, seconds in found["parts_of_ours"].items():
        table.add_row(f"our {name}", spread([1e3 * x for x in seconds], "{:.0f}"))
    table.caption = (
        f"median (least to most of {len(contenders[OURS]['seconds'])} turns), and the ratio of the fastest turns; "
        f"load average {found['load_average']:.1f} on {os.cpu_count()} cores; {found['masked']:.3f} of tokens masked"
    )
    return table


if __name__ == "__main__":
    keep_freed_memory()  # as the command does; the other contenders run under it too
    sys.exit(run(measure, sys.argv[1:], "train_step.py"))
