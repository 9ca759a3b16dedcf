"""Count what a model costs from its config alone: parameters, floating-point operations and bytes.

XLA's own count sees the body of a scan once, however many layers it runs, and nothing inside a custom kernel, so
budgets and MFU come from here. The tests hold these formulas to the matmuls of the traced model, exactly.
`compile_check.executed_flops` adds what the compiled program computes beyond them. This module imports no JAX.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from diffusionlm.config import ModelConfig, OptimConfig
from diffusionlm.errors import UserError

Convention = Literal["6nd", "model"]


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; all but `stored` leave out the rows that pad the vocabulary."""

    total: int  # as published
    non_embedding: int  # blocks and final norm: the N of SMDM (2410.18514) and LLaDA (2502.09992)
    embedding: int  # input rows, with the mask row and the learned positions if any
    head: int  # 0 where it is the transposed embedding
    stored: int  # what is in memory: `total`, the padding rows and adapters
    trained: int  # the part of `stored` that has gradients: all of it, or adapters and the embedding


@dataclass(frozen=True)
class Memory:
    """Bytes that training holds on each device throughout; `diffusionlm compile` counts activations too."""

    params: int
    optimizer: int
    gradients: int

    @property
    def total(self) -> int:
        """The sum of all three."""
        return self.params + self.optimizer + self.gradients


def parameters(cfg: ModelConfig) -> Parameters:
    """Count the parameters of `cfg` as its paper does."""
    d, q, kv = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    matrices_in = 2 if cfg.mlp == "swiglu" else 1  # gate and up, or up alone
    block = d * (q + 2 * kv) + q * d + (matrices_in + 1) * d * cfg.d_ff  # q, k, v; out; MLP
    if cfg.linear_bias or cfg.qkv_bias:
        block += q + 2 * kv
    if cfg.linear_bias:
        block += d + matrices_in * cfg.d_ff + d  # out; gate and up; down
    norm = d * (2 if cfg.norm == "layernorm" else 1)  # gain, and bias if any
    head_norms = 2 * cfg.head_dim if cfg.qk_norm else 0  # one gain for all queries and one for all keys
    non_embedding = (
        cfg.n_layers * (block + 2 * norm + head_norms) + norm
    )  # SMDM: layers*(4dd + 3d*ffn) + (2*layers + 1)*d
    positions = cfg.max_length * d if cfg.positions == "learned" else 0
    embedding = cfg.embedding_rows * d + positions
    head = 0 if cfg.tied_head else cfg.vocab_size * d
    vocab_matrices = 1 if cfg.tied_head else 2
    adapters = cfg.n_layers * cfg.lora_rank * _adapter_width(cfg)
    stored = non_embedding + positions + vocab_matrices * cfg.padded_vocab_size * d + adapters
    trained = cfg.padded_vocab_size * d + adapters if cfg.lora_rank else stored
    return Parameters(non_embedding + embedding + head, non_embedding, embedding, head, stored, trained)


def _adapter_width(cfg: ModelConfig) -> int:
    """Return the inputs and outputs of a block's matrices, summed: the parameters of its adapters at rank 1."""
    d, q, kv = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    matrices = 3 if cfg.mlp == "swiglu" else 2
    return (d + q) + 2 * (d + kv) + (q + d) + matrices * (d + cfg.d_ff)  # q; k and v; out; MLP


def forward(cfg: ModelConfig, length: int) -> dict[str, int]:
    """Count the FLOPs of the matmuls of one forward pass over one sequence of `length` tokens, by part.

    An (m, k) by (k, n) matmul is 2*m*k*n FLOPs. Attention is length x length even where it is causal, as PaLM
    (2204.02311, appendix B) counts it and as the reference implementation runs it; a kernel that skips the masked half
    still gets credit for the whole. With a sliding window each query counts as many keys as the window is wide, also
    the first ones, which have fewer. The head is as wide as it is stored. The embedding look-up is not a matmul.
    """
    d, q, kv = cfg.d_model, cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    keys = min(length, cfg.sliding_window or length)
    layer = {
        "qkv": 2 * length * d * (q + 2 * kv),
        "attention_scores": 2 * length * keys * q,  # every query head meets every key; its head_dim is contracted
        "attention_values": 2 * length * keys * q,
        "out": 2 * length * q * d,
        "mlp": 2 * length * d * cfg.d_ff * (3 if cfg.mlp == "swiglu" else 2),
        "adapters": 2 * length * cfg.lora_rank * _adapter_width(cfg),
    }
    head = 2 * length * d * cfg.padded_vocab_size
    return {part: cfg.n_layers * count for part, count in layer.items()} | {"head": head}


def train(cfg: ModelConfig, length: int, convention: Convention, predicted: float = 1.0) -> int:
    """Count the FLOPs of one training pass (forward and backward) over one sequence of `length` tokens.

    "6nd" is the budget of SMDM (2410.18514) and LLaDA (2502.09992): 6 per non-embedding parameter and token, with
    neither attention nor head. "model" is three times `forward`, because the gradients of both factors of a matmul cost
    as much again each, and every factor of every matmul here needs its gradient (the first layer's inputs for the
    embedding); only weights that have adapters have none.

    Args:
      cfg: the network.
      length: tokens of the sequence.
      convention: "6nd" or "model".
      predicted: the share of tokens whose labels are predicted; the head need not look at the others. 1 gives "model"
        as papers count it, the objective's own share gives what MFU credits.

    Raises:
      UserError: an unknown convention.
    """
    if convention == "6nd":
        return 6 * parameters(cfg).non_embedding * length
    if convention != "model":
        raise UserError(f"unknown FLOP convention {convention!r}; use one of {', '.join(get_args(Convention))}")
    parts = forward(cfg, length)
    head_passes = 2 if cfg.lora_rank and not cfg.tied_head else 3  # the head beside adapters is not trained
    return train_trunk(cfg, parts) + round(head_passes * predicted * parts["head"])


def train_trunk(cfg: ModelConfig, parts: dict[str, int]) -> int:
    """Return the part of the "model" convention's FLOPs outside the head.

    Args:
      cfg: the network.
      parts: the result of `forward` for the same network.
    """
    trunk = 3 * (sum(parts.values()) - parts["head"])
    # Weights that have adapters have no gradient.
    return trunk - (parts["qkv"] + parts["out"] + parts["mlp"] if cfg.lora_rank else 0)


def memory(cfg: ModelConfig, optim: OptimConfig, shards: int = 1) -> Memory:
    """Count the bytes of the training state on each device, with every tensor split evenly over `shards` devices.

    The state is float32, except for the first of Adam's two moments if so configured: the parameters, the moments, and
    one set of gradients (accumulation holds a second one for a while). Norm gains, and what a mesh axis does not
    divide, are not split over it and cost more than counted here.
    """
    counts = parameters(cfg)
    stored, trained = -(-counts.stored // shards), -(-counts.trained // shards)
    first_moment = 2 if optim.first_moment_dtype == "bfloat16" else 4
    return Memory(params=4 * stored, optimizer=(first_moment + 4) * trained, gradients=4 * trained)
