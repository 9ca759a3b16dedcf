"""Kernels for attention that never hold all scores: splash attention on TPUs, cuDNN's on NVIDIA GPUs.

`choose_kernel` decides by the devices of the mesh of `jax.set_mesh`, never by the machine that traces the program, so
that a program compiled ahead of time for another machine has that machine's kernel. Both are tested against
`attention.reference_attention`.
"""

import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks

from diffusionlm.parallel.mesh import partition_spec

CHECKPOINT = "attention"  # the name of the values that the backward pass needs of attention, for remat policies
SPLASH_LENGTHS = 128  # splash attention takes sequence lengths that are multiples of it
MAX_SPLASH_TILE = 512
# NVIDIA's cards before Ampere (compute capability 8.0), for which cuDNN has no flash attention.
BEFORE_AMPERE = re.compile(r"Tesla|Quadro|TITAN|GTX|GeForce MX|RTX 20\d0\b(?!.* Ada)|\b[KMPV]\d+|\bT\d+")


def choose_kernel(q_BxTxHxK: jax.Array) -> Literal["splash", "cudnn"] | None:
    """Return the kernel for some queries on the devices of the mesh; None if only the reference can do."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:  # no mesh
        return None
    T, K = q_BxTxHxK.shape[1], q_BxTxHxK.shape[3]
    if device.platform == "tpu":
        return "splash" if T % SPLASH_LENGTHS == 0 else None
    nvidia = device.platform in ("gpu", "cuda") and device.device_kind.startswith("NVIDIA")
    nvidia = nvidia and not BEFORE_AMPERE.search(device.device_kind)
    # The backward pass of cuDNN refuses odd lengths where documents are masked from each other.
    if nvidia and q_BxTxHxK.dtype in (jnp.bfloat16, jnp.float16) and K <= 128 and K % 8 == 0 and T % 2 == 0:
        return "cudnn"
    return None


def splash(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    *,
    causal: bool,
    block: int,
    window: int = 0,
    segment_ids_BxT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """Compute splash attention; arguments and result are those of `attention`, T a multiple of `SPLASH_LENGTHS`.

    The kernel knows no meshes, so each device runs it on its own rows and heads. `interpret` runs the kernel's Python
    on any platform, for tests.
    """
    H, G = q_BxTxHxK.shape[2], k_BxTxGxK.shape[2]
    mesh = dict(jax.sharding.get_abstract_mesh().shape)
    spec = partition_spec(q_BxTxHxK.shape, ("batch", None, "heads", None), mesh)
    kv_spec = partition_spec(k_BxTxGxK.shape, ("batch", None, "kv_heads", None), mesh)
    if spec != kv_spec:  # the mesh does not divide the key/value heads: each goes to the devices of its queries
        k_BxTxGxK, v_BxTxGxK = (jnp.repeat(x, H // G, axis=2) for x in (k_BxTxGxK, v_BxTxGxK))
    body = functools.partial(_splash_one_device, _static_mask(q_BxTxHxK.shape[1], causal, block, window), interpret)
    operands = (q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT)
    if not mesh:
        return body(*operands)
    rows = None if segment_ids_BxT is None else jax.sharding.PartitionSpec(spec[0])
    return jax.shard_map(body, in_specs=(spec, spec, spec, rows), out_specs=spec, check_vma=False)(*operands)


def _splash_one_device(
    mask: splash_masks.Mask,
    interpret: bool,
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    segment_ids_BxT: jax.Array | None,
) -> jax.Array:
    _, T, H, K = q_BxTxHxK.shape
    run = splash_lib.make_splash_mha(
        splash_masks.MultiHeadMask([mask] * H),
        block_sizes=_tiles(T),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=CHECKPOINT,
        interpret=interpret,
    )
    q_BxTxHxK = (q_BxTxHxK.astype(jnp.float32) * K**-0.5).astype(q_BxTxHxK.dtype)  # splash does not scale
    q_BxHxTxK, k_BxGxTxK, v_BxGxTxK = (x.transpose(0, 2, 1, 3) for x in (q_BxTxHxK, k_BxTxGxK, v_BxTxGxK))
    if segment_ids_BxT is None:
        out_BxHxTxK: Any = jax.vmap(lambda q, k, v: run(q, k, v))(q_BxHxTxK, k_BxGxTxK, v_BxGxTxK)
    else:
        within = jax.vmap(lambda q, k, v, ids: run(q, k, v, splash_lib.SegmentIds(ids, ids)))
        out_BxHxTxK = within(q_BxHxTxK, k_BxGxTxK, v_BxGxTxK, segment_ids_BxT)
    return out_BxHxTxK.transpose(0, 2, 1, 3)


def _static_mask(T: int, causal: bool, block: int, window: int) -> splash_masks.Mask:
    if not causal:
        return splash_masks.FullMask((T, T))
    if window:
        return splash_masks.LocalMask((T, T), window_size=(window - 1, 0), offset=0)
    if block == 1:
        return splash_masks.CausalMask((T, T))
    blocks_T = np.arange(T) // block
    return splash_masks.NumpyMask(blocks_T[None] <= blocks_T[:, None])


def splash_tile(length: int) -> int:
    """Return the number of queries and of keys in a tile of splash attention: the largest that divides the length."""
    return next(n for n in range(min(length, MAX_SPLASH_TILE), 0, -SPLASH_LENGTHS) if length % n == 0)


def _tiles(T: int) -> splash_lib.BlockSizes:
    tile = splash_tile(T)
    return splash_lib.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_kv_compute=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_kv_dkv_compute=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
    )


def cudnn(
    q_BxTxHxK: jax.Array, k_BxTxGxK: jax.Array, v_BxTxGxK: jax.Array, *, causal: bool, mask_BxTxT: jax.Array | None
) -> jax.Array:
    """Compute attention with cuDNN's flash kernel; a mask needs as much memory as a bias, but scores need none."""
    return jax.nn.dot_product_attention(
        q_BxTxHxK,
        k_BxTxGxK,
        v_BxTxGxK,
        mask=None if mask_BxTxT is None else mask_BxTxT[:, None],
        is_causal=causal,
        implementation="cudnn",
    )
