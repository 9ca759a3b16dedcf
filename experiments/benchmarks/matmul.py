"""Matrix products of XLA and of PyTorch on this machine: python experiments/benchmarks/matmul.py [--help].

What the other benchmarks' networks consist of; where these differ, a network cannot help differing. On a CPU, a library
of its maker may be far ahead.
"""

import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import console, environment, in_turns, run, spread
from rich.table import Table

from diffusionlm import presets
from diffusionlm.allocator import keep_freed_memory
from diffusionlm.errors import UserError

CALLS = 8  # of each measurement


def measure(preset: str = "smdm_6m", tokens: tuple[int, ...] = (160, 4096), repetitions: int = 15) -> int:
    """Measure the products of a layer's linear maps, forward and for the gradients, in float32.

    Args:
      preset: whose widths.
      tokens: rows: of a sampling step, of a training step.
      repetitions: turns.
    """
    if repetitions < 1:
        raise UserError(f"repetitions={repetitions} must be positive")
    try:
        import torch
    except ImportError:
        raise UserError('this needs PyTorch: pip install -e ".[parity]"') from None
    cfg = presets.get(preset)
    D, F = cfg.d_model, cfg.d_ff
    facts = environment()
    versions = f"JAX {facts['jax']}, PyTorch {torch.__version__}"
    table = Table(title=f"{facts['processor']}, {facts['cores']} cores, {versions}")
    table.add_column("rows x inner x columns")
    for name in ("XLA, GFLOP/s", "PyTorch, GFLOP/s", "PyTorch's / XLA's"):
        table.add_column(name, justify="right")
    for rows in tokens:
        for shape in ((rows, D, D), (rows, D, F), (rows, F, D), (D, rows, F), (F, rows, D)):
            found = in_turns(_contenders(torch, *shape), repetitions)
            work = 2 * np.prod(shape) / 1e9
            speeds = {name: [work / s for s in seconds] for name, seconds in found.items()}
            ratios = [b / a for a, b in zip(speeds["xla"], speeds["torch"], strict=True)]
            cells = (spread(speeds["xla"], "{:.0f}"), spread(speeds["torch"], "{:.0f}"), spread(ratios, "{:.2f}"))
            table.add_row(" x ".join(map(str, shape)), *cells)
    table.caption = f"median (least to most) of {repetitions} turns"
    console().print(table)
    return 0


def _contenders(torch: Any, M: int, K: int, N: int) -> dict[str, Any]:
    """Seconds a product of one by the other."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(M, K)).astype(np.float32), rng.normal(size=(K, N)).astype(np.float32)
    product = jax.jit(jnp.dot)

    def seconds(call: Any, wait: Any) -> float:
        began = time.perf_counter()
        for _ in range(CALLS):
            out = call()
        wait(out)
        return (time.perf_counter() - began) / CALLS

    ours = functools.partial(product, jnp.asarray(a), jnp.asarray(b))
    theirs = functools.partial(torch.matmul, torch.from_numpy(a), torch.from_numpy(b))
    return {
        "xla": functools.partial(seconds, ours, jax.block_until_ready),
        "torch": functools.partial(seconds, theirs, lambda _: None),
    }


if __name__ == "__main__":
    keep_freed_memory()  # as the command does; the other contenders run under it too
    sys.exit(run(measure, sys.argv[1:], "matmul.py"))
