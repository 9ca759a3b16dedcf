"""Count the FLOPs that a compiled training step executes, beyond those that `flops.train` credits.

The backward pass computes some results a second time to save memory, the head works in whole chunks, a causal attention
kernel skips tiles, and plain products compute the scores that a sliding window masks. The compile check holds these
counts to the HLO of the compiled program.
"""

import dataclasses

from diffusionlm import flops
from diffusionlm.config import ModelConfig
from diffusionlm.diffusion.cross_entropy import head_chunk, head_turns
from diffusionlm.model.attention_kernels import splash_tile


def train(cfg: ModelConfig, length: int, rows: int = 1, predicted: float = 1.0, splash: bool = False) -> int:
    """Count the executed FLOPs of one training pass (forward and backward) over one sequence of `length` tokens.

    Args:
      cfg: the network.
      length: tokens of the sequence.
      rows: sequences on each device at a time; the head takes their tokens in whole chunks.
      predicted: the share of tokens whose labels are predicted.
      splash: true where attention is the TPU kernel, which keeps no scores.
    """
    parts = flops.forward(_whole(cfg), length)
    local = (rows, length, cfg.head_chunk, predicted)
    projected = head_turns(*local) * head_chunk(*local)
    # Three passes even beside adapters: the loss makes the gradient of the head's matrix in any case.
    head = 3 * 2 * cfg.d_model * cfg.padded_vocab_size * projected // rows
    attention = parts["attention_scores"] + parts["attention_values"]
    kernels = splash_kernels(cfg, length) - 3 * attention if splash else 0
    return flops.train_trunk(cfg, parts) + kernels + _recomputed(cfg, length, parts, splash) + head


def splash_kernels(cfg: ModelConfig, length: int) -> int:
    """Count the FLOPs inside the TPU's attention kernels, of one training pass over one sequence."""
    # Two products forward, and again where the backward pass recomputes the result; 4 and 3 in two backward kernels.
    return (2 + 7 + (2 if cfg.remat in ("dots", "full") else 0)) * _splash_product(cfg, length)


def splash_forward(cfg: ModelConfig, length: int) -> int:
    """Count the FLOPs inside the TPU's attention kernels, of one forward pass over one sequence."""
    return 2 * _splash_product(cfg, length)


def _splash_product(cfg: ModelConfig, length: int) -> int:
    """Count the FLOPs of the scores, or of the weighted values, in the tiles that are not wholly masked."""
    whole = flops.forward(_whole(cfg), length)["attention_scores"]
    return whole * splash_tiles(cfg, length) // (length // splash_tile(length)) ** 2


def splash_tiles(cfg: ModelConfig, length: int) -> int:
    """Return how many tiles of the scores of one head the TPU's attention kernel computes."""
    size = splash_tile(length)
    side = length // size
    if not cfg.causal:
        return side * side
    # The key of the tile that is closest to a query of it lies so many positions before; 0 on the diagonal.
    distances = [0] + [(below - 1) * size + 1 for below in range(1, side)]
    window = cfg.sliding_window or length
    return sum(side - below for below, distance in enumerate(distances) if distance < window)


def _whole(cfg: ModelConfig) -> ModelConfig:
    """Return the network without a window: plain products compute all scores, and mask them."""
    return dataclasses.replace(cfg, sliding_window=0)


def _recomputed(cfg: ModelConfig, length: int, parts: dict[str, int], splash: bool) -> int:
    """Count what the backward pass computes a second time, outside the kernels."""
    scores, values = parts["attention_scores"], parts["attention_values"]
    # The policies keep the results of matmuls with weights, or attention's result, for which scores are made again.
    attention = {"none": 0, "dots": scores + values, "attention": scores, "full": scores + values}[cfg.remat]
    weights = 0
    if cfg.remat in ("attention", "full"):
        # Everything but the last matmul of a block: its result only enters a sum, so no gradient asks for it.
        down = 2 * length * cfg.d_model * (cfg.d_ff + cfg.lora_rank) * cfg.n_layers
        weights = sum(parts.values()) - parts["head"] - scores - values - down
    return weights + (0 if splash else attention)
