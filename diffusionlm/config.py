"""Every setting of a run, as frozen dataclasses: the single source of truth for the command line, JSON and checkpoints.

A field made with `op(...)` is operational (paths, mesh, logging, memory trade-offs): changing it must not change the
science, so it stays out of `fingerprint`. Everything else is scientific; a field that came when runs had fingerprints
already is made with `later(...)`. This module imports no JAX.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusionlm.errors import UserError

VOCAB_MULTIPLE = 128  # embedding and head rows are padded to this, on every mesh, so checkpoints fit every mesh
PROMPT, ANSWER = 1, 2  # segment ids with data.packing=examples; 0 is the padding behind them


def op(default: Any) -> Any:
    """A dataclass field that is not part of the scientific identity of a run."""
    return field(default=default, metadata={"operational": True})


def later(default: Any) -> Any:
    """A scientific field that fingerprints leave out at its default, so that those of earlier runs stay as they are."""
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer trunk that masked diffusion models and their autoregressive twins share."""

    d_model: int = 256  # width of the residual stream
    n_layers: int = 6  # number of blocks
    n_heads: int = 4  # query heads
    n_kv_heads: int = 4  # key/value heads; fewer than n_heads is grouped-query attention
    head_dim: int = 64  # width of one head
    d_ff: int = 1024  # hidden width of the MLP
    # tokens that the model can be asked to predict (the published vocabulary, without padding rows)
    vocab_size: int = 32000
    mask_row: bool = True  # append one input row, id = vocab_size, for [MASK]; it is never predicted
    max_length: int = 2048  # longest sequence the positions are meant for
    causal: bool = False  # causal attention (autoregressive twin) instead of full attention
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # layernorm has a bias
    norm_eps: float = 1e-5  # added to the mean square (rmsnorm) or variance (layernorm)
    positions: Literal["rope", "learned"] = "rope"  # rotary (half-split) or a learned table
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_bf16_tables: bool = False  # round cos/sin to bfloat16, as SMDM's released models do
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # gated SiLU, or two matrices with tanh-approximated GELU
    linear_bias: bool = False  # biases on every linear layer but the head (GPT-2)
    qkv_bias: bool = False  # biases on q, k and v only (Qwen2, Dream)
    tied_head: bool = False  # the head is the transposed embedding
    # rank of low-rank adapters on every matrix of the blocks (LoRA): they and the embedding are trained, nothing else;
    # 0: everything is trained
    lora_rank: int = later(0)
    dtype: Literal["bfloat16", "float32"] = "float32"  # activations and matmuls; parameters are float32
    # what the backward pass recomputes: nothing, all but matmuls with weights, all but attention's result, everything
    remat: Literal["none", "dots", "attention", "full"] = op("none")
    head_chunk: int = op(2048)  # most tokens on each device that are projected to the vocabulary at a time

    @property
    def embedding_rows(self) -> int:
        """Input rows as published: the vocabulary and, if any, the appended mask row."""
        return self.vocab_size + int(self.mask_row)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and columns of the head as stored, a multiple of 128."""
        return -(-self.embedding_rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def validate(self) -> None:
        for name in (
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "d_ff",
            "vocab_size",
            "max_length",
            "head_chunk",
        ):
            _positive("model." + name, getattr(self, name))
        if not 0 <= self.lora_rank <= self.d_model:
            raise UserError(
                f"model.lora_rank={self.lora_rank} must lie in [0, model.d_model={self.d_model}]; 0 trains everything"
            )
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be positive")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"model.n_kv_heads={self.n_kv_heads} must divide model.n_heads={self.n_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(
                f"model.head_dim={self.head_dim} must be even for rotary positions; use an even width or "
                "model.positions=learned"
            )


@dataclass(frozen=True)
class DiffusionConfig:
    """The forward (masking) process and the bound that is trained."""

    # linear, cosine, polynomial or geometric: alpha(t), the probability that a token is still clean at time t
    schedule: str = "linear"
    polynomial_power: float = 2.0  # k of alpha(t) = 1 - t**k
    geometric_min: float = 1e-4  # sigma_min of alpha(t) = exp(-sigma_min**(1-t) * sigma_max**t)
    geometric_max: float = 20.0  # sigma_max of the same
    t_min: float = 1e-3  # times below this become one reconstruction step (the bound stays a bound)
    timesteps: int = 0  # 0: continuous time; T > 0: the discrete-time bound with T steps
    # antithetic: stratified over the batch in pairs (u, 1-u)
    time_sampling: Literal["iid", "stratified", "antithetic"] = "antithetic"
    # independent masks, or exactly n masks with n uniform (linear schedule only)
    mask_sampling: Literal["bernoulli", "exact_count"] = "bernoulli"
    random_length: float = 0.0  # fraction of examples cut to a uniform random length (0.01 in SMDM-rl and LLaDA)
    # per example (ours), or one draw for the whole batch (the reference)
    random_length_scope: Literal["example", "batch"] = "example"
    # tokens: the bound in nats/token; masked_tokens: DiffuLLaMA's, about twice that; examples: each example's own mean
    # over its tokens, and the mean of these (LLaDA's fine-tuning)
    normalization: Literal["tokens", "masked_tokens", "examples"] = "tokens"
    mask_id: int | None = None  # None: the appended mask row; a number: reuse that vocabulary id (LLaDA: 126336)
    suppress_mask: bool = True  # forbid predicting an in-vocabulary mask id, in the loss and in the sampler
    # same: position i predicts token i. shifted: position i predicts token i + 1, as the autoregressive model did that
    # is adapted; a text's first token is given then, and never masked (DiffuLLaMA, Dream)
    alignment: Literal["same", "shifted"] = later("same")
    # batches over which causal attention opens up to full attention, edge by random edge (DiffuGPT: 10,000); 0: full
    # from the first one on
    anneal_steps: int = later(0)
    # bound: the weight of the bound, by time. cart: Dream's, by how near a masked token is to visible ones
    weighting: Literal["bound", "cart"] = later("bound")
    cart_p: float = later(0.1)  # cart: how fast the weight falls off with distance, in (0, 1)

    def validate(self) -> None:
        if self.anneal_steps < 0:
            raise UserError(
                f"diffusion.anneal_steps={self.anneal_steps} must be 0 (full attention) or a positive number of steps"
            )
        if not 0 < self.cart_p < 1:
            raise UserError(f"diffusion.cart_p={self.cart_p} must lie in (0, 1); Dream-Coder uses 0.1")
        if not 0 < self.t_min < 1:
            raise UserError(f"diffusion.t_min={self.t_min} must lie in (0, 1); the papers use 0.001")
        if self.timesteps < 0:
            raise UserError(
                f"diffusion.timesteps={self.timesteps} must be 0 (continuous time) or a positive number of steps"
            )
        if not 0 <= self.random_length <= 1:
            raise UserError(
                f"diffusion.random_length={self.random_length} must be a fraction in [0, 1]; the papers use 0.01"
            )
        if self.polynomial_power <= 0:
            raise UserError(f"diffusion.polynomial_power={self.polynomial_power} must be positive")
        if not 0 < self.geometric_min < self.geometric_max:
            raise UserError(
                f"diffusion.geometric_min={self.geometric_min} must be positive and below "
                f"diffusion.geometric_max={self.geometric_max}"
            )
        if self.mask_sampling == "exact_count" and (self.schedule != "linear" or self.timesteps):
            raise UserError(
                "diffusion.mask_sampling=exact_count needs schedule=linear and timesteps=0, not "
                f"schedule={self.schedule} and timesteps={self.timesteps}"
            )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule; steps are optimizer steps."""

    peak_lr: float = 2e-4  # learning rate after warm-up
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # after the linear warm-up from 0
    warmup_steps: int = 100  # linear from 0 to peak_lr
    final_lr: float = 2e-5  # reached at the last step (cosine, wsd)
    drop_step: int = 0  # wsd: from this step on hold drop_lr instead of peak_lr; 0: never (LLaDA 8B: 228,882)
    drop_lr: float = 0.0  # wsd: the learning rate held after drop_step (LLaDA 8B: 1e-4)
    decay_steps: int = 0  # wsd: length of the closing linear decay to final_lr (LLaDA 8B: 57,220)
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled
    decay_mask: Literal["matrices", "all"] = "matrices"  # decay matrices and embeddings only, or every parameter (SMDM)
    clip_norm: float = 1.0  # global gradient norm; 0 turns clipping off
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 saves 2 bytes a parameter

    def validate(self, steps: int) -> None:
        for name in (
            "peak_lr",
            "final_lr",
            "drop_lr",
            "weight_decay",
            "clip_norm",
            "warmup_steps",
            "drop_step",
            "decay_steps",
        ):
            if not getattr(self, name) >= 0:  # nor NaN
                raise UserError(f"optim.{name}={getattr(self, name)} must not be negative")
        if self.warmup_steps > steps:
            raise UserError(
                f"optim.warmup_steps={self.warmup_steps} exceeds run.steps={steps}; shorten the warm-up or train longer"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)} must lie in [0, 1)")
        if self.schedule == "wsd":
            if self.warmup_steps + self.decay_steps > steps:
                raise UserError(
                    f"optim.warmup_steps={self.warmup_steps} + optim.decay_steps={self.decay_steps} exceeds "
                    f"run.steps={steps}"
                )
            if self.drop_step and not self.drop_lr:
                raise UserError(f"optim.drop_step={self.drop_step} needs optim.drop_lr, the rate from there on")
            if self.drop_step and not self.warmup_steps <= self.drop_step <= steps - self.decay_steps:
                raise UserError(
                    f"optim.drop_step={self.drop_step} must lie between the end of the warm-up "
                    f"({self.warmup_steps}) and the start of the decay ({steps - self.decay_steps})"
                )


@dataclass(frozen=True)
class DataConfig:
    """What is trained on: a prepared directory, or a source that is prepared into the run directory first."""

    path: str = op("")  # directory written by `diffusionlm data prepare`; empty: prepare `source` into WORKDIR/data
    # used when path is empty: a registered corpus (python_docs), text or jsonl(.gz) files, a directory or glob pattern
    # of them, or tfds:NAME
    source: str = ""
    # for `source`: byte, sentencepiece (trained with model.vocab_size pieces, or with run.init_from that checkpoint's
    # own), a tokenizer.model file; or a tokenizer.json file, the directory of a released model or a checkpoint, which
    # may lie elsewhere when the run goes on
    tokenizer: str = "sentencepiece"
    sequence_length: int = 2048  # tokens the model sees; records hold one more
    batch_size: int = 256  # sequences per optimizer step, over all devices and micro-batches
    # concatenate and cut; segments also keeps documents from attending to each other; examples: a prompt and its answer
    # in each record, for supervised fine-tuning: the prompt is given, the answer is learnt
    packing: Literal["chunk", "segments", "examples"] = "chunk"
    # examples: how many rows that follow one another are padded with EOS to their longest, and learn it; 1: no padding
    # but the EOS that ends an answer; 0: the whole batch. An autoregressive model learns no padding
    pad_group: int = later(0)

    def validate(self) -> None:
        _positive("data.sequence_length", self.sequence_length)
        _positive("data.batch_size", self.batch_size)
        if self.pad_group and self.packing != "examples":
            raise UserError(
                f"data.pad_group={self.pad_group} is for data.packing=examples, not {self.packing}; drop it"
            )
        if self.pad_group < 0 or (self.pad_group and self.batch_size % self.pad_group):
            raise UserError(
                f"data.pad_group={self.pad_group} must divide data.batch_size={self.batch_size}; 0 is the whole batch"
            )


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one axis may be -1, meaning all that remain."""

    data: int = op(1)  # replicas (may span slices)
    fsdp: int = op(-1)  # parameters and optimizer state are split over this axis, and so is the batch
    tensor: int = op(1)  # heads, MLP width and vocabulary are split over this axis

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) with -1 filled in, as far as that many devices allow."""
        given = (self.data, self.fsdp, self.tensor)
        known = math.prod(size for size in given if size != -1)
        return tuple(devices // known if size == -1 else size for size in given)

    def validate(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
            raise UserError(
                f"mesh.data={self.data}, mesh.fsdp={self.fsdp}, mesh.tensor={self.tensor}: each must be positive, and "
                "at most one -1"
            )


@dataclass(frozen=True)
class RunConfig:
    """How long, how often, and what is written."""

    steps: int = 1000  # optimizer steps
    seed: int = 0  # initialisation, data order and noise
    init_from: str = op("")  # checkpoint whose parameters the run starts from; empty: random ones
    init_id: str = later("")  # which checkpoint that is, wherever it lies; `train` fills it in
    microbatches: int = op(1)  # gradient accumulation: the batch is processed in this many parts
    log_every: int = op(10)  # steps between lines of metrics.jsonl
    eval_every: int = op(0)  # steps between evaluations; 0: only at the end
    eval_records: int = 512  # held-out sequences per evaluation, spread over the split (all of a smaller one)
    eval_draws: int = 8  # independent noise draws per held-out sequence; the standard error comes from them
    checkpoint_every: int = op(1000)  # steps between checkpoints; the last step is always saved
    checkpoint_minutes: float = op(10.0)  # also save when this much time has passed since the last save; 0: never
    keep: int = op(2)  # newest checkpoints kept
    keep_every: int = op(0)  # also keep every checkpoint at a multiple of this; 0: none
    profile_start: int = op(-1)  # first step of a profiler trace in WORKDIR/profile; -1: off
    profile_steps: int = op(5)  # length of that trace
    # After training: baselines on the same held-out bytes, and a sample being denoised in the terminal.
    showcase: bool = op(False)

    def validate(self) -> None:
        for name in ("steps", "microbatches", "log_every", "eval_records", "checkpoint_every", "keep", "profile_steps"):
            _positive("run." + name, getattr(self, name))
        for name in ("seed", "eval_every", "keep_every", "checkpoint_minutes"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise UserError(f"run.{name}={getattr(self, name)} must not be negative")
        if self.seed >= 1 << 32:
            raise UserError(f"run.seed={self.seed} must be below 2**32")
        if self.eval_draws < 2:
            raise UserError(f"run.eval_draws={self.eval_draws} must be at least 2, or there is no standard error")


@dataclass(frozen=True)
class SafetyConfig:
    """What is done about a bad batch: one whose loss or gradient is not finite, or whose gradient norm jumps.

    By default the run saves and stops. These fields are operational, so that a run that has stopped can go on under
    another policy and stay the same run; what a policy did is on record in metrics.jsonl, timeline.jsonl and DONE.json.
    """

    # also bad: a gradient norm above this many times its running mean; 0: only what is not finite is
    spike_factor: float = op(0.0)
    max_skips: int = op(0)  # bad batches in a row that are left out; at the next the run rolls back, or stops
    # times that the run returns to its newest checkpoint and goes on behind the bad batch; then it stops
    max_rollbacks: int = op(0)
    rollback_lr: float = op(1.0)  # factor on the learning rate, for good, at each roll-back (LLaDA 8B: 0.25)

    def validate(self) -> None:
        for name in ("max_skips", "max_rollbacks"):
            if getattr(self, name) < 0:
                raise UserError(f"safety.{name}={getattr(self, name)} must not be negative")
        if self.spike_factor and not self.spike_factor > 1:
            raise UserError(
                f"safety.spike_factor={self.spike_factor} must be above 1, in practice 5 or more, or 0 to turn it off"
            )
        if not 0 < self.rollback_lr <= 1:
            raise UserError(f"safety.rollback_lr={self.rollback_lr} must lie in (0, 1]")


@dataclass(frozen=True)
class Config:
    """One experiment, resolved."""

    name: str = op("custom")  # the experiment's registered name
    objective: Literal["mdm", "arm"] = "mdm"  # masked diffusion, or its autoregressive twin
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()
    safety: SafetyConfig = SafetyConfig()

    @property
    def mask_id(self) -> int | None:
        """The id that stands for [MASK]; None for an autoregressive model without one."""
        if self.diffusion.mask_id is not None:
            return self.diffusion.mask_id
        return self.model.vocab_size if self.model.mask_row else None

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """In-vocabulary ids that loss and sampler never predict (padding rows are suppressed besides, always)."""
        in_vocabulary = self.mask_id is not None and self.mask_id < self.model.vocab_size
        return (self.mask_id,) if in_vocabulary and self.diffusion.suppress_mask and self.objective == "mdm" else ()

    def validate(self) -> "Config":
        """Returns self, or raises `UserError` naming both offending values."""
        check_types(self)
        self.model.validate()
        self.diffusion.validate()
        self.run.validate()
        self.optim.validate(self.run.steps)
        self.data.validate()
        self.mesh.validate()
        self.safety.validate()
        if self.model.causal != (self.objective == "arm"):
            raise UserError(
                f"objective={self.objective} needs model.causal={self.objective == 'arm'}, not {self.model.causal}; "
                "experiments whose names end in _arm are set up as autoregressive twins"
            )
        if self.objective == "mdm" and self.mask_id is None:
            raise UserError(
                "objective=mdm needs a mask token: set model.mask_row=True or diffusion.mask_id to a vocabulary id"
            )
        if self.diffusion.mask_id is not None and not 0 <= self.diffusion.mask_id < self.model.vocab_size:
            raise UserError(
                f"diffusion.mask_id={self.diffusion.mask_id} must lie in "
                f"[0, model.vocab_size={self.model.vocab_size}), or be None to append a row"
            )
        if self.diffusion.mask_id is not None and self.model.mask_row:
            raise UserError(
                f"diffusion.mask_id={self.diffusion.mask_id} reuses a vocabulary id, so model.mask_row must be False"
            )
        if self.objective == "arm" and (self.diffusion.anneal_steps or self.diffusion.weighting != "bound"):
            name = "anneal_steps" if self.diffusion.anneal_steps else "weighting"
            raise UserError(
                f"diffusion.{name}={getattr(self.diffusion, name)} is for objective=mdm; drop it for objective=arm"
            )
        if self.diffusion.anneal_steps > self.run.steps:
            raise UserError(
                f"diffusion.anneal_steps={self.diffusion.anneal_steps} exceeds run.steps={self.run.steps}, so that "
                "attention would never be full, as it is in use; set --diffusion.anneal_steps to fewer"
            )
        if self.data.sequence_length > self.model.max_length:
            raise UserError(
                f"data.sequence_length={self.data.sequence_length} exceeds model.max_length={self.model.max_length}"
            )
        if self.data.packing == "examples" and self.diffusion.random_length:
            raise UserError(
                f"diffusion.random_length={self.diffusion.random_length} would cut answers off; set it to 0 for "
                "data.packing=examples"
            )
        if self.data.packing == "examples" and self.run.showcase:
            raise UserError(
                "run.showcase=True compares with models of whole texts, and data.packing=examples scores answers only; "
                "set it to False"
            )
        if self.data.batch_size % self.run.microbatches:
            raise UserError(
                f"run.microbatches={self.run.microbatches} must divide data.batch_size={self.data.batch_size}"
            )
        if self.objective == "mdm" and self.diffusion.time_sampling == "antithetic" and self.data.batch_size % 2:
            raise UserError(
                "diffusion.time_sampling=antithetic needs an even data.batch_size, not "
                f"{self.data.batch_size}; or use stratified"
            )
        return self


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name}={value} must be at least 1")


def check_types(config: Any, prefix: str = "") -> None:
    """Raises `UserError` for a value that is not of its field's type, or not one of its choices."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value, choices = getattr(config, name), typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            check_types(value, f"{prefix}{name}.")
        elif typing.get_origin(hint) is Literal:
            if value not in choices:
                raise UserError(f"{prefix}{name}={value!r} must be one of {', '.join(choices)}")
        else:
            allowed = choices or (hint,)
            allowed += (int,) if float in allowed else ()
            if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                names = " or ".join(kind.__name__ for kind in choices or (hint,))
                raise UserError(f"{prefix}{name}={value!r} must be of type {names}")
