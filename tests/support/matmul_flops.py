"""Count the matmuls of traced programs: tiny networks of every kind, and the FLOPs of a jaxpr."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.extend import core as jex

from diffusionlm.config import ModelConfig
from diffusionlm.config_model import RopeScaling
from diffusionlm.diffusion.cross_entropy import weighted_cross_entropy
from diffusionlm.model import lora
from diffusionlm.model.spec import suppression_mask
from diffusionlm.model.transformer import Transformer

TINY = ModelConfig(
    d_model=16, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=4, d_ff=24, vocab_size=40, max_length=32, head_chunk=24
)
GPT2_LIKE = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "linear_bias": True, "tied_head": True}
VARIANTS = {
    "mdm": {},
    "arm": {"causal": True, "mask_row": False},
    "grouped queries": {"n_kv_heads": 2},
    "heads wider than the model": {"head_dim": 6},
    "qkv bias": {"qkv_bias": True, "n_kv_heads": 1},
    "gpt2": {**GPT2_LIKE, "causal": True, "mask_row": False},
    "untied gpt2": {**GPT2_LIKE, "tied_head": False},
    "norms of queries and keys": {"qk_norm": True, "n_kv_heads": 2},
    "scaled positions": {"rope_scaling": RopeScaling("dynamic", original_length=8)},
    "remat dots": {"remat": "dots"},
    "remat attention": {"remat": "attention"},
    "remat full": {"remat": "full"},
    "remat full gpt2": {**GPT2_LIKE, "remat": "full"},
    "chunked head": {"head_chunk": 5},
    "remat full, chunked tied head": {"remat": "full", "head_chunk": 4, "tied_head": True},
    "adapters": {"lora_rank": 3, "n_kv_heads": 2},
    "adapters of gpt2": {**GPT2_LIKE, "lora_rank": 3},
    "remat full adapters": {"remat": "full", "lora_rank": 3},
}

# Those with features that others among them have too, or that change one number of a count.
REPEATED = (
    "arm",
    "grouped queries",
    "untied gpt2",
    "remat dots",
    "remat full",
    "remat full gpt2",
    "chunked head",
    "adapters of gpt2",
    "qkv bias",
    "heads wider than the model",
    "norms of queries and keys",
    "remat full adapters",
)
EACH = [pytest.param(name, marks=pytest.mark.slow) if name in REPEATED else name for name in VARIANTS]


def matmul_flops(jaxpr, turns: int | None = None) -> int:
    """Sum 2*M*N*K times the batch of every dot_general in a jaxpr, with a scan's body as often as it runs.

    Args:
      jaxpr: the program.
      turns: how often a loop runs whose length depends on the data.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        for inner in jax.tree.leaves(list(eqn.params.values())):
            inner = inner.jaxpr if isinstance(inner, jex.ClosedJaxpr) else inner
            if isinstance(inner, jex.Jaxpr):
                times = {"while": turns, "scan": eqn.params.get("length")}.get(eqn.primitive.name, 1)
                assert times is not None, "the number of turns is unknown"
                total += matmul_flops(inner, turns) * times
    return total


def programs(cfg: ModelConfig, B: int, T: int, share: float = 1.0):
    """Return the forward pass with its logits, the gradient of the loss, and abstract arguments for both."""
    model = Transformer(cfg)
    suppressed_V = suppression_mask(cfg, ())
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    params = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))))["params"]

    def head(params, hidden):
        return model.apply({"params": params}, hidden, method=Transformer.head)

    def forward(params, tokens):
        return head(params, model.apply({"params": params}, tokens))

    def gradient(params, tokens):
        trained, frozen = lora.split(cfg, params)
        return jax.grad(lambda trained: loss(lora.join(trained, frozen), tokens))(trained)

    def loss(params, tokens):
        hidden = model.apply({"params": params}, tokens)
        matrix = model.apply({"params": params}, method=Transformer.head_matrix)
        ones = jnp.ones((B, T), jnp.float32)
        suppressed = jnp.asarray(suppressed_V)
        return weighted_cross_entropy(hidden, matrix, tokens, ones, ones > 0, suppressed, cfg.head_chunk, share)[0]

    return forward, gradient, (params, tokens)


def unrolled(program, args):
    """Return the jaxpr of a program with every scan written out."""
    with jax.disable_jit():
        jaxpr = jax.make_jaxpr(program)(*args)
    assert "scan[" not in str(jaxpr)
    return jaxpr
