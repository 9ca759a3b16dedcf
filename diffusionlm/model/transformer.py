"""The Transformer that masked diffusion models and their autoregressive twins share.

A Flax Linen module with pure `init` and `apply`. Layers are scanned, so compile time and program size do not grow with
depth; their parameters are stacked along a leading "layers" axis. Parameters are float32 and carry logical axis names
(`diffusionlm.parallel.mesh.RULES` maps them to mesh axes); matmuls and activations use `cfg.dtype`.

Linear layers run on two-dimensional activations [batch*length, width], which gives the same numbers and is much faster
on CPUs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from diffusionlm.config import ModelConfig
from diffusionlm.errors import UserError
from diffusionlm.model import lora
from diffusionlm.model.attention import Keys, attention
from diffusionlm.model.attention_kernels import CHECKPOINT
from diffusionlm.model.cache import Cache, LayerCache, Window, update_cache, update_layer
from diffusionlm.model.embedding import look_up
from diffusionlm.model.positions import rope_tables, rotate, text_lengths
from diffusionlm.parallel.mesh import constrain, tree_shardings, unbox
from diffusionlm.tree_types import Params

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(CHECKPOINT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Norm(nn.Module):
    """RMSNorm or LayerNorm with float32 statistics; Linen's own break under strict dtype promotion."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise over the last axis, in the dtype of `x`; all other axes share one gain."""
        cfg, width = self.cfg, x.shape[-1:]
        wide = (1,) * (x.ndim - 1) + width
        scale = _param(self, "scale", nn.initializers.ones, width, (None,))
        y = x.astype(jnp.float32)
        if cfg.norm == "layernorm":
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + cfg.norm_eps)
        y *= scale.astype(jnp.float32).reshape(wide)  # a sampler may hold parameters in bfloat16
        if cfg.norm == "layernorm":
            bias = _param(self, "bias", nn.initializers.zeros, width, (None,))
            y += bias.astype(jnp.float32).reshape(wide)
        return y.astype(x.dtype)


@struct.dataclass
class AttentionContext:
    """The facts about the T positions of a pass that attention needs in every layer."""

    rope_BxTx2xJ: jax.Array | None  # of `rope_tables`; None: positions are learned
    segment_ids_BxT: jax.Array | None  # int32, positions attend within equal ids only; None: there is one segment
    allowed_TxT: jax.Array | None = None  # bool, a mask on top of the others
    window: Window | None = None  # the positions within a cached canvas; None: they are a whole canvas
    # static; blocks return the keys and values of these positions
    keep: bool = struct.field(pytree_node=False, default=False)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, context: AttentionContext, cached: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """Return the residual stream after this block and, with `context.keep`, the keys and values of its positions.

        Args:
          x_BxTxD: the residual stream.
          context: the facts about its positions.
          cached: this layer's keys and values of the whole canvas; None without `context.window`.
        """
        cfg = self.cfg
        with jax.named_scope("attention"):
            normed_BxTxD = Norm(cfg, name="attention_norm")(x_BxTxD)
            out_BxTxD, new = self._attention(normed_BxTxD, context, cached)
            x_BxTxD += out_BxTxD
        x_BxTxD = constrain(x_BxTxD, "batch", None, None)
        with jax.named_scope("mlp"):
            x_BxTxD += self._mlp(Norm(cfg, name="mlp_norm")(x_BxTxD))
        return constrain(x_BxTxD, "batch", None, None), new

    def _attention(
        self, x_BxTxD: jax.Array, context: AttentionContext, cached: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        cfg = self.cfg
        D, H, G, K = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        bias = cfg.linear_bias or cfg.qkv_bias
        q_BxTxHxK = self._linear("q", x_BxTxD, (D,), (H, K), ("embed", "heads", None), bias=bias)
        k_BxTxGxK = self._linear("k", x_BxTxD, (D,), (G, K), ("embed", "kv_heads", None), bias=bias)
        v_BxTxGxK = self._linear("v", x_BxTxD, (D,), (G, K), ("embed", "kv_heads", None), bias=bias)
        if cfg.qk_norm:
            q_BxTxHxK = Norm(cfg, name="q_norm")(q_BxTxHxK)
            k_BxTxGxK = Norm(cfg, name="k_norm")(k_BxTxGxK)
        if context.rope_BxTx2xJ is not None:
            q_BxTxHxK = rotate(q_BxTxHxK, context.rope_BxTx2xJ)
            k_BxTxGxK = rotate(k_BxTxGxK, context.rope_BxTx2xJ)
        q_BxTxHxK = constrain(q_BxTxHxK, "batch", None, "heads", None)
        new = LayerCache(*(constrain(x, "batch", None, "kv_heads", None) for x in (k_BxTxGxK, v_BxTxGxK)))
        window, keys, visible = context.window, None, new
        if window is not None:
            assert cached is not None
            keys = Keys(window.places_BxW, window.segment_ids_BxS)
            visible = update_layer(cached, window, new)
        out_BxTxHxK = attention(
            q_BxTxHxK,
            *visible,
            causal=cfg.causal,
            window=cfg.sliding_window,
            segment_ids_BxT=context.segment_ids_BxT,
            keys=keys,
            allowed_TxS=context.allowed_TxT,
        )
        out_BxTxD = self._linear("o", out_BxTxHxK, (H, K), (D,), ("heads", None, "embed"), residual=True)
        return out_BxTxD, new if context.keep else None

    def _mlp(self, x_BxTxD: jax.Array) -> jax.Array:
        D, F = self.cfg.d_model, self.cfg.d_ff
        up_BxTxF = self._linear("up", x_BxTxD, (D,), (F,), ("embed", "mlp"))
        if self.cfg.mlp == "swiglu":
            gate_BxTxF = self._linear("gate", x_BxTxD, (D,), (F,), ("embed", "mlp"))
            h_BxTxF = jax.nn.silu(gate_BxTxF) * up_BxTxF
        else:
            h_BxTxF = jax.nn.gelu(up_BxTxF, approximate=True)
        h_BxTxF = constrain(h_BxTxF, "batch", None, "mlp")
        return self._linear("down", h_BxTxF, (F,), (D,), ("mlp", "embed"), residual=True)

    def _linear(
        self,
        name: str,
        x: jax.Array,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        bias: bool | None = None,
        residual: bool = False,
    ) -> jax.Array:
        """Return `x` (B, T, *inputs) times a weight (*inputs, *outputs); `residual`: the stream gets the product."""
        cfg = self.cfg
        # SMDM's initialiser: every matrix by the width of the stream, not by its own fan-in; 1/layers into the stream.
        std = 1 / (cfg.d_model**0.5 * cfg.n_layers) if residual else (2 / (5 * cfg.d_model)) ** 0.5
        weight = _param(self, name, nn.initializers.normal(std), inputs + outputs, axes)
        # Gathered over the axis that splits the width, in the compute dtype; else XLA may move activations instead.
        weight = constrain(weight.astype(cfg.dtype), *(None if axis == "embed" else axis for axis in axes))
        B, T = x.shape[:2]
        flat_NxI = x.reshape(B * T, -1)
        flat_NxO = flat_NxI @ weight.reshape(flat_NxI.shape[1], -1)
        if cfg.lora_rank:
            flat_NxO += self._adapter(name, flat_NxI, inputs, outputs, axes)
        if cfg.linear_bias if bias is None else bias:
            # In float32, so that the gradient is summed over all tokens in float32.
            value = _param(self, f"{name}_bias", nn.initializers.zeros, outputs, axes[len(inputs) :])
            flat_NxO = (flat_NxO.astype(jnp.float32) + value.astype(jnp.float32).reshape(1, -1)).astype(cfg.dtype)
        return flat_NxO.reshape(B, T, *outputs)

    def _adapter(
        self,
        name: str,
        flat_NxI: jax.Array,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: tuple[str | None, ...],
    ) -> jax.Array:
        """Return the term that a weight's low-rank adapter adds (LoRA, arXiv 2106.09685, Eq. 3); 0 at first."""
        cfg, R = self.cfg, self.cfg.lora_rank
        std = flat_NxI.shape[1] ** -0.5
        down = _param(self, name + lora.DOWN, nn.initializers.normal(std), (*inputs, R), (*axes[: len(inputs)], None))
        up = _param(self, name + lora.UP, nn.initializers.zeros, (R, *outputs), (None, *axes[len(inputs) :]))
        low_NxR = flat_NxI @ down.astype(cfg.dtype).reshape(-1, R)
        return (low_NxR @ up.astype(cfg.dtype).reshape(R, -1)) * jnp.asarray(lora.SCALE, cfg.dtype)


class Transformer(nn.Module):
    """A network from tokens to final hidden states (`__call__`), and from these to logits (`head`)."""

    cfg: ModelConfig

    def setup(self) -> None:
        """Make the parameters and the scanned blocks.

        Raises:
          UserError: the model is applied in 64 bits, in a program that is not within `in_32_bits`.
        """
        if not self.is_initializing() and jax.dtypes.canonicalize_dtype(float) == jnp.float64:
            raise UserError(
                "jax_enable_x64 is on, where this model would draw other random numbers and its loops would not "
                "compile; call it within `with jax.enable_x64(False):`"
            )
        cfg = self.cfg
        std = (2 / (5 * cfg.d_model)) ** 0.5
        table = (cfg.padded_vocab_size, cfg.d_model)
        self.embed = _param(self, "embed", nn.initializers.normal(std), table, ("vocab", "embed"))
        if cfg.positions == "learned":
            shape = (cfg.max_length, cfg.d_model)
            self.positions = _param(self, "positions", nn.initializers.normal(std), shape, (None, "embed"))
        block = Block
        if cfg.remat != "none":
            # prevent_cse only matters outside a scan, and blocks fusion inside one.
            block = nn.remat(block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False)
        self.blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.n_layers,
            in_axes=(nn.broadcast, 0),  # pyright: ignore[reportArgumentType]  Flax's annotation forgets tuples
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg)
        self.final_norm = Norm(cfg)
        if not cfg.tied_head:
            self.head_weight = _param(self, "head", nn.initializers.normal(std), table[::-1], ("embed", "vocab"))

    def __call__(
        self,
        tokens_BxT: jax.Array,
        segment_ids_BxT: jax.Array | None = None,
        positions_BxT: jax.Array | None = None,
        allowed_TxT: jax.Array | None = None,
    ) -> jax.Array:
        """Return the final hidden states, after the last norm.

        Args:
          tokens_BxT: int32 ids in [0, padded_vocab_size).
          segment_ids_BxT: int32; tokens attend within equal ids only, and 0 is padding. None: there is one segment.
          positions_BxT: int32 positions of the tokens; None counts from 0.
          allowed_TxT: bool, a mask on top of the others: the positions (second axis) that each may attend to, in every
            row, head and layer, such as `attention.annealed_mask`.

        Returns:
          (B, T, d_model) in `cfg.dtype`.
        """
        if positions_BxT is None:
            positions_BxT = jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)[None]
        rope_BxTx2xJ = self._rope(positions_BxT, positions_BxT, segment_ids_BxT)
        context = AttentionContext(rope_BxTx2xJ, segment_ids_BxT, allowed_TxT=allowed_TxT)
        return self._hidden(tokens_BxT, positions_BxT, context)[0]

    def refresh(
        self, tokens_BxS: jax.Array, segment_ids_BxS: jax.Array, positions_BxS: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Return the final hidden states of a whole canvas, as `__call__` does, and its keys and values."""
        context = AttentionContext(
            self._rope(positions_BxS, positions_BxS, segment_ids_BxS), segment_ids_BxS, keep=True
        )
        hidden_BxSxD, layers = self._hidden(tokens_BxS, positions_BxS, context)
        assert layers is not None
        return hidden_BxSxD, Cache(*layers)

    def extend(
        self, tokens_BxS: jax.Array, positions_BxS: jax.Array, window: Window, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Compute the positions of a window only; they attend to the cached keys and values of all others.

        Returns:
          Final hidden states of the window, (B, W, d_model), and the cache with the window's own keys and values.
        """
        last = tokens_BxS.shape[1] - 1

        def take(x_BxS: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x_BxS, jnp.minimum(window.places_BxW, last), axis=1)

        segment_ids_BxW = jnp.where(window.places_BxW > last, 0, take(window.segment_ids_BxS))
        positions_BxW = take(positions_BxS)
        rope_BxWx2xJ = self._rope(positions_BxW, positions_BxS, window.segment_ids_BxS)
        context = AttentionContext(rope_BxWx2xJ, segment_ids_BxW, window=window, keep=True)
        hidden_BxWxD, layers = self._hidden(take(tokens_BxS), positions_BxW, context, LayerCache(*cache))
        assert layers is not None
        return hidden_BxWxD, update_cache(cache, window, Cache(*layers))

    def _rope(
        self, positions_BxT: jax.Array, whole_BxS: jax.Array, segment_ids_BxS: jax.Array | None
    ) -> jax.Array | None:
        """Return the rotary tables of some positions, in texts whose tokens have the positions `whole_BxS`."""
        if self.cfg.positions != "rope":
            return None
        dynamic = self.cfg.rope_scaling.kind == "dynamic"
        return rope_tables(self.cfg, positions_BxT, text_lengths(whole_BxS, segment_ids_BxS) if dynamic else None)

    def _hidden(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array,
        context: AttentionContext,
        cached_Nx: LayerCache | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Return final hidden states and, with `context.keep`, new keys and values, stacked over layers."""
        x_BxTxD = look_up(self.embed, tokens_BxT, self.cfg.dtype)
        if self.cfg.positions == "learned":
            x_BxTxD += look_up(self.positions, positions_BxT, self.cfg.dtype, None, batch=tokens_BxT.shape[0])
        x_BxTxD = constrain(x_BxTxD, "batch", None, None)
        x_BxTxD, new_Nx = self.blocks(x_BxTxD, context, cached_Nx)
        return self.final_norm(x_BxTxD), new_Nx

    def head(self, hidden_BxTxD: jax.Array) -> jax.Array:
        """Return raw float32 logits (B, T, padded_vocab_size); `spec.suppression_mask` says which ids to ignore."""
        B, T, D = hidden_BxTxD.shape
        weight_DxV = self.head_matrix().astype(self.cfg.dtype)
        logits_NxV = jnp.dot(hidden_BxTxD.reshape(B * T, D), weight_DxV, preferred_element_type=jnp.float32)
        return constrain(logits_NxV.reshape(B, T, -1), "batch", None, "vocab")

    def head_matrix(self) -> jax.Array:
        """Return the matrix that maps hidden states to logits, (d_model, padded_vocab_size), in its stored dtype."""
        return self.embed.T if self.cfg.tied_head else self.head_weight


def abstract_params(cfg: ModelConfig, mesh: jax.sharding.Mesh, dtype: jax.typing.DTypeLike | None = None) -> Params:
    """Return the shapes, dtypes and shardings of the parameters of `Transformer(cfg)` on `mesh`, without arrays.

    They have `dtype`, or else the one that they are trained in.
    """
    boxed = _boxed_params(cfg)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding),
        unbox(boxed),
        tree_shardings(boxed, mesh),
    )


@functools.lru_cache(maxsize=16)  # loading a model asks twice
def _boxed_params(cfg: ModelConfig) -> Params:
    tokens_1x1 = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Transformer(cfg).init, jax.random.key(0), tokens_1x1)["params"]


def _param(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> jax.Array:
    boxed_init: Any = nn.with_logical_partitioning(init, axes)  # Flax unboxes the parameter where it is used
    return module.param(name, boxed_init, shape, jnp.float32)
