"""What a model costs, counted from its config alone: parameters, floating-point operations and bytes.

XLA's own count sees the body of a scan once, however many layers it runs, and nothing inside a custom kernel, so
budgets and MFU come from here. The tests hold these formulas to the matmuls of the traced model, exactly. This module
imports no JAX.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from diffusionlm.config import ModelConfig, OptimConfig
from diffusionlm.errors import UserError

Convention = Literal["6nd", "model", "executed"]
SPLASH_LENGTHS = 128  # the TPU's attention kernel takes multiples of it


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; all but `stored` leave out the rows that pad the vocabulary."""

    total: int  # as published
    non_embedding: int  # blocks and final norm: the N of SMDM (2410.18514) and LLaDA (2502.09992)
    embedding: int  # input rows, with the mask row and the learned positions if any
    head: int  # 0 where it is the transposed embedding
    stored: int  # what is in memory: `total`, the padding rows and adapters
    trained: int  # of `stored`, what has gradients: all, or with adapters these and the embedding


@dataclass(frozen=True)
class Memory:
    """Bytes on each device for as long as training runs; activations come on top, `diffusionlm compile` knows them."""

    params: int
    optimizer: int
    gradients: int

    @property
    def total(self) -> int:
        return self.params + self.optimizer + self.gradients


def parameters(cfg: ModelConfig) -> Parameters:
    """Counts the parameters of `cfg` as its paper does."""
    d, q, kv = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    matrices_in = 2 if cfg.mlp == "swiglu" else 1  # gate and up, or up alone
    block = d * (q + 2 * kv) + q * d + (matrices_in + 1) * d * cfg.d_ff  # q, k, v; out; MLP
    if cfg.linear_bias or cfg.qkv_bias:
        block += q + 2 * kv
    if cfg.linear_bias:
        block += d + matrices_in * cfg.d_ff + d  # out; gate and up; down
    norm = d * (2 if cfg.norm == "layernorm" else 1)  # gain, and bias if any
    non_embedding = cfg.n_layers * (block + 2 * norm) + norm  # SMDM: layers*(4dd + 3d*ffn) + (2*layers + 1)*d
    positions = cfg.max_length * d if cfg.positions == "learned" else 0
    embedding = cfg.embedding_rows * d + positions
    head = 0 if cfg.tied_head else cfg.vocab_size * d
    vocab_matrices = 1 if cfg.tied_head else 2
    adapters = cfg.n_layers * cfg.lora_rank * _ends(cfg)
    stored = non_embedding + positions + vocab_matrices * cfg.padded_vocab_size * d + adapters
    trained = cfg.padded_vocab_size * d + adapters if cfg.lora_rank else stored
    return Parameters(non_embedding + embedding + head, non_embedding, embedding, head, stored, trained)


def _ends(cfg: ModelConfig) -> int:
    """Inputs and outputs of the matrices of a block, summed: what each unit of an adapter's rank holds."""
    d, q, kv = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    matrices = 3 if cfg.mlp == "swiglu" else 2
    return (d + q) + 2 * (d + kv) + (q + d) + matrices * (d + cfg.d_ff)  # q; k and v; out; MLP


def forward(cfg: ModelConfig, length: int) -> dict[str, int]:
    """FLOPs of the matmuls of one forward pass over one sequence of `length` tokens, by part.

    An (m, k) by (k, n) matmul is 2*m*k*n FLOPs. Attention is length x length also where it is causal, as PaLM
    (2204.02311, appendix B) counts it and as the reference implementation runs it; a kernel that skips the masked half
    still gets credit for the whole. The head is as wide as it is stored. The embedding look-up is no matmul.
    """
    d, q, kv = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    layer = {
        "qkv": 2 * length * d * (q + 2 * kv),
        "attention_scores": 2 * length * length * q,  # every query head meets every key; its head_dim is contracted
        "attention_values": 2 * length * length * q,
        "out": 2 * length * q * d,
        "mlp": 2 * length * d * cfg.d_ff * (3 if cfg.mlp == "swiglu" else 2),
        "adapters": 2 * length * cfg.lora_rank * _ends(cfg),
    }
    head = 2 * length * d * cfg.padded_vocab_size
    return {part: cfg.n_layers * count for part, count in layer.items()} | {"head": head}


def train(
    cfg: ModelConfig,
    length: int,
    convention: Convention,
    rows: int = 1,
    predicted: float = 1.0,
    splash: bool = False,
) -> int:
    """FLOPs of one training pass (forward and backward) over one sequence of `length` tokens.

    "6nd" is the budget of SMDM (2410.18514) and LLaDA (2502.09992): 6 per non-embedding parameter and token, with
    neither attention nor head. "model" is three times `forward`, because the gradients of both factors of a matmul cost
    as much again each, and every factor of every matmul here needs its gradient (the first layer's inputs for the
    embedding); only weights that have adapters have none. "executed" is what runs: with what the backward pass computes
    a second time to save memory, and the head in whole chunks, where each device holds `rows` such sequences at a time.

    Args:
      cfg: the network.
      length: tokens of the sequence.
      convention: of the three.
      rows: sequences on each device; only "executed" looks at it.
      predicted: the share of tokens whose labels are predicted; the head need not look at the others. 1 gives "model"
        as papers count it, the objective's own share what MFU credits.
      splash: whether attention is the TPU kernel, which keeps no scores; only "executed" looks at it.
    """
    if convention == "6nd":
        return 6 * parameters(cfg).non_embedding * length
    parts = forward(cfg, length)
    trunk, head_passes = 3 * (sum(parts.values()) - parts["head"]), 3
    if cfg.lora_rank:
        trunk -= parts["qkv"] + parts["out"] + parts["mlp"]
        head_passes = 3 if cfg.tied_head else 2  # executed are 3: the loss makes the head's gradient in any case
    if convention == "model":
        return trunk + round(head_passes * predicted * parts["head"])
    if convention == "executed":
        local = (rows, length, cfg.head_chunk, predicted)
        projected = head_turns(*local) * head_chunk(*local)
        head = 3 * 2 * cfg.d_model * cfg.padded_vocab_size * projected // rows
        attention = parts["attention_scores"] + parts["attention_values"]
        kernels = splash_kernels(cfg, length) - 3 * attention if splash else 0
        return trunk + kernels + _recomputed(cfg, length, parts, splash) + head
    raise UserError(f"unknown FLOP convention {convention!r}; use one of {', '.join(get_args(Convention))}")


def slowest_share(rows: int, share: float) -> float:
    """The share of predicted tokens on the slowest of many devices with so many rows each.

    Antithetic times keep pairs of rows close to the mean; a row without its partner may be predicted whole somewhere,
    and the others wait for that device.
    """
    return share if rows % 2 == 0 else min(1.0, share * (rows + 1) / rows)


def head_chunk(rows: int, length: int, most: int, share: float) -> int:
    """How many of its tokens a device with so many rows takes through the vocabulary at a time.

    What the slowest device has to predict where `share` is the mean, and an eighth more, goes into as few equal chunks
    of at most `most` tokens as it can.
    """
    tokens = rows * length
    usual = min(tokens, math.ceil(tokens * slowest_share(rows, share) * 9 / 8))
    return -(-usual // -(-usual // most))


def head_turns(rows: int, length: int, most: int, share: float) -> int:
    """How many such chunks the slowest device has."""
    return math.ceil(rows * length * slowest_share(rows, share) / head_chunk(rows, length, most, share))


def splash_tile(length: int) -> int:
    """Queries and keys that splash attention takes at a time: the most that divide the length, up to 512."""
    return next(n for n in range(min(length, 512), 0, -SPLASH_LENGTHS) if length % n == 0)


def splash_kernels(cfg: ModelConfig, length: int) -> int:
    """The part of "executed" that is inside of the TPU's attention kernels, of one training pass over one sequence.

    Causal models skip the tiles that lie wholly behind the mask.
    """
    product = forward(cfg, length)["attention_scores"]
    # Two products forward, and again where the backward pass makes the result anew; 4 and 3 in two backward kernels.
    products = 2 + 7 + (2 if cfg.remat in ("dots", "full") else 0)
    tiles = length // splash_tile(length)
    return products * product * (tiles + 1) // (2 * tiles) if cfg.causal else products * product


def _recomputed(cfg: ModelConfig, length: int, parts: dict[str, int], splash: bool) -> int:
    """What the backward pass makes a second time, without what is inside of the kernels."""
    scores, values = parts["attention_scores"], parts["attention_values"]
    # The policies keep what matmuls with weights give, or attention's result, for which scores are made again.
    attention = {"none": 0, "dots": scores + values, "attention": scores, "full": scores + values}[cfg.remat]
    weights = 0
    if cfg.remat in ("attention", "full"):
        # Everything but the last matmul of a block: its result only enters a sum, so no gradient asks for it.
        down = 2 * length * cfg.d_model * (cfg.d_ff + cfg.lora_rank) * cfg.n_layers
        weights = sum(parts.values()) - parts["head"] - scores - values - down
    return weights + (0 if splash else attention)


def memory(cfg: ModelConfig, optim: OptimConfig, shards: int = 1) -> Memory:
    """Bytes of the training state on each device, with every tensor split evenly over `shards` devices.

    It is float32, the first of Adam's two moments if so configured: the parameters, the moments, and one set of
    gradients (accumulation holds a second one for a while). Norm gains and what a mesh axis does not divide are not
    split over it, and cost more than said here.
    """
    counted = parameters(cfg)
    stored, trained = -(-counted.stored // shards), -(-counted.trained // shards)
    first = 2 if optim.first_moment_dtype == "bfloat16" else 4
    return Memory(params=4 * stored, optimizer=(first + 4) * trained, gradients=4 * trained)
