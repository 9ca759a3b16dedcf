"""The TPU kernel, run in Python on this machine, against attention with all scores; and which kernel runs where."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType

from diffusionlm.config import MeshConfig, ModelConfig
from diffusionlm.model import attention_kernels
from diffusionlm.model.attention import attention, attention_mask, reference_attention
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import AXES, make_mesh

T = 256
LENGTHS = np.array([[100, 80, 50, 26], [256, 0, 0, 0], [1, 200, 0, 55], [128, 128, 0, 0]])
SEGMENTS = np.stack([np.repeat([1, 2, 3, 0], row) for row in LENGTHS]).astype(np.int32)  # the last of each is padding
MASKS = {
    "full": {"causal": False},
    "causal": {"causal": True},
    "blocks of 96": {"causal": True, "block": 96},
    "window of 40": {"causal": True, "window": 40},
}


def inputs(B, H, G, K, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, T, heads, K)), dtype) for heads in (H, G, G)]


def with_gradients(function):
    """The output and the gradients of a sum of it in which every number has its own weight."""

    def weighted(q, k, v, ids):
        out = function(q, k, v, ids)
        return (out.astype(jnp.float32) * jnp.sin(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))


def both(causal, block=1, window=0):
    def fast(q, k, v, ids):
        masks = {"causal": causal, "block": block, "window": window, "segment_ids_BxT": ids}
        return attention_kernels.splash(q, k, v, **masks, interpret=True)

    def slow(q, k, v, ids):
        return reference_attention(q, k, v, attention_mask(T, causal, block, window, ids))

    return with_gradients(fast), with_gradients(slow)


@pytest.mark.parametrize(
    "segments", [pytest.param(None, id="whole", marks=pytest.mark.slow), pytest.param(SEGMENTS[:2], id="segments")]
)
@pytest.mark.parametrize(
    "kind", [kind if kind == "full" else pytest.param(kind, marks=pytest.mark.slow) for kind in MASKS]
)
def test_splash_and_its_gradients_are_those_of_the_reference(kind, segments):
    fast, slow = both(**MASKS[kind])
    arguments = (*inputs(2, 2, 2, 64), segments)
    chex.assert_trees_all_close(fast(*arguments), slow(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("H", "G", "K"),
    [(3, 1, 80), *(pytest.param(*heads, marks=pytest.mark.slow) for heads in ((4, 2, 64), (2, 2, 128)))],
)
def test_splash_takes_grouped_heads_of_any_width(H, G, K):
    fast, slow = both(**MASKS["causal"])
    arguments = (*inputs(1, H, G, K), None)
    chex.assert_trees_all_close(fast(*arguments), slow(*arguments), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "G"), [((2, 1, 4), 2), *(pytest.param((2, 2, 2), G, marks=pytest.mark.slow) for G in (4, 1))]
)
def test_each_device_runs_splash_on_its_rows_and_heads(sizes, G):
    """Key/value heads that the mesh does not divide included."""
    fast, slow = both(**MASKS["full"])
    arguments = (*inputs(4, 4, G, 64), SEGMENTS)
    expected = jax.device_get(slow(*arguments))
    devices = jax.devices()[: int(np.prod(sizes))]
    with jax.set_mesh(make_mesh(MeshConfig(*sizes), devices)):
        result = jax.device_get(fast(*arguments))
    chex.assert_trees_all_close(result, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_good_as_the_reference():
    exact = with_gradients(lambda q, k, v, ids: reference_attention(q, k, v, None))
    operands = [x.astype(jnp.bfloat16) for x in inputs(1, 2, 2, 64)]
    (_, expected), _ = exact(*(x.astype(jnp.float32) for x in operands), None)
    (_, result), _ = both(**MASKS["full"])[0](*operands, None)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(result, np.float32), expected, atol=1e-2)


@pytest.mark.parametrize("length", [128, 384, 640, 2048, 4096, 4224])
def test_tiles_divide_the_length(length):
    tiles = attention_kernels._tiles(length)
    for name in ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"):
        assert length % getattr(tiles, name) == 0 and getattr(tiles, name) % 128 == 0


# --- which kernel


def mesh_of(platform: str, kind: str):
    """Such a mesh as a compilation for other devices than this machine's has."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return AbstractMesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)


@pytest.mark.parametrize(
    ("platform", "kind", "length", "width", "dtype", "expected"),
    [
        ("tpu", "TPU v5 lite", 256, 64, jnp.bfloat16, "splash"),
        ("tpu", "TPU v5", 4096, 128, jnp.float32, "splash"),
        ("tpu", "TPU v5", 200, 128, jnp.bfloat16, None),  # not a multiple of 128
        ("gpu", "NVIDIA H200", 256, 64, jnp.bfloat16, "cudnn"),
        ("cuda", "NVIDIA A100-SXM4-40GB", 200, 128, jnp.float16, "cudnn"),
        ("gpu", "NVIDIA H200", 255, 64, jnp.bfloat16, None),  # an odd length has no backward pass
        ("gpu", "NVIDIA H200", 256, 64, jnp.float32, None),  # flash attention is for half precision
        ("gpu", "NVIDIA H200", 256, 256, jnp.bfloat16, None),  # too wide a head for its backward pass
        ("gpu", "Tesla T4", 256, 64, jnp.bfloat16, None),
        ("gpu", "NVIDIA T1000", 256, 64, jnp.bfloat16, None),
        ("gpu", "NVIDIA GeForce MX450", 256, 64, jnp.bfloat16, None),
        ("gpu", "NVIDIA GeForce RTX 2080 Ti", 256, 64, jnp.bfloat16, None),
        ("gpu", "NVIDIA RTX 2000 Ada Generation", 256, 64, jnp.bfloat16, "cudnn"),
        ("gpu", "NVIDIA L4", 256, 64, jnp.bfloat16, "cudnn"),
        ("gpu", "AMD Instinct MI300X", 256, 64, jnp.bfloat16, None),
        ("gpu", "Tesla V100-SXM2-16GB", 256, 64, jnp.float16, None),
        ("cpu", "cpu", 256, 64, jnp.bfloat16, None),
    ],
)
def test_the_kernel_is_chosen_by_the_devices_of_the_mesh(platform, kind, length, width, dtype, expected):
    queries = jax.ShapeDtypeStruct((2, length, 4, width), dtype)
    with jax.sharding.use_abstract_mesh(mesh_of(platform, kind)):
        assert attention_kernels.choose_kernel(queries) == expected


def test_without_a_mesh_there_is_no_kernel():
    assert attention_kernels.choose_kernel(jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)) is None


def calls(platform, kind, dtype=jnp.bfloat16, **settings):
    """The names of the kernels in attention as it is traced for a mesh."""
    operands = [jax.ShapeDtypeStruct((2, T, 4, 64), dtype)] * 3
    ids = jax.ShapeDtypeStruct((2, T), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh_of(platform, kind)):
        run = functools.partial(attention, **settings)
        text = str(jax.make_jaxpr(lambda q, k, v, ids: run(q, k, v, segment_ids_BxT=ids))(*operands, ids))
    return {name for name in ("pallas_call", "dot_product_attention_fwd_wrapper", "dot_general") if name in text}


def test_attention_takes_the_kernel_where_it_can():
    assert "pallas_call" in calls("tpu", "TPU v5", causal=False)
    assert "pallas_call" in calls("tpu", "TPU v5", causal=True, block=32)
    assert "pallas_call" in calls("tpu", "TPU v5", causal=True, window=32)
    # A mask that is data, and any other device, take the reference.
    assert calls("tpu", "TPU v5", causal=False, allowed_TxS=np.tri(T, dtype=bool)) == {"dot_general"}
    assert calls("cpu", "cpu", causal=False) == {"dot_general"}
    assert calls("gpu", "Tesla T4", causal=False) == {"dot_general"}


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "kernels"), [("none", 3), ("attention", 3), ("dots", 4), ("full", 4)])
def test_remat_runs_the_kernel_again_or_keeps_what_it_gave(remat, kernels):
    """One forward and two backward kernels; one more where the backward pass makes attention's result anew."""
    if remat == "attention" and jax.__version_info__ < (0, 11):
        pytest.skip("JAX 0.10 does not see names inside of a kernel's own derivative, and runs it again")
    cfg = ModelConfig(d_model=64, n_layers=2, n_heads=1, n_kv_heads=1, d_ff=64, vocab_size=60, remat=remat)
    model, tokens = Transformer(cfg), jnp.zeros((1, 128), jnp.int32)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))["params"]
    with jax.sharding.use_abstract_mesh(mesh_of("tpu", "TPU v5")):
        grad = jax.grad(lambda params: model.apply({"params": params}, tokens).sum())
        assert str(jax.make_jaxpr(grad)(params)).count("pallas_call[") == kernels
