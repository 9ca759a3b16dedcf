"""The Transformer that masked diffusion models and their autoregressive twins share.

Pure `init`/`apply` (Flax Linen). Layers are scanned, so compile time and program size do not grow with depth; their
parameters are stacked along a leading "layers" axis. Parameters are float32 and carry logical axis names
(`diffusionlm.parallel.mesh.RULES` maps them to mesh axes); matmuls and activations use `cfg.dtype`.

Linear layers run on two-dimensional activations [batch*length, width]: the same numbers, and much faster on CPUs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffusionlm.config import ModelConfig
from diffusionlm.model import attention_kernels as flash
from diffusionlm.model import lora
from diffusionlm.model.attention import Keys, attention
from diffusionlm.model.cache import Cache, Window, scatter_rows
from diffusionlm.model.embedding import look_up
from diffusionlm.model.positions import rope_tables, rotate
from diffusionlm.parallel.mesh import constrain, tree_shardings, unbox

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(flash.CHECKPOINT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Norm(nn.Module):
    """RMSNorm or LayerNorm with float32 statistics; written here because Linen's break under strict dtype promotion."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        cfg = self.cfg
        scale_D = _param(self, "scale", nn.initializers.ones, (cfg.d_model,), (None,))
        y_BxTxD = x_BxTxD.astype(jnp.float32)
        if cfg.norm == "layernorm":
            y_BxTxD -= y_BxTxD.mean(-1, keepdims=True)
        y_BxTxD *= jax.lax.rsqrt(jnp.square(y_BxTxD).mean(-1, keepdims=True) + cfg.norm_eps)
        y_BxTxD *= scale_D.astype(jnp.float32)[None, None]  # a sampler may hold parameters in bfloat16
        if cfg.norm == "layernorm":
            bias_D = _param(self, "bias", nn.initializers.zeros, (cfg.d_model,), (None,))
            y_BxTxD += bias_D.astype(jnp.float32)[None, None]
        return y_BxTxD.astype(x_BxTxD.dtype)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        rope_BxTx2xJ: jax.Array | None,
        segment_ids_BxT: jax.Array | None,
        allowed_TxT: jax.Array | None,
        window: Window | None,
        cache_BxSxGxK: tuple[jax.Array, jax.Array] | None,  # keys, values
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        cfg = self.cfg
        with jax.named_scope("attention"):
            normed_BxTxD = Norm(cfg, name="attention_norm")(x_BxTxD)
            out_BxTxD, cache_BxSxGxK = self._attention(
                normed_BxTxD, rope_BxTx2xJ, segment_ids_BxT, allowed_TxT, window, cache_BxSxGxK
            )
            x_BxTxD += out_BxTxD
        x_BxTxD = constrain(x_BxTxD, "batch", None, None)
        with jax.named_scope("mlp"):
            x_BxTxD += self._mlp(Norm(cfg, name="mlp_norm")(x_BxTxD))
        return constrain(x_BxTxD, "batch", None, None), cache_BxSxGxK

    def _attention(
        self,
        x_BxTxD: jax.Array,
        rope_BxTx2xJ: jax.Array | None,
        segment_ids_BxT: jax.Array | None,
        allowed_TxT: jax.Array | None,
        window: Window | None,
        cache_BxSxGxK: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        cfg = self.cfg
        D, H, G, K = cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        bias = cfg.linear_bias or cfg.qkv_bias
        q_BxTxHxK = self._linear("q", x_BxTxD, (D,), (H, K), ("embed", "heads", None), bias=bias)
        k_BxTxGxK = self._linear("k", x_BxTxD, (D,), (G, K), ("embed", "kv_heads", None), bias=bias)
        v_BxTxGxK = self._linear("v", x_BxTxD, (D,), (G, K), ("embed", "kv_heads", None), bias=bias)
        if rope_BxTx2xJ is not None:
            q_BxTxHxK = rotate(q_BxTxHxK, rope_BxTx2xJ)
            k_BxTxGxK = rotate(k_BxTxGxK, rope_BxTx2xJ)
        q_BxTxHxK = constrain(q_BxTxHxK, "batch", None, "heads", None)
        k_BxTxGxK = constrain(k_BxTxGxK, "batch", None, "kv_heads", None)
        v_BxTxGxK = constrain(v_BxTxGxK, "batch", None, "kv_heads", None)
        keys = None
        if window is not None:
            k_BxTxGxK, v_BxTxGxK = cache_BxSxGxK = tuple(
                constrain(scatter_rows(cached, window.places_BxW, new), "batch", None, "kv_heads", None)
                for cached, new in zip(cache_BxSxGxK, (k_BxTxGxK, v_BxTxGxK), strict=True)
            )
            keys = Keys(window.places_BxW, window.segment_ids_BxS)
        elif cache_BxSxGxK is not None:
            cache_BxSxGxK = (k_BxTxGxK, v_BxTxGxK)
        out_BxTxHxK = attention(
            q_BxTxHxK,
            k_BxTxGxK,
            v_BxTxGxK,
            causal=cfg.causal,
            segment_ids_BxT=segment_ids_BxT,
            keys=keys,
            allowed_TxS=allowed_TxT,
        )
        return self._linear("o", out_BxTxHxK, (H, K), (D,), ("heads", None, "embed"), residual=True), cache_BxSxGxK

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
        """`x` (B, T, *inputs) times a weight (*inputs, *outputs); `residual` marks what is added to the stream."""
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
        """What the low-rank adapter of a weight adds to its result (LoRA, arXiv 2106.09685, Eq. 3); 0 at first."""
        cfg, R = self.cfg, self.cfg.lora_rank
        std = flat_NxI.shape[1] ** -0.5
        down = _param(self, name + lora.DOWN, nn.initializers.normal(std), (*inputs, R), (*axes[: len(inputs)], None))
        up = _param(self, name + lora.UP, nn.initializers.zeros, (R, *outputs), (None, *axes[len(inputs) :]))
        low_NxR = flat_NxI @ down.astype(cfg.dtype).reshape(-1, R)
        return (low_NxR @ up.astype(cfg.dtype).reshape(R, -1)) * jnp.asarray(lora.SCALE, cfg.dtype)


class Transformer(nn.Module):
    """Tokens to final hidden states (`__call__`), and hidden states to logits (`head`)."""

    cfg: ModelConfig

    def setup(self) -> None:
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
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, 0),
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
        """Final hidden states, after the last norm.

        Args:
          tokens_BxT: int32 ids in [0, padded_vocab_size).
          segment_ids_BxT: tokens attend within equal ids only; 0 is padding. None: everything attends to everything.
          positions_BxT: positions of the tokens; None counts from 0.
          allowed_TxT: bool, which positions (second axis) each may attend to besides, in every row, head and layer; for
            `attention.annealed`. None: all.

        Returns:
          (B, T, d_model) in `cfg.dtype`.
        """
        if positions_BxT is None:
            positions_BxT = jnp.arange(tokens_BxT.shape[1], dtype=jnp.int32)[None]
        return self._hidden(tokens_BxT, segment_ids_BxT, positions_BxT, allowed_TxT, None, None)[0]

    def refresh(
        self, tokens_BxS: jax.Array, segment_ids_BxS: jax.Array, positions_BxS: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """As `__call__`, and the keys and values of every position."""
        cfg = self.cfg
        shape = (cfg.n_layers, *tokens_BxS.shape, cfg.n_kv_heads, cfg.head_dim)
        nothing = Cache(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))
        return self._hidden(tokens_BxS, segment_ids_BxS, positions_BxS, None, None, nothing)

    def extend(
        self, tokens_BxS: jax.Array, positions_BxS: jax.Array, window: Window, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Final hidden states of the window's positions, (B, W, d_model), which see the cached ones of all others.

        Returns:
          The states, and the cache with the window's own keys and values.
        """
        last = tokens_BxS.shape[1] - 1

        def seen(x_BxS: jax.Array) -> jax.Array:
            return jnp.take_along_axis(x_BxS, jnp.minimum(window.places_BxW, last), axis=1)

        segment_ids_BxW = jnp.where(window.places_BxW > last, 0, seen(window.segment_ids_BxS))
        return self._hidden(seen(tokens_BxS), segment_ids_BxW, seen(positions_BxS), None, window, cache)

    def _hidden(
        self,
        tokens_BxT: jax.Array,
        segment_ids_BxT: jax.Array | None,
        positions_BxT: jax.Array,
        allowed_TxT: jax.Array | None,
        window: Window | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        cfg = self.cfg
        x_BxTxD = look_up(self.embed, tokens_BxT, cfg.dtype)
        rope_BxTx2xJ = None
        if cfg.positions == "learned":
            x_BxTxD += look_up(self.positions, positions_BxT, cfg.dtype, None)
        else:
            rope_BxTx2xJ = rope_tables(cfg, positions_BxT)
        x_BxTxD = constrain(x_BxTxD, "batch", None, None)
        layers = None if cache is None else tuple(cache)
        x_BxTxD, layers = self.blocks(x_BxTxD, rope_BxTx2xJ, segment_ids_BxT, allowed_TxT, window, layers)
        return self.final_norm(x_BxTxD), None if cache is None else Cache(*layers)

    def head(self, hidden_BxTxD: jax.Array) -> jax.Array:
        """Raw float32 logits (B, T, padded_vocab_size) of final hidden states; `suppression` says which to ignore."""
        B, T, D = hidden_BxTxD.shape
        weight_DxV = self.head_matrix().astype(self.cfg.dtype)
        logits_NxV = jnp.dot(hidden_BxTxD.reshape(B * T, D), weight_DxV, preferred_element_type=jnp.float32)
        return constrain(logits_NxV.reshape(B, T, -1), "batch", None, "vocab")

    def head_matrix(self) -> jax.Array:
        """What final hidden states are multiplied with, (d_model, padded_vocab_size), as it is stored."""
        return self.embed.T if self.cfg.tied_head else self.head_weight


def abstract_params(cfg: ModelConfig, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, dtypes and shardings of the parameters of `Transformer(cfg)` on `mesh`, without making them."""
    tokens_1x1 = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), tokens_1x1)["params"]
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        unbox(boxed),
        tree_shardings(boxed, mesh),
    )


def _param(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> jax.Array:
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
