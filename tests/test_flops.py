"""The ledger against independent counts: the matmuls of the traced program, XLA's cost analysis, published numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.extend import core as jex

from diffusionlm import flops, hardware, presets
from diffusionlm.config import MeshConfig, ModelConfig, OptimConfig
from diffusionlm.diffusion.cross_entropy import weighted_cross_entropy
from diffusionlm.errors import UserError
from diffusionlm.model import lora
from diffusionlm.model.transformer import Transformer, suppression
from diffusionlm.parallel import mesh as sharding
from diffusionlm.training import optimizer as optim

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


def matmul_flops(jaxpr, turns: int | None = None) -> int:
    """2*M*N*K times the batch of every dot_general in a jaxpr; the body of a scan counts as often as it runs.

    `turns`: how often a loop runs whose length depends on the data.
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
    """The forward pass with its logits, the gradient of the loss, and abstract arguments for both."""
    model = Transformer(cfg)
    suppressed_V = suppression(cfg, ())
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
    """The jaxpr of a program with every scan written out."""
    with jax.disable_jit():
        jaxpr = jax.make_jaxpr(program)(*args)
    assert "scan[" not in str(jaxpr)
    return jaxpr


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_ledger_equals_the_matmuls_of_the_program(variant):
    """Of the unrolled forward pass, and of the loss's gradient where every position is predicted."""
    cfg, B, T = dataclasses.replace(TINY, **VARIANTS[variant]), 2, 12
    forward, gradient, args = programs(cfg, B, T)
    assert sum(p.size for p in jax.tree.leaves(args[0])) == flops.parameters(cfg).stored
    assert matmul_flops(unrolled(forward, args).jaxpr) == B * sum(flops.forward(cfg, T).values())
    turns = math.ceil(B * T / cfg.head_chunk)
    executed = matmul_flops(jax.make_jaxpr(gradient)(*args).jaxpr, turns)
    assert executed == B * flops.train(cfg, T, "executed", rows=B)
    model = B * flops.train(cfg, T, "model")
    parts = flops.forward(cfg, T)
    # Weights that have adapters have no gradient, nor has the head, unless it is the embedding.
    frozen = parts["qkv"] + parts["out"] + parts["mlp"] + (0 if cfg.tied_head else parts["head"])
    assert model == B * (3 * sum(parts.values()) - (frozen if cfg.lora_rank else 0))
    wasted = cfg.lora_rank > 0 and not cfg.tied_head
    assert (executed > model) == (cfg.remat != "none" or B * T % cfg.head_chunk != 0 or wasted)


@pytest.mark.parametrize(("most", "chunk", "turns"), [(100, 14, 1), (10, 7, 2), (4, 4, 3)])
def test_half_of_the_positions_meet_the_vocabulary(most, chunk, turns):
    """24 tokens of which 12 are predicted, in chunks that hold 14, an eighth more than that, between them."""
    cfg, B, T = dataclasses.replace(TINY, head_chunk=most), 2, 12
    _, gradient, args = programs(cfg, B, T, share=0.5)
    executed = matmul_flops(jax.make_jaxpr(gradient)(*args).jaxpr, turns)
    assert executed == B * flops.train(cfg, T, "executed", rows=B, predicted=0.5)
    head = flops.forward(cfg, T)["head"]
    assert flops.train(cfg, T, "model") - flops.train(cfg, T, "model", predicted=0.5) == 3 * head // 2
    assert executed - B * flops.train(cfg, T, "model", predicted=0.5) == 3 * head * (turns * chunk - 12) / T


@pytest.mark.parametrize("name", ["smdm_6m", "gpt2", "tinyllama_1b", "llada_8b", "dream_7b"])
def test_presets_at_full_size(name):
    cfg = presets.get(name)
    forward, _, (params, tokens) = programs(cfg, B=1, T=1024)
    assert sum(p.size for p in jax.tree.leaves(params)) == flops.parameters(cfg).stored
    assert matmul_flops(jax.make_jaxpr(forward)(params, tokens).jaxpr) == sum(flops.forward(cfg, 1024).values())


@pytest.mark.parametrize(
    "fields",
    [
        {"d_model": 256, "n_heads": 4, "n_kv_heads": 4, "d_ff": 1024},
        {"d_model": 256, "n_heads": 4, "n_kv_heads": 1, "d_ff": 1024, "causal": True, "mask_row": False},
        {"d_model": 512, "n_heads": 8, "n_kv_heads": 8, "d_ff": 2048, **GPT2_LIKE},
    ],
    ids=["mdm", "grouped-query arm", "gpt2"],
)
def test_xla_counts_the_same_within_one_percent(fields):
    cfg, B, T = ModelConfig(n_layers=2, head_dim=64, vocab_size=1000, max_length=64, **fields), 2, 64
    forward, _, args = programs(cfg, B, T)
    compiled = jax.jit(jex.jaxpr_as_fun(unrolled(forward, args))).lower(*jax.tree.leaves(args)).compile()
    ledger = B * sum(flops.forward(cfg, T).values())
    # XLA adds the elementwise operations, so it can only be above.
    assert ledger <= compiled.cost_analysis()["flops"] <= 1.01 * ledger


# SMDM's train_mdm.py: optimizer steps of 256 x 2048 tokens that a budget of 1e20 FLOPs buys.
@pytest.mark.parametrize(("name", "steps"), [("smdm_6m", 5_050_076), ("smdm_170m", 187_107), ("smdm_1028m", 30_932)])
def test_6nd_gives_the_steps_of_smdm(name, steps):
    assert int(1e20 / (256 * flops.train(presets.get(name), 2048, "6nd"))) == steps


def test_unknown_convention_is_a_user_error():
    with pytest.raises(UserError, match="unknown FLOP convention '6ND'; use one of 6nd, model, executed"):
        flops.train(TINY, 12, "6ND")


def test_adapters_and_embedding_are_what_has_moments_and_gradients():
    cfg = dataclasses.replace(TINY, lora_rank=3)
    params = nn.unbox(jax.eval_shape(lambda: Transformer(cfg).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))))
    names = {name: leaf.size for name, leaf in params["params"]["blocks"].items() if "lora" in name}
    assert len(names) == 2 * 7  # of q, k, v, o, gate, up, down: one in, one out
    trained = sum(names.values()) + params["params"]["embed"].size
    assert flops.parameters(cfg).trained == trained
    assert flops.memory(cfg, OptimConfig()).optimizer == 8 * trained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_the_sharded_training_state(dtype):
    settings = OptimConfig(first_moment_dtype=dtype)
    mesh = sharding.make_mesh(MeshConfig(fsdp=8))
    boxed = jax.eval_shape(lambda: Transformer(TINY).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]
    per_device = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(s.shard_shape(p.shape), p.dtype),
        nn.unbox(boxed),
        sharding.tree_shardings(boxed, mesh),
    )

    def nbytes(tree):
        return sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(tree) if jnp.issubdtype(p.dtype, jnp.floating))

    got = flops.memory(TINY, settings, shards=8)
    gains = 4 * (2 * TINY.n_layers + 1) * TINY.d_model  # are not split, which the ledger leaves out
    assert got.params == got.gradients == nbytes(per_device) - gains * 7 // 8
    moments = nbytes(jax.eval_shape(optim.build(settings, 1000).init, per_device))
    assert got.optimizer == moments - (2 if dtype == "float32" else 1.5) * gains * 7 // 8
    assert got.total == got.params + got.optimizer + got.gradients


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("Tesla T4", 65e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H1000", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_peak_flops_of_devices(device_kind, peak):
    assert hardware.peak_flops(device_kind) == peak


def test_what_the_tpu_kernel_makes_again():
    """Forward: scores and values. Backward: 4 products of one kernel and 3 of the other, where the plain one has 4."""
    for remat, again in (("none", 0), ("attention", 0), ("dots", 2), ("full", 2)):
        cfg = dataclasses.replace(TINY, remat=remat)
        plain, kernel = (flops.train(cfg, 128, "executed", splash=splash) for splash in (False, True))
        parts = flops.forward(cfg, 128)
        product = parts["attention_scores"]
        of_weights = parts["qkv"] + parts["out"] + parts["mlp"] * 2 // 3 if remat in ("attention", "full") else 0
        chunks = math.ceil(128 / 24) * math.ceil(128 / math.ceil(128 / 24)) - 128  # what the last chunk has too many
        beyond = 3 * parts["head"] * chunks // 128
        assert kernel == flops.train(cfg, 128, "model") + (3 + again) * product + of_weights + beyond
        assert kernel - plain == (2 if remat == "attention" else 3) * product
        assert flops.splash_kernels(cfg, 128) == (9 + again) * product


def test_the_tpu_kernel_skips_what_is_behind_the_mask():
    """Of 4 x 4 tiles of 512 a causal model takes 10; at 640, five tiles of 128 a side, 15 of 25."""
    for length, part in ((2048, 10 / 16), (640, 15 / 25), (512, 1)):
        causal = dataclasses.replace(TINY, causal=True)
        assert flops.splash_kernels(causal, length) == pytest.approx(part * flops.splash_kernels(TINY, length))
        saved = (1 - part) * flops.splash_kernels(TINY, length)
        full, less = (flops.train(cfg, length, "executed", splash=True) for cfg in (TINY, causal))
        assert full - less == pytest.approx(saved)


@pytest.mark.parametrize(("rows", "share", "slowest"), [(1, 0.5, 1.0), (2, 0.5, 0.5), (3, 0.5, 2 / 3), (5, 1.0, 1.0)])
def test_a_row_without_its_antithetic_partner_may_be_masked_whole(rows, share, slowest):
    """2 of 3 rows: a pair of which half is masked, and one more."""
    assert flops.slowest_share(rows, share) == pytest.approx(slowest)


@pytest.mark.parametrize(("rows", "most_of_all"), [(1, 1.0), (2, 0.57), (3, 0.76), (4, 0.57), (5, 0.68)])
def test_the_head_of_the_slowest_device_is_never_dearer_than_all_positions(rows, most_of_all):
    length, most = 2048, 2048
    chunk, turns = flops.head_chunk(rows, length, most, 0.5), flops.head_turns(rows, length, most, 0.5)
    assert turns * chunk <= most_of_all * rows * length
