"""LLaDA's generation loop (arXiv 2502.09992) in plain PyTorch, to compare with.

A PyTorch user would write it like this from the paper: a Python loop over steps that each predict the whole canvas.
Needs `torch`.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

# tokens (B, T), positions of the active block (T,), reveals per row (B,), the most of them -> tokens (B, T)
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def generate(
    step: Step, prompts_BxP: torch.Tensor, length: int, steps: int, block_length: int, mask_id: int
) -> torch.Tensor:
    """Generate as LLaDA at temperature 0, with low-confidence remasking and without guidance.

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
    """Return an even share of a block's masks for each of its steps, the remainder going first. int64 (B, steps)."""
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
    """Predict the whole canvas, and reveal the most confident masks of the active block.

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
