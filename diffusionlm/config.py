"""Every setting of a run, as frozen dataclasses: the single source of truth for the command line, JSON and checkpoints.

A field made with `op(...)` is operational (paths, mesh, logging, memory trade-offs): changing it must not change the
science, so it stays out of `fingerprint`. Every other field is scientific. A field's type gives its range
(`config_fields`); the `validate` methods check what fields have to do with each other. This module imports no JAX.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from diffusionlm.config_data import DataConfig
from diffusionlm.config_fields import (
    AtLeastMinusOne,
    AtLeastTwo,
    Canonical,
    DecayRate,
    Factor,
    Fraction,
    Hint,
    NonNegative,
    NonNegativeReal,
    OpenFraction,
    Positive,
    PositiveReal,
    Seed,
    Steps,
    at_least,
    at_most,
    check_fields,
    later,
    op,
)
from diffusionlm.config_model import ModelConfig
from diffusionlm.errors import UserError


@dataclass(frozen=True)
class DiffusionConfig(Canonical):
    """The forward (masking) process and the bound that is trained."""

    # linear, cosine, polynomial or geometric: alpha(t), the probability that a token is still clean at time t
    schedule: str = "linear"
    polynomial_power: Annotated[PositiveReal, at_most(100)] = 2.0  # k of alpha(t) = 1 - t**k
    # sigma_min of alpha(t) = exp(-sigma_min**(1-t) * sigma_max**t)
    geometric_min: Annotated[PositiveReal, at_least(1e-30)] = 1e-4
    geometric_max: Annotated[PositiveReal, at_most(1e6)] = 20.0  # sigma_max of the same schedule
    # times below this are one reconstruction step (still a bound); the papers use 0.001
    t_min: Annotated[OpenFraction, at_least(1e-12), Hint("the papers use 0.001")] = 1e-3
    # 0: continuous time; T > 0: the discrete-time bound with T steps, of which float32 can tell 2**20 apart
    timesteps: Annotated[NonNegative, at_most(2**20), Hint("0 is continuous time")] = 0
    # antithetic: stratified over the batch in pairs (u, 1-u)
    time_sampling: Literal["iid", "stratified", "antithetic"] = "antithetic"
    # independent masks, or exactly n masks with n uniform (linear schedule only)
    mask_sampling: Literal["bernoulli", "exact_count"] = "bernoulli"
    # fraction of examples cut to a uniform random length (0.01 in SMDM-rl and LLaDA)
    random_length: Annotated[Fraction, Hint("the papers use 0.01")] = 0.0
    # tokens: the bound in nats/token; masked_tokens: DiffuLLaMA's, about twice that; examples: each example's own mean
    # over its tokens, and the mean of these (LLaDA's fine-tuning)
    normalization: Literal["tokens", "masked_tokens", "examples"] = "tokens"
    mask_id: int | None = None  # None: the appended mask row; a number: reuse that vocabulary id (LLaDA: 126336)
    suppress_mask: bool = True  # forbid predicting an in-vocabulary mask id, in the loss and in the sampler
    # same: position i predicts token i. shifted: position i predicts token i + 1, like the autoregressive model being
    # adapted; then a text's first token is given, and never masked (DiffuLLaMA, Dream)
    alignment: Literal["same", "shifted"] = "same"
    # batches over which causal attention opens up to full attention, edge by random edge (DiffuGPT: 10,000); 0: full
    # from the first batch on
    anneal_steps: Annotated[NonNegative, Hint("0 is full attention from the start")] = 0
    # batches that a run begins with as an autoregressive model, with causal attention and no masks, before it goes on
    # as a shifted diffusion model; `anneal_steps` counts from their end
    arm_steps: Annotated[NonNegative, Hint("0 trains diffusion from the start")] = later(0)
    # fraction of examples whose whole prompt is masked in the input, to train for classifier-free guidance (SMDM: 0.1)
    prompt_dropout: Annotated[Fraction, Hint("SMDM uses 0.1")] = later(0.0)
    # bound: the weight of the bound, by time. cart: Dream's, by the distance of a masked token to visible ones
    weighting: Literal["bound", "cart"] = "bound"
    # cart: rate at which the weight falls off with distance (Dream-Coder: 0.1)
    cart_p: Annotated[OpenFraction, Hint("Dream-Coder uses 0.1")] = 0.1

    def validate(self) -> None:
        """Raise `UserError` for fields out of range, or that contradict one another."""
        check_fields(self, "diffusion.")
        if not self.geometric_min < self.geometric_max:
            raise UserError(
                f"diffusion.geometric_min={self.geometric_min} must be below "
                f"diffusion.geometric_max={self.geometric_max}"
            )
        if self.mask_sampling == "exact_count" and (self.schedule != "linear" or self.timesteps):
            raise UserError(
                "diffusion.mask_sampling=exact_count needs schedule=linear and timesteps=0, not "
                f"schedule={self.schedule} and timesteps={self.timesteps}"
            )
        if self.arm_steps and self.alignment != "shifted":
            raise UserError(
                f"diffusion.arm_steps={self.arm_steps} trains position i to predict token i + 1, and "
                f"diffusion.alignment={self.alignment} unlearns that; set --diffusion.alignment shifted"
            )


@dataclass(frozen=True)
class OptimConfig(Canonical):
    """The optimizer and its learning-rate schedule; steps are optimizer steps."""

    # adamw, or muon: momentum made orthogonal for the matrices of the blocks, AdamW for all else
    name: Literal["adamw", "muon"] = later("adamw")
    peak_lr: NonNegativeReal = 2e-4  # learning rate after warm-up
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # after the linear warm-up from 0
    warmup_steps: NonNegative = 100  # linear from 0 to peak_lr
    final_lr: NonNegativeReal = 2e-5  # reached at the last step (cosine, wsd)
    drop_step: NonNegative = 0  # wsd: from this step on hold drop_lr instead of peak_lr; 0: never (LLaDA 8B: 228,882)
    drop_lr: NonNegativeReal = 0.0  # wsd: the learning rate held after drop_step (LLaDA 8B: 1e-4)
    decay_steps: NonNegative = 0  # wsd: length of the closing linear decay to final_lr (LLaDA 8B: 57,220)
    beta1: DecayRate = 0.9  # decay of the first moment
    beta2: DecayRate = 0.95  # decay of the second moment
    eps: PositiveReal = 1e-8  # added to the root of the second moment
    weight_decay: NonNegativeReal = 0.1  # decoupled
    decay_mask: Literal["matrices", "all"] = "matrices"  # decay matrices and embeddings only, or every parameter (SMDM)
    clip_norm: NonNegativeReal = 1.0  # global gradient norm; 0 turns clipping off
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"  # bfloat16 saves 2 bytes a parameter
    # peak of the batches of diffusion.arm_steps, which have the schedule by themselves; 0: peak_lr
    arm_peak_lr: NonNegativeReal = later(0.0)

    def validate(self, steps: int, name: str = "run.steps") -> None:
        """Raise `UserError` for fields that contradict one another, or the number of steps.

        Args:
          steps: the length of the schedule.
          name: what gives that length.
        """
        if self.warmup_steps > steps:
            raise UserError(
                f"optim.warmup_steps={self.warmup_steps} exceeds {name}={steps}; shorten the warm-up or train longer"
            )
        if self.schedule == "wsd":
            if self.warmup_steps + self.decay_steps > steps:
                raise UserError(
                    f"optim.warmup_steps={self.warmup_steps} + optim.decay_steps={self.decay_steps} exceeds "
                    f"{name}={steps}"
                )
            if self.drop_step and not self.drop_lr:
                raise UserError(f"optim.drop_step={self.drop_step} needs optim.drop_lr, the rate from there on")
            if self.drop_step and not self.warmup_steps <= self.drop_step <= steps - self.decay_steps:
                raise UserError(
                    f"optim.drop_step={self.drop_step} must lie between the end of the warm-up "
                    f"({self.warmup_steps}) and the start of the decay ({steps - self.decay_steps})"
                )


@dataclass(frozen=True)
class MeshConfig(Canonical):
    """Devices per mesh axis; one axis may be -1, meaning all that remain."""

    data: AtLeastMinusOne = op(1)  # replicas (may span slices)
    fsdp: AtLeastMinusOne = op(-1)  # parameters and optimizer state are split over this axis, and so is the batch
    tensor: AtLeastMinusOne = op(1)  # heads, MLP width and vocabulary are split over this axis

    def sizes(self, devices: int) -> tuple[int, int, int]:
        """Return (data, fsdp, tensor) with -1 filled in, as far as that many devices allow."""
        known = math.prod(size for size in (self.data, self.fsdp, self.tensor) if size != -1)
        data, fsdp, tensor = (devices // known if size == -1 else size for size in (self.data, self.fsdp, self.tensor))
        return data, fsdp, tensor

    def validate(self) -> None:
        """Raise `UserError` for sizes that make no mesh."""
        sizes = (self.data, self.fsdp, self.tensor)
        if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
            raise UserError(
                f"mesh.data={self.data}, mesh.fsdp={self.fsdp}, mesh.tensor={self.tensor}: each must be positive, and "
                "at most one -1"
            )


@dataclass(frozen=True)
class RunConfig(Canonical):
    """The length of a run, and when it evaluates, logs and saves."""

    steps: Steps = 1000  # optimizer steps
    seed: Seed = 0  # initialisation, data order and noise
    init_from: str = op("")  # checkpoint whose parameters the run starts from; empty: random ones
    init_id: str = ""  # identity of that checkpoint, wherever it lies; `train` fills it in
    # run or step whose whole state this one goes on from: parameters, moments, steps, place in data and noise. `steps`
    # counts those taken there, and the learning-rate schedule covers the others
    continue_from: str = op("")
    continue_id: str = later("")  # identity of that state; `train` fills it in
    continued_steps: NonNegative = later(0)  # optimizer steps that it has taken; `train` fills it in
    microbatches: Positive = op(1)  # gradient accumulation: the batch is processed in this many parts
    log_every: Positive = op(10)  # steps between lines of metrics.jsonl
    eval_every: NonNegative = op(0)  # steps between evaluations; 0: only at the end
    eval_records: Positive = 512  # held-out sequences per evaluation, spread over the split (all of a smaller one)
    # independent noise draws per held-out sequence; the standard error comes from them
    eval_draws: Annotated[AtLeastTwo, Hint("one draw has no standard error")] = 8
    checkpoint_every: Positive = op(1000)  # steps between checkpoints; the last step is always saved
    checkpoint_minutes: NonNegativeReal = op(10.0)  # also save when the last save is this long ago; 0: never
    keep: Positive = op(2)  # newest checkpoints kept
    keep_every: NonNegative = op(0)  # also keep every checkpoint at a multiple of this; 0: none
    profile_start: AtLeastMinusOne = op(-1)  # first step of a profiler trace in WORKDIR/profile; -1: off
    profile_steps: Positive = op(5)  # length of that trace
    # after training, show baselines on the same held-out bytes, and a sample being denoised in the terminal
    showcase: bool = op(False)


@dataclass(frozen=True)
class SafetyConfig(Canonical):
    """The reaction to a bad batch: one whose loss or gradient is not finite, or whose gradient norm jumps.

    By default the run saves and stops. These fields are operational, so that a stopped run can be resumed under another
    policy and stay the same run; metrics.jsonl, timeline.jsonl and DONE.json record what a policy did.
    """

    # a gradient norm above this many times its running mean is bad too; 0: only what is not finite is bad
    spike_factor: NonNegativeReal = op(0.0)
    max_skips: NonNegative = op(0)  # bad batches in a row that are left out; at one more the run rolls back, or stops
    # times that the run returns to its newest checkpoint and continues after the bad batch; then it stops
    max_rollbacks: NonNegative = op(0)
    rollback_lr: Factor = op(1.0)  # permanent factor on the learning rate at each roll-back (LLaDA 8B: 0.25)

    def validate(self) -> None:
        """Raise `UserError` for a factor that every step exceeds."""
        if self.spike_factor and not self.spike_factor > 1:
            raise UserError(
                f"safety.spike_factor={self.spike_factor} must be above 1, in practice 5 or more, or 0 to turn it off"
            )


@dataclass(frozen=True)
class Config(Canonical):
    """One experiment, with a value for every setting."""

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
        """The id of [MASK], or None for an autoregressive model without one."""
        if self.diffusion.mask_id is not None:
            return self.diffusion.mask_id
        return self.model.vocab_size if self.model.mask_row else None

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """The in-vocabulary ids that loss and sampler never predict; they never predict padding rows either."""
        mask_id = self.mask_id
        if mask_id is None or mask_id >= self.model.vocab_size or self.objective == "arm":
            return ()
        return (mask_id,) if self.diffusion.suppress_mask else ()

    def validate(self) -> "Config":
        """Return self, or raise `UserError` with the offending values.

        Raises:
          UserError: a value is of another type or out of its field's range, or two fields contradict each other.
        """
        check_fields(self)
        self.model.validate()
        self.diffusion.validate()
        self.data.validate()
        self.mesh.validate()
        self.safety.validate()
        self._validate_objective()
        self._validate_mask_id()
        self._validate_examples()
        self._validate_mixture()
        self._validate_schedule()
        self._validate_lengths()
        return self

    def _validate_objective(self) -> None:
        """Check the objective against the model and the diffusion process."""
        is_arm, diffusion = self.objective == "arm", self.diffusion
        if self.model.causal != is_arm:
            raise UserError(
                f"objective={self.objective} needs model.causal={is_arm}, not {self.model.causal}; "
                "NAME_arm is the autoregressive twin of the experiment NAME, whichever it is"
            )
        if not is_arm and self.mask_id is None:
            raise UserError(
                "objective=mdm needs a mask token: set model.mask_row=True or diffusion.mask_id to a vocabulary id"
            )
        mdm_only = {"arm_steps": 0, "anneal_steps": 0, "weighting": "bound", "prompt_dropout": 0}
        given = [name for name, default in mdm_only.items() if getattr(diffusion, name) != default]
        if is_arm and given:
            name = given[0]
            raise UserError(
                f"diffusion.{name}={getattr(diffusion, name)} is for objective=mdm; drop it for objective=arm"
            )

    def _validate_mask_id(self) -> None:
        """Check an explicit mask id against the vocabulary."""
        mask_id, vocab_size = self.diffusion.mask_id, self.model.vocab_size
        if mask_id is None:
            return
        if not 0 <= mask_id < vocab_size:
            raise UserError(
                f"diffusion.mask_id={mask_id} must lie in [0, model.vocab_size={vocab_size}), or be None to append a "
                "row"
            )
        if self.model.mask_row:
            raise UserError(f"diffusion.mask_id={mask_id} reuses a vocabulary id, so model.mask_row must be False")

    def _validate_examples(self) -> None:
        """Refuse settings that are incompatible with prompts and answers, or that need them."""
        packing = self.data.packing
        if self.diffusion.prompt_dropout:
            self._validate_prompt_dropout()
        if not self.data.holds_examples:
            return
        if self.diffusion.random_length:
            raise UserError(
                f"diffusion.random_length={self.diffusion.random_length} would cut answers off; set it to 0 for "
                f"data.packing={packing}"
            )
        if packing == "packed_examples" and self.model.rope_scaling.kind == "dynamic":
            raise UserError(
                "model.rope_scaling.kind=dynamic depends on the length of a row, and data.packing=packed_examples has "
                "several examples in each; set data.packing=examples"
            )
        if self.run.showcase:
            raise UserError(
                f"run.showcase=True compares with models of whole texts, and data.packing={packing} scores answers "
                "only; set it to False"
            )

    def _validate_mixture(self) -> None:
        """Refuse settings that are incompatible with several datasets, and two states to begin with."""
        if self.run.showcase and self.data.sources:
            raise UserError(
                f"run.showcase=True is for one dataset, not data.mixture={self.data.mixture}; set it to False"
            )
        if self.run.init_from and self.run.continue_from:
            raise UserError(
                f"run.init_from={self.run.init_from} gives weights to a run from step 0, and run.continue_from="
                f"{self.run.continue_from} a whole state to go on from; give one of them"
            )

    def _validate_prompt_dropout(self) -> None:
        """Refuse settings under which no prompt could be left out, or under which that would not be noticed."""
        data, weighting = self.data, self.diffusion.weighting
        for name, value, allowed, fits in (
            ("data.packing", data.packing, "examples or packed_examples", data.holds_examples),
            ("data.learn", data.learn, "answers", data.learn == "answers"),
            ("diffusion.weighting", weighting, "bound", weighting == "bound"),
        ):
            if not fits:
                raise UserError(
                    f"diffusion.prompt_dropout={self.diffusion.prompt_dropout} masks prompts that are given, and needs "
                    f"{name}={allowed}, not {value}; set it to 0, or change {name}"
                )

    def _validate_schedule(self) -> None:
        """Check the parts of the run against its steps, and the learning rates of each part against its length."""
        steps, first, opening = self.run.steps, self.diffusion.arm_steps, self.diffusion.anneal_steps
        if first > steps:
            raise UserError(
                f"diffusion.arm_steps={first} exceeds run.steps={steps}; set --diffusion.arm_steps to at most that"
            )
        if opening > steps - first:
            after = f" - diffusion.arm_steps={first}" if first else ""
            raise UserError(
                f"diffusion.anneal_steps={opening} exceeds run.steps={steps}{after}, so that attention would never be "
                "full, as in sampling; set --diffusion.anneal_steps to fewer"
            )
        if self.optim.arm_peak_lr and not first:
            raise UserError(
                f"optim.arm_peak_lr={self.optim.arm_peak_lr} is the learning rate of the batches of "
                "diffusion.arm_steps=0; set --diffusion.arm_steps, or drop it"
            )
        if continued := self.run.continued_steps:
            if not continued < steps:
                raise UserError(
                    f"run.steps={steps} counts the {continued} steps of the run that run.continue_from names, too; set "
                    "--run.steps to more than that"
                )
            self.optim.validate(steps - continued, f"run.steps - {continued} steps of run.continue_from")
        if self.run.continue_from:  # of unknown steps until it is resolved
            return
        for length, name in ((first, "diffusion.arm_steps"), (steps - first, "run.steps - diffusion.arm_steps")):
            if length > 0:
                self.optim.validate(length, name if first else "run.steps")

    def _validate_lengths(self) -> None:
        """Check counts of steps, tokens and sequences against one another."""
        if self.data.sequence_length > self.model.max_length:
            raise UserError(
                f"data.sequence_length={self.data.sequence_length} exceeds model.max_length={self.model.max_length}"
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
