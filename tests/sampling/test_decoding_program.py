"""The compiled program of a cached generation: a decoding step moves no more of the cache than its window."""

import re

import jax
import pytest
from support.random_params import make_params

from diffusionlm.compile_check import hlo_text
from diffusionlm.config import Config, ModelConfig
from diffusionlm.model.spec import ModelSpec
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import lower

# Sizes that no other array of the program has in common with the cache.
TINY = ModelConfig(d_model=32, n_layers=5, n_heads=6, n_kv_heads=3, head_dim=14, d_ff=64, vocab_size=50, max_length=128)
PLACES = 64  # of the canvas


def moves_of_whole_caches(module, computation, dims, refreshing=False):
    """Return (name, whether a refresh runs it) for each copy or fill of an array of `dims`, with those of callees."""
    moves = []
    for instruction in module.computations[computation].values():
        called = [name for name in re.findall(r"%([\w.\-]+)", instruction.attributes) if name in module.computations]
        for name in called:
            operations = [i.jax_operation for i in module.computations[name].values()]
            inside = refreshing or any("/Transformer.refresh/" in operation for operation in operations)
            moves += moves_of_whole_caches(module, name, dims, inside)
        if instruction.opcode in ("copy", "broadcast"):
            shape = [size for size in instruction.arrays[0].shape if size > 1]
            moves += [(instruction.name, refreshing)] if sorted(shape) == sorted(dims) else []
    return moves


@pytest.mark.slow
@pytest.mark.parametrize(
    "cache", ["causal", *(pytest.param(cache, marks=pytest.mark.slow) for cache in ("dual", "prefix"))]
)
def test_a_decoding_step_neither_copies_nor_fills_the_whole_cache(cache):
    causal = cache == "causal"
    model = ModelConfig(**{**vars(TINY), "causal": causal, "mask_row": not causal})
    spec = ModelSpec.of(Config(objective="arm" if causal else "mdm", model=model))
    blocks = {} if causal else {"steps": 12, "block_length": 12}
    sampling = SamplingConfig(length=24, cache=cache, **blocks)
    params = jax.eval_shape(lambda: make_params(model))
    module = hlo_text.parse(lower(params, spec, [[3, 1, 4, 1, 5]], sampling).compile().as_text())

    steps = [i for i in module.computations[module.entry].values() if i.opcode == "while"][-1].reference("body")
    moves = moves_of_whole_caches(module, steps, [model.n_layers, PLACES, model.n_kv_heads, model.head_dim])
    assert [name for name, refreshing in moves if not refreshing] == []
    assert any(refreshing for _, refreshing in moves)  # a refresh fills new caches: this is their shape
