"""The network of `diffusionlm.model.transformer` in plain PyTorch, to compare with.

What a PyTorch user would write from SMDM's shapes: a module per block, `scaled_dot_product_attention`, float32. Needs
`torch`.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from diffusionlm.config import ModelConfig
from diffusionlm.errors import UserError


class Block(nn.Module):
    """Pre-norm attention with rotary positions and a SwiGLU MLP, each added to the residual stream."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        D, F_, K = cfg.d_model, cfg.d_ff, cfg.head_dim
        self.head_dim = K
        self.attention_norm = nn.RMSNorm(D, eps=cfg.norm_eps)
        self.q = nn.Linear(D, cfg.n_heads * K, bias=False)
        self.k = nn.Linear(D, cfg.n_kv_heads * K, bias=False)
        self.v = nn.Linear(D, cfg.n_kv_heads * K, bias=False)
        self.o = nn.Linear(cfg.n_heads * K, D, bias=False)
        self.mlp_norm = nn.RMSNorm(D, eps=cfg.norm_eps)
        self.gate = nn.Linear(D, F_, bias=False)
        self.up = nn.Linear(D, F_, bias=False)
        self.down = nn.Linear(F_, D, bias=False)

    def forward(self, x_BxTxD: torch.Tensor, cos_TxJ: torch.Tensor, sin_TxJ: torch.Tensor) -> torch.Tensor:
        B, T, _ = x_BxTxD.shape
        h_BxTxD = self.attention_norm(x_BxTxD)
        q_BxHxTxK, k_BxGxTxK, v_BxGxTxK = (
            linear(h_BxTxD).view(B, T, -1, self.head_dim).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        q_BxHxTxK, k_BxGxTxK = _rotate(q_BxHxTxK, cos_TxJ, sin_TxJ), _rotate(k_BxGxTxK, cos_TxJ, sin_TxJ)
        grouped = q_BxHxTxK.shape[1] != k_BxGxTxK.shape[1]
        out_BxHxTxK = F.scaled_dot_product_attention(q_BxHxTxK, k_BxGxTxK, v_BxGxTxK, enable_gqa=grouped)
        x_BxTxD = x_BxTxD + self.o(out_BxHxTxK.transpose(1, 2).reshape(B, T, -1))
        h_BxTxD = self.mlp_norm(x_BxTxD)
        return x_BxTxD + self.down(F.silu(self.gate(h_BxTxD)) * self.up(h_BxTxD))


class Transformer(nn.Module):
    """Tokens to final hidden states (`hidden`) and to logits (`forward`) over the vocabulary, without padding rows."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        if (cfg.norm, cfg.positions, cfg.mlp, cfg.causal) != ("rmsnorm", "rope", "swiglu", False) or (
            cfg.linear_bias or cfg.qkv_bias or cfg.tied_head or cfg.rope_bf16_tables or not cfg.mask_row
        ):
            raise UserError("the PyTorch port knows SMDM's kind of network only; take a preset smdm_*")
        self.embed = nn.Embedding(cfg.embedding_rows, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.final_norm = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps)
        # No column for the mask, as in SMDM: it cannot be predicted.
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        frequencies_J = cfg.rope_theta ** (-np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
        angles_TxJ = torch.outer(torch.arange(cfg.max_length).float(), torch.from_numpy(frequencies_J).float())
        self.register_buffer("cos_TxJ", angles_TxJ.cos())
        self.register_buffer("sin_TxJ", angles_TxJ.sin())

    def hidden(self, tokens_BxT: torch.Tensor) -> torch.Tensor:
        """Final hidden states (B, T, d_model) of int64 ids."""
        T = tokens_BxT.shape[1]
        x_BxTxD = self.embed(tokens_BxT)
        for block in self.blocks:
            x_BxTxD = block(x_BxTxD, self.cos_TxJ[:T], self.sin_TxJ[:T])
        return self.final_norm(x_BxTxD)

    def forward(self, tokens_BxT: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, vocab_size) of int64 ids."""
        return self.head(self.hidden(tokens_BxT))


def from_params(params: Any, cfg: ModelConfig) -> Transformer:
    """The network with the parameters of `diffusionlm.model.Transformer(cfg)`, a tree of arrays."""
    blocks = params["blocks"]
    state = {
        "embed.weight": _tensor(params["embed"])[: cfg.embedding_rows],
        "final_norm.weight": _tensor(params["final_norm"]["scale"]),
        "head.weight": _tensor(params["head"])[:, : cfg.vocab_size].T,
    }
    for i in range(cfg.n_layers):
        for name in ("attention_norm", "mlp_norm"):
            state[f"blocks.{i}.{name}.weight"] = _tensor(blocks[name]["scale"][i])
        for name in ("q", "k", "v", "gate", "up"):  # (inputs, *outputs)
            state[f"blocks.{i}.{name}.weight"] = _tensor(blocks[name][i]).flatten(1).T
        for name in ("o", "down"):  # (*inputs, outputs)
            state[f"blocks.{i}.{name}.weight"] = _tensor(blocks[name][i]).flatten(0, -2).T
    model = Transformer(cfg)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == {"cos_TxJ", "sin_TxJ"}, (missing, unexpected)
    return model


def _rotate(x_BxHxTxK: torch.Tensor, cos_TxJ: torch.Tensor, sin_TxJ: torch.Tensor) -> torch.Tensor:
    first, second = x_BxHxTxK.chunk(2, dim=-1)
    return torch.cat([first * cos_TxJ - second * sin_TxJ, second * cos_TxJ + first * sin_TxJ], dim=-1)


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32))  # a copy, because JAX's arrays are read-only
