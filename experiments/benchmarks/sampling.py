"""Measurements of the samplers: python experiments/benchmarks/sampling.py COMMAND [--help].

Contenders are measured in turns within one process, so that a change of the machine's load meets all of them, and
ratios are taken turn by turn. A new command is one function and one entry in `COMMANDS`.
"""

import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from decoding import frontier, twins
from flax import linen as nn
from measure import console, environment, in_turns, spread
from rich.table import Table

from diffusionlm import presets
from diffusionlm.allocator import keep_freed_memory
from diffusionlm.config import Config, ModelConfig
from diffusionlm.errors import UserError
from diffusionlm.model.spec import ModelSpec
from diffusionlm.model.transformer import Transformer
from diffusionlm.options import parse
from diffusionlm.sampling.canvas import build_canvas
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate
from diffusionlm.tree_types import Params

OURS, EAGER, COMPILED = "ours", "torch eager", "torch.compile(network)"
LOGITS_TOLERANCE = 1e-4
HEAD_SCALE = 8  # sharpens a random head, so that the likeliest tokens and positions are clearly apart
NETWORK_CALLS = 16  # evaluations of the network alone per measurement


@dataclass(frozen=True)
class Cell:
    """One setting of `port`."""

    vocab: int
    batch: int
    steps: int

    def __str__(self) -> str:
        return f"vocabulary {self.vocab}, batch {self.batch}, {self.steps} steps"


# --- a compiled loop against PyTorch


def port(
    preset: str = "smdm_6m",
    vocab: tuple[int, ...] = (2048, 32000),
    batch: tuple[int, ...] = (1, 8),
    steps: tuple[int, ...] = (128, 64),
    prompt_length: int = 32,
    length: int = 128,
    block_length: int = 32,
    max_length: int | None = None,
    repetitions: int = 5,
    seed: int = 0,
    output: Path | None = None,
) -> int:
    """Measure `generate` against LLaDA's loop in PyTorch, eager and compiled, on the same random network in float32.

    Checks first that the logits agree, and reports the share of equal tokens. Everything is compiled and run once
    before it is measured. The rest of a step is its time less that of the network up to the final hidden states: the
    head, the choice of tokens and positions, and the loop.

    Args:
      preset: the network, one of SMDM's.
      vocab: sizes of the vocabulary.
      batch: numbers of prompts.
      steps: denoising steps over all blocks, multiples of the number of blocks.
      prompt_length: tokens of each prompt.
      length: new tokens of each prompt.
      block_length: new tokens of each block, a divisor of the length.
      max_length: of our network; above prompt and length our canvas is padded. None: both together.
      repetitions: measurements of each contender.
      seed: of the parameters and the prompts.
      output: a JSON file for all measurements.
    """
    torch = _checked_torch(length, block_length, steps, repetitions)
    terminal = console()
    report = {"command": sys.argv, "environment": {**environment(), "torch": torch.__version__}, "cells": []}
    report["environment"]["torch_threads"] = torch.get_num_threads()
    for size in vocab:
        cfg = replace(
            presets.get(preset), vocab_size=size, max_length=max_length or prompt_length + length, dtype="float32"
        )
        params = _random_params(cfg, seed)
        for rows, count in itertools.product(batch, steps):
            cell = Cell(size, rows, count)
            prompts = np.random.default_rng(seed).integers(0, size, (rows, prompt_length))
            sampling = SamplingConfig(
                length, count, "low_confidence", 0.0, block_length=block_length, stop_at_eos=False
            )
            comparison = Comparison(params, ModelSpec.of(Config(model=cfg)), prompts, sampling)
            result = _port_cell(cell, comparison, repetitions)
            report["cells"].append(result)
            terminal.print(_port_table(cell, result, rows * length))
            if output:  # after each cell, so that an interrupted run leaves something
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _checked_torch(length: int, block_length: int, steps: tuple[int, ...], repetitions: int) -> Any:
    """Return the module torch, once the options of `port` are known to have a meaning."""
    if repetitions < 1:
        raise UserError(f"repetitions={repetitions} must be positive")
    if length % block_length or any(count % (length // block_length) for count in steps):
        raise UserError(f"length={length} and steps={steps} must be divisible: LLaDA's blocks are all alike")
    try:
        import torch
    except ImportError:
        raise UserError('this needs PyTorch: pip install -e ".[parity]"') from None
    return torch


class Comparison(NamedTuple):
    """The network, the prompts and the settings that the samplers of one cell share."""

    params: Params
    spec: ModelSpec
    prompts: np.ndarray
    sampling: SamplingConfig


def _port_cell(cell: Cell, comparison: Comparison, repetitions: int) -> dict[str, Any]:
    """Measure one cell; the result is ready for JSON."""
    import torch
    import torch_network

    _, spec, prompts, sampling = comparison
    model = torch_network.from_params(comparison.params, spec.model)
    our_network, our_logits = _our_network(comparison)
    canvas_BxT = torch.from_numpy(np.pad(prompts, ((0, 0), (0, sampling.length)), constant_values=spec.mask_id))
    with torch.inference_mode():
        torch_logits_BxTxV = model(canvas_BxT).numpy()
    difference = float(np.abs(our_logits() - torch_logits_BxTxV).max())
    assert difference < LOGITS_TOLERANCE, f"logits differ by {difference}"

    def torch_seconds(hidden: Callable) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            for _ in range(NETWORK_CALLS):
                hidden(canvas_BxT)
        return (time.perf_counter() - began) / NETWORK_CALLS

    tokens: dict[str, np.ndarray] = {}
    samplers = _samplers(model, comparison, tokens)
    contenders = {
        **samplers,
        (OURS, "network"): our_network,
        (EAGER, "network"): functools.partial(torch_seconds, model.hidden),
        (COMPILED, "network"): functools.partial(torch_seconds, torch.compile(model.hidden, dynamic=False)),
    }
    measured = in_turns(contenders, repetitions)
    for name in samplers:
        measured[name, "network"] = measured[name if (name, "network") in measured else COMPILED, "network"]
    return {
        **cell.__dict__,
        "largest_logit_difference": difference,
        # Other work on the machine slows the contenders unequally: PyTorch's threads wait for each other.
        "load_average": os.getloadavg()[0],
        "distinct_tokens": len(np.unique(tokens[OURS])),
        "samplers": {
            name: {
                "equal_tokens": float((tokens[name] == tokens[OURS]).mean()),
                "seconds": measured[name],
                "network_seconds_per_step": measured[name, "network"],
                "rest_seconds_per_step": [
                    a / sampling.steps - b for a, b in zip(measured[name], measured[name, "network"], strict=True)
                ],
                "times_ours": [a / b for a, b in zip(measured[name], measured[OURS], strict=True)],
            }
            for name in samplers
        },
    }


def _samplers(model: Any, comparison: Comparison, tokens: dict[str, np.ndarray]) -> dict[str, Callable[[], float]]:
    """Return the samplers by name; each returns its seconds and leaves what it generated in `tokens`."""
    import torch
    import torch_sampler

    params, spec, prompts, sampling = comparison
    torch.compiler.reset()  # programs of earlier shapes count towards its limit of recompilations
    # The mask, block and counts are tensors, so that a step compiles once for each number of reveals.
    steps = {
        EAGER: functools.partial(torch_sampler.one_step, model, spec.mask_id),
        COMPILED: functools.partial(torch_sampler.one_step, torch.compile(model, dynamic=False), spec.mask_id),
        "torch.compile(step)": functools.partial(
            torch.compile(torch_sampler.one_step, dynamic=False, fullgraph=True), model, spec.mask_id
        ),
    }

    def run_ours() -> float:
        result = generate(params, spec, prompts.tolist(), sampling)
        tokens[OURS] = result.tokens
        return result.seconds

    def run_torch(name: str) -> float:
        prompts_BxP = torch.from_numpy(prompts)
        began = time.perf_counter()
        new_BxN = torch_sampler.generate(
            steps[name], prompts_BxP, sampling.length, sampling.steps, sampling.block_length, spec.mask_id
        )
        seconds = time.perf_counter() - began
        tokens[name] = new_BxN.numpy()
        return seconds

    return {OURS: run_ours, **{name: functools.partial(run_torch, name) for name in steps}}


def _our_network(comparison: Comparison) -> tuple[Callable[[], float], Callable[[], np.ndarray]]:
    """Return functions for the seconds and the logits (B, prompt and length, vocab) of our network.

    It sees the canvas as `generate` pads it.
    """
    params, spec, prompts, sampling = comparison
    templates = [[*prompt, *[None] * sampling.length] for prompt in prompts.tolist()]
    canvas = build_canvas(spec, templates, 0, range(len(prompts)))
    model, ids_BxT = Transformer(spec.model), jnp.asarray(canvas.segment_ids_BxT)

    @jax.jit
    def hidden(params: Params, tokens_BxT: jax.Array, calls: int) -> jax.Array:
        def evaluate(_: int, tokens_BxT: jax.Array) -> jax.Array:
            hidden_BxTxD = model.apply({"params": params}, tokens_BxT, ids_BxT)
            # Something that each evaluation depends on, and that needs all of the one before it.
            return jnp.where(jnp.isnan(hidden_BxTxD).any(-1), 0, tokens_BxT)

        return jax.lax.fori_loop(0, calls, evaluate, tokens_BxT)

    @jax.jit
    def logits(params: Params, tokens_BxT: jax.Array) -> jax.Array:
        hidden_BxTxD = model.apply({"params": params}, tokens_BxT, ids_BxT)
        return model.apply({"params": params}, hidden_BxTxD, method=Transformer.head)

    tokens_BxT = jnp.asarray(canvas.tokens_BxT)

    def seconds() -> float:
        began = time.perf_counter()
        jax.block_until_ready(hidden(params, tokens_BxT, NETWORK_CALLS))
        return (time.perf_counter() - began) / NETWORK_CALLS

    def fetched_logits() -> np.ndarray:
        B, N = len(prompts), prompts.shape[1] + sampling.length
        return np.asarray(logits(params, tokens_BxT))[:B, :N, : spec.model.vocab_size]

    return seconds, fetched_logits


def _port_table(cell: Cell, result: Mapping[str, Any], new_tokens: int) -> Table:
    samplers = result["samplers"]
    best = min((name for name in samplers if name != OURS), key=lambda n: statistics.median(samplers[n]["seconds"]))
    ratio = spread(samplers[best]["times_ours"], "{:.2f}")
    table = Table(title=f"{cell}: the best of PyTorch ({best}) takes {ratio} times as long as ours")
    table.add_column("sampler")
    for name in ("seconds", "tokens/s", "network ms/step", "rest ms/step", "times ours", "(fastest)", "equal"):
        table.add_column(name, justify="right")
    for name, sampler in samplers.items():
        table.add_row(
            name,
            spread(sampler["seconds"], "{:.3f}"),
            f"{new_tokens / statistics.median(sampler['seconds']):.0f}",
            spread([1e3 * x for x in sampler["network_seconds_per_step"]], "{:.2f}"),
            spread([1e3 * x for x in sampler["rest_seconds_per_step"]], "{:.2f}"),
            spread(sampler["times_ours"], "{:.2f}"),
            f"{min(sampler['seconds']) / min(samplers[OURS]['seconds']):.2f}",
            f"{sampler['equal_tokens']:.4f}",
        )
    table.caption = (
        f"median (least to most of {len(samplers[OURS]['seconds'])} turns), and the ratio of the fastest turns; "
        f"load average {result['load_average']:.1f} on {os.cpu_count()} cores\n"
        f"logits differ by at most {result['largest_logit_difference']:.1e}; "
        f"{result['distinct_tokens']} distinct tokens"
    )
    return table


def _random_params(cfg: ModelConfig, seed: int) -> Params:
    tokens_1x1 = jnp.zeros((1, 1), jnp.int32)
    params = nn.unbox(jax.jit(Transformer(cfg).init)(jax.random.key(seed), tokens_1x1)["params"])
    return {**params, "head": params["head"] * HEAD_SCALE}


COMMANDS = {"port": port, "frontier": frontier, "twins": twins}


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code, 2 for a user's mistake."""
    try:
        if not argv or argv[0] not in COMMANDS:
            raise UserError(f"name a command: {', '.join(COMMANDS)}")
        return parse(COMMANDS[argv[0]], argv[1:], f"sampling.py {argv[0]}")()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    keep_freed_memory()  # as the command does; the other contenders run under it too
    sys.exit(main(sys.argv[1:]))
