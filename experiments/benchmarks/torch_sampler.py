"""The network of `diffusionlm.model` and LLaDA's generation loop (arXiv 2502.09992) in plain PyTorch, to compare with.

What a PyTorch user would write from the paper and SMDM's shapes: a module per block, `scaled_dot_product_attention`,
float32, and a Python loop over the steps, each of which predicts the whole canvas. Needs `torch`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from diffusionlm.config import ModelConfig
from diffusionlm.errors import UserError

# tokens (B, T), positions of the active block (T,), reveals per row (B,), the most of them -> tokens (B, T)
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


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
    return model.eval()


def generate(
    step: Step, prompts_BxP: torch.Tensor, length: int, steps: int, block_length: int, mask_id: int
) -> torch.Tensor:
    """LLaDA's generation at temperature 0, with low-confidence remasking and without guidance.

    Args:
      step: `one_step` with its network, compiled or not.
      prompts_BxP: int64 ids without masks.
      length: new tokens a prompt, a multiple of `block_length`.
      steps: network evaluations over all blocks, a multiple of their number.
      block_length: new tokens a block; blocks are filled from left to right.
      mask_id: the mask.

    Returns:
      The new tokens, int64 (B, length).
    """
    B, P = prompts_BxP.shape
    blocks = length // block_length
    assert length % block_length == 0 and steps % blocks == 0
    with torch.inference_mode():
        tokens_BxT = F.pad(prompts_BxP, (0, length), value=mask_id)
        positions_T = torch.arange(P + length)
        for block in range(blocks):
            first = P + block * block_length
            in_block_T = (positions_T >= first) & (positions_T < first + block_length)
            masks_B = ((tokens_BxT == mask_id) & in_block_T).sum(-1)
            for counts_B in transfer_counts(masks_B, steps // blocks).unbind(1):
                tokens_BxT = step(tokens_BxT, in_block_T, counts_B, int(counts_B.max()))
        return tokens_BxT[:, P:]


def transfer_counts(masks_B: torch.Tensor, steps: int) -> torch.Tensor:
    """An even share of a block's masks for each of its steps, the remainder going first. int64 (B, steps)."""
    share_Bx1, rest_Bx1 = (masks_B // steps)[:, None], (masks_B % steps)[:, None]
    return share_Bx1 + (torch.arange(steps) < rest_Bx1).long()


def one_step(
    network: Callable[[torch.Tensor], torch.Tensor],
    mask_id: int,
    tokens_BxT: torch.Tensor,
    in_block_T: torch.Tensor,
    counts_B: torch.Tensor,
    most: int,
) -> torch.Tensor:
    """Predicts the whole canvas, and reveals the most confident masks of the active block.

    Args:
      network: tokens (B, T) -> logits (B, T, V).
      mask_id: the mask.
      tokens_BxT: the canvas.
      in_block_T: bool, the active block.
      counts_B: how many masks each row reveals.
      most: the largest of them.

    Returns:
      The canvas after the step, int64 (B, T).
    """
    logits_BxTxV = network(tokens_BxT)
    proposal_BxT = logits_BxTxV.argmax(-1)
    p_BxTxV = F.softmax(logits_BxTxV, dim=-1)
    confidence_BxT = p_BxTxV.gather(-1, proposal_BxT[..., None])[..., 0]
    confidence_BxT = confidence_BxT.where((tokens_BxT == mask_id) & in_block_T, -torch.inf)
    best_BxN = confidence_BxT.topk(most, dim=-1).indices
    # A row may reveal fewer than the row that reveals most.
    kept_BxN = torch.arange(most, device=tokens_BxT.device) < counts_B[:, None]
    reveal_BxT = torch.zeros_like(tokens_BxT, dtype=torch.bool).scatter(1, best_BxN, kept_BxN)
    return proposal_BxT.where(reveal_BxT, tokens_BxT)


def _rotate(x_BxHxTxK: torch.Tensor, cos_TxJ: torch.Tensor, sin_TxJ: torch.Tensor) -> torch.Tensor:
    first, second = x_BxHxTxK.chunk(2, dim=-1)
    return torch.cat([first * cos_TxJ - second * sin_TxJ, second * cos_TxJ + first * sin_TxJ], dim=-1)


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32))  # a copy, because JAX's arrays are read-only
