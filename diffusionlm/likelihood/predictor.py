"""The model as likelihood code calls it, with or without guidance."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffusionlm.config import ModelConfig
from diffusionlm.likelihood.pairs import PairBatch
from diffusionlm.model.spec import ModelSpec, suppression_mask
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.device_memory import room_for
from diffusionlm.parallel.mesh import Array
from diffusionlm.sampling.denoiser import guide, predictor_positions
from diffusionlm.tree_types import Params


@struct.dataclass
class TargetPredictor:
    """A model with its parameters; what changes its program is static, everything else is data.

    With guidance (SMDM, arXiv 2410.18514, Eq. 7) a hidden state is two states beside each other: the second comes from
    the sequence with its prefix masked.
    """

    params: Params
    suppressed_V: jax.Array  # bool: ids that get no probability
    mask_id: Array  # int32
    guidance: Array  # float32
    model_cfg: ModelConfig = struct.field(pytree_node=False)
    shifted: bool = struct.field(pytree_node=False)
    autoregressive: bool = struct.field(pytree_node=False)
    guided: bool = struct.field(pytree_node=False)

    @classmethod
    def of(cls, params: Params, cfg: ModelSpec, guidance: float) -> "TargetPredictor":
        """Prepare a model; its parameters lie on the mesh of `jax.set_mesh`, if there is one."""
        return cls(
            params=params,
            suppressed_V=jnp.asarray(suppression_mask(cfg.model, cfg.suppressed_ids)),
            mask_id=np.asarray(cfg.mask_id or 0, np.int32),
            guidance=np.asarray(guidance, np.float32),
            model_cfg=cfg.model,
            shifted=cfg.shifted,
            autoregressive=cfg.autoregressive,
            guided=guidance > 0,
        )

    def room_for(self, R: int, T: int) -> contextlib.AbstractContextManager[None]:
        """Return a context for batches of R sequences of up to T tokens, which refuses those that cannot fit.

        The last hidden states are counted, and the logits of one place of each sequence.
        """
        cfg = self.model_cfg
        hidden, logits = R * T * cfg.d_model * jnp.dtype(cfg.dtype).itemsize, R * cfg.embedding_rows * 4
        what, parts = f"scoring {R} sequences of {T} tokens at a time", {"hidden states": hidden, "logits": logits}
        return room_for(what, self.params, parts, "set fewer rows, and no more draws than rows")

    def hidden(self, batch: PairBatch, masked_ExK: jax.Array) -> jax.Array:
        """Return the final hidden states that predict the K places of each target, (E, K, D), with guidance (E, K, 2D).

        Args:
          batch: the sequences.
          masked_ExK: the places that are masked, all of them in the target.
        """
        T, K = batch.tokens_ExT.shape[1], masked_ExK.shape[1]
        position_ExT = jnp.arange(T)[None] - batch.start_E[:, None]  # counted from the target's first token
        masked_ExT = jnp.take_along_axis(masked_ExK, jnp.clip(position_ExT, 0, K - 1), axis=1)
        masked_ExT &= (position_ExT >= 0) & (position_ExT < K)
        tokens_ExT = jnp.where(masked_ExT, self.mask_id, batch.tokens_ExT)
        hidden_ExKxD = self._hidden_at_places(batch, tokens_ExT, K)
        if not self.guided:
            return hidden_ExKxD
        without_prefix_ExT = jnp.where(position_ExT < 0, self.mask_id, tokens_ExT)
        return jnp.concatenate([hidden_ExKxD, self._hidden_at_places(batch, without_prefix_ExT, K)], axis=-1)

    def _hidden_at_places(self, batch: PairBatch, tokens_ExT: jax.Array, K: int) -> jax.Array:
        hidden_ExTxD = self._apply(tokens_ExT, batch.segment_ids_ExT)
        position_ExK = predictor_positions(batch.places(K), self.shifted)
        return jnp.take_along_axis(hidden_ExTxD, position_ExK[..., None], axis=1)

    def logits(self, hidden_ExCxD: jax.Array) -> jax.Array:
        """Return the raw float32 logits (E, C, V) of some of the states that `hidden` gives."""
        D = self.model_cfg.d_model
        logits_ExCxV = self._apply(hidden_ExCxD[..., :D], method=Transformer.head)
        if not self.guided:
            return logits_ExCxV
        return guide(logits_ExCxV, self._apply(hidden_ExCxD[..., D:], method=Transformer.head), self.guidance)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        return Transformer(self.model_cfg).apply({"params": self.params}, *args, **kwargs)
