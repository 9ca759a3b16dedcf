"""The compiled program of a cached generation: a decoding step moves no more of the cache than its window."""

import math
import re

import jax
import numpy as np
import pytest
from support.random_params import make_params

from diffusionlm.compile_check import hlo_text
from diffusionlm.config import Config, ModelConfig
from diffusionlm.model.spec import ModelSpec
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import lower

TINY = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64, vocab_size=50, max_length=128)


def cost_of_whole_caches(module, computation, size, refreshing):
    """Return (operation, whether a refresh does it) for every copy and every fill of `size` elements, with callees."""
    moves = []
    for instruction in module.computations[computation].values():
        called = [name for name in re.findall(r"%([\w.\-]+)", instruction.attributes) if name in module.computations]
        for name in called:
            operations = (i.jax_operation for i in module.computations[name].values())
            moves += cost_of_whole_caches(
                module, name, size, refreshing or any("/Transformer.refresh/" in operation for operation in operations)
            )
        if instruction.opcode in ("copy", "broadcast") and math.prod(instruction.arrays[0].shape) == size:
            moves.append((instruction.name, refreshing))
    return moves


@pytest.mark.parametrize("cache", ["causal", "dual", "prefix"])
def test_a_decoding_step_neither_copies_nor_fills_the_whole_cache(cache):
    causal = cache == "causal"
    model = ModelConfig(**{**vars(TINY), "causal": causal, "mask_row": not causal})
    spec = ModelSpec.of(Config(objective="arm" if causal else "mdm", model=model))
    sampling = SamplingConfig(length=24, steps=None if causal else 12, block_length=None if causal else 12, cache=cache)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), make_params(model))
    module = hlo_text.parse(lower(params, spec, [[3, 1, 4, 1, 5]], sampling).compile().as_text())

    rows, places = 1, 32
    size = model.n_layers * rows * places * model.n_kv_heads * model.head_dim
    loops = [i for i in module.computations[module.entry].values() if i.opcode == "while"]
    steps = loops[-1].reference("body")
    moves = cost_of_whole_caches(module, steps, size, False)
    assert [name for name, refreshing in moves if not refreshing] == []
    assert any(refreshing for _, refreshing in moves)  # a refresh fills new caches: the sizes above are right
