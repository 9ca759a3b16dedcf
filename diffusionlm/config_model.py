"""The settings of a network. This module imports no JAX."""

from dataclasses import dataclass
from typing import Annotated, Literal

from diffusionlm.config_fields import (
    AtLeastOneReal,
    Canonical,
    Hint,
    NonNegative,
    NonNegativeReal,
    Positive,
    PositiveReal,
    check_fields,
    later,
    op,
)
from diffusionlm.errors import UserError

VOCAB_MULTIPLE = 128  # embedding and head rows are padded to this, on every mesh, so checkpoints fit every mesh


@dataclass(frozen=True)
class RopeScaling(Canonical):
    """A change of the rotary frequencies for texts that are longer than those the model was first trained on.

    The kinds are those of Hugging Face's transformers, and so are the names of their numbers; the defaults are those of
    LLaMA 3.1 and of the YaRN paper.
    """

    # linear: all frequencies are divided by the factor. dynamic: the base grows with texts beyond the original length
    # (NTK). llama3: low frequencies are divided (LLaMA 3.1). yarn: the same, another ramp (2309.00071)
    kind: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    factor: AtLeastOneReal = 8.0  # how many times longer texts may be
    original_length: Positive = 8192  # longest text of the first training; all kinds but linear use it
    low_freq_factor: PositiveReal = 1.0  # llama3: frequencies with fewer turns in the original length are divided
    high_freq_factor: PositiveReal = 4.0  # llama3: frequencies with more turns stay as they are
    beta_fast: PositiveReal = 32.0  # yarn: frequencies with more turns stay as they are
    beta_slow: PositiveReal = 1.0  # yarn: frequencies with fewer turns are divided
    attention_factor: NonNegativeReal = 0.0  # yarn: multiplies queries and keys; 0: 1 + ln(factor) / 10

    def validate(self, theta: float, head_dim: int) -> None:
        """Raise `UserError` for numbers that contradict one another, or the base and the width of heads."""
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"model.rope_scaling.low_freq_factor={self.low_freq_factor} must be below "
                f"model.rope_scaling.high_freq_factor={self.high_freq_factor}"
            )
        if self.kind == "yarn" and not self.beta_slow < self.beta_fast:
            raise UserError(
                f"model.rope_scaling.beta_slow={self.beta_slow} must be below "
                f"model.rope_scaling.beta_fast={self.beta_fast}"
            )
        if self.kind == "yarn" and not theta > 1:
            raise UserError(f"model.rope_theta={theta} must exceed 1 for model.rope_scaling.kind=yarn")
        if self.kind == "dynamic" and head_dim < 4:
            raise UserError(f"model.head_dim={head_dim} must be at least 4 for model.rope_scaling.kind=dynamic")


@dataclass(frozen=True)
class ModelConfig(Canonical):
    """The Transformer trunk that masked diffusion models and their autoregressive twins share."""

    d_model: Positive = 256  # width of the residual stream
    n_layers: Positive = 6  # number of blocks
    n_heads: Positive = 4  # query heads
    n_kv_heads: Positive = 4  # key/value heads; fewer than n_heads is grouped-query attention
    head_dim: Positive = 64  # width of one head
    d_ff: Positive = 1024  # hidden width of the MLP
    # tokens that the model can be asked to predict (the published vocabulary, without padding rows)
    vocab_size: Positive = 32000
    mask_row: bool = True  # append one input row, id = vocab_size, for [MASK]; it is never predicted
    max_length: Positive = 2048  # longest sequence the positions are meant for
    causal: bool = False  # causal attention (autoregressive twin) instead of full attention
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # layernorm has a bias
    norm_eps: PositiveReal = 1e-5  # added to the mean square (rmsnorm) or variance (layernorm)
    positions: Literal["rope", "learned"] = "rope"  # rotary (half-split) or a learned table
    rope_theta: AtLeastOneReal = 10000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling = later(RopeScaling())  # how these change for texts longer than those of training
    rope_bf16_tables: bool = False  # round cos/sin to bfloat16, as SMDM's released models do
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # gated SiLU, or two matrices with tanh-approximated GELU
    linear_bias: bool = False  # biases on every linear layer but the head (GPT-2)
    qkv_bias: bool = False  # biases on q, k and v only (Qwen2, Dream)
    tied_head: bool = False  # the head is the transposed embedding
    qk_norm: bool = later(False)  # RMSNorm on each head's queries and keys, before they are rotated (Qwen3)
    # a position attends to this many newest ones, itself among them (Mistral); causal models only
    sliding_window: Annotated[NonNegative, Hint("0 attends to all")] = later(0)
    # rank of low-rank adapters on every matrix of the blocks (LoRA); then only they and the embedding are trained; 0:
    # everything is trained
    lora_rank: Annotated[NonNegative, Hint("0 trains everything")] = 0
    dtype: Literal["bfloat16", "float32"] = "float32"  # activations and matmuls; parameters are float32
    # what the backward pass recomputes: nothing, all but matmuls with weights, all but attention's result, everything
    remat: Literal["none", "dots", "attention", "full"] = op("none")
    head_chunk: Positive = op(2048)  # most tokens on each device that are projected to the vocabulary at a time

    @property
    def embedding_rows(self) -> int:
        """The input rows as published: the vocabulary and, if any, the appended mask row."""
        return self.vocab_size + int(self.mask_row)

    @property
    def padded_vocab_size(self) -> int:
        """The rows of the embedding and columns of the head as stored, a multiple of 128."""
        return -(-self.embedding_rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def validate(self) -> None:
        """Raise `UserError` for fields out of range, or that contradict one another."""
        check_fields(self, "model.")
        if self.lora_rank > self.d_model:
            raise UserError(
                f"model.lora_rank={self.lora_rank} must not exceed model.d_model={self.d_model}; 0 trains everything"
            )
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"model.n_kv_heads={self.n_kv_heads} must divide model.n_heads={self.n_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(
                f"model.head_dim={self.head_dim} must be even for rotary positions; use an even width or "
                "model.positions=learned"
            )
        self._validate_attention()

    def _validate_attention(self) -> None:
        """Check scaled rotary positions, norms of queries and keys, and windows against the rest."""
        if self.positions != "rope" and self.rope_scaling.kind != "none":
            raise UserError(
                f"model.rope_scaling.kind={self.rope_scaling.kind} is for model.positions=rope, not {self.positions}"
            )
        self.rope_scaling.validate(self.rope_theta, self.head_dim)
        if self.qk_norm and self.norm != "rmsnorm":
            raise UserError(f"model.qk_norm=True needs model.norm=rmsnorm, not {self.norm}")
        if self.sliding_window and not self.causal:
            raise UserError(
                f"model.sliding_window={self.sliding_window} is for causal models (model.causal=True); set it to 0 for "
                "full attention"
            )
