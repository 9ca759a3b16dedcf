"""Tokens that change with the canvas, the batch and the mesh: python experiments/benchmarks/invariance.py [--help].

The same prompts with the same seeds on eight CPU devices, in float32 and in bfloat16. Inside one compiled program a row
gives the same bits whatever its mates; in other programs sums are rounded differently, which changes a token where two
choices are as good as equal, and then what follows from it.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measure import console, read_texts
from rich.table import Table

from diffusionlm.config import MeshConfig
from diffusionlm.errors import UserError
from diffusionlm.options import parse
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.pretrained.loading import load
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate

MESHES = {
    "8 devices, data": MeshConfig(data=8, fsdp=1),
    "8 devices, fsdp": MeshConfig(fsdp=8),
    "8 devices, data 2 fsdp 2 tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def mismatches(
    model: str = "docs/results/models/tinystories",
    texts: str = "",
    prompts: int = 32,
    prompt_length: int = 32,
    length: int = 96,
    output: Path | None = None,
) -> int:
    """Print the share of tokens that differ from those on one device in a batch of all prompts.

    Args:
      model: a checkpoint.
      texts: a .jsonl file of texts, the beginnings of which are the prompts.
      prompts: the number of prompts, a multiple of 8.
      prompt_length: tokens of each prompt.
      length: new tokens of each prompt.
      output: a JSON file for the numbers.
    """
    os.environ.setdefault("NPROC", "32")  # threads of XLA's pool; as many as devices can deadlock in collectives
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    lines = read_texts(texts, "texts")[: 8 * prompts]
    settings = {
        "low confidence, greedy": SamplingConfig(length, strategy="low_confidence", temperature=0.0),
        "low confidence": SamplingConfig(length, strategy="low_confidence", block_length=32),
        "ancestral": SamplingConfig(length, strategy="ancestral"),
    }
    rows: list[dict[str, Any]] = []
    for dtype in ("float32", "bfloat16"):
        alone = load(model, dtype=dtype)
        starts = [ids[:prompt_length] for ids in map(alone.encode, lines)]
        starts = [ids for ids in starts if len(ids) == prompt_length][:prompts]
        meshes = {name: load(model, dtype=dtype, mesh=make_mesh(cfg)) for name, cfg in MESHES.items()}
        for name, sampling in settings.items():
            rows.append({"dtype": dtype, "settings": name, **_mismatches(alone, meshes, starts, sampling)})
    table = Table(title=f"share of tokens that differ, {prompts} prompts of {length} new tokens")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.4f}" for value in row.values()))
    console().print(table)
    if output:
        output.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _mismatches(
    alone: LoadedModel, meshes: Mapping[str, LoadedModel], prompts: list[list[int]], sampling: SamplingConfig
) -> dict[str, float]:
    """Return the share of tokens that differ from those of one batch on one device, for each change."""
    B = len(prompts)
    expected = _tokens(alone, prompts, sampling)
    mates = [[i] * 9 for i in range(1, B)]
    longer = [*prompts, [1] * (alone.config.max_length - sampling.length)]
    batches = [_tokens(alone, prompts[i : i + 4], sampling, i) for i in range(0, B, 4)]
    return {
        "mates": _share(_tokens(alone, prompts[:1] + mates, sampling), expected, 1),
        "longer canvas": _share(_tokens(alone, longer, sampling), expected, B),
        "batches of 4": _share(np.concatenate(batches), expected, B),
        **{name: _share(_tokens(loaded, prompts, sampling), expected, B) for name, loaded in meshes.items()},
    }


def _tokens(model: LoadedModel, prompts: list[list[int]], sampling: SamplingConfig, first: int = 0) -> np.ndarray:
    with model.on_mesh():
        ids = range(first, first + len(prompts))
        return generate(model.params, model.config, prompts, sampling, row_ids=ids).tokens


def _share(tokens: np.ndarray, expected: np.ndarray, rows: int) -> float:
    return float((tokens[:rows] != expected[:rows]).mean())


if __name__ == "__main__":
    try:
        sys.exit(parse(mismatches, sys.argv[1:], "invariance.py")())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
