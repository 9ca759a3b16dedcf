"""Facts that are told in one direction and asked in the other: a masked diffusion model, its twin, and the road."""

from dataclasses import replace

from diffusionlm.config import Config, DataConfig, DiffusionConfig, OptimConfig, RunConfig
from diffusionlm.registry import experiments
from diffusionlm.twin import autoregressive_twin

from .tinystories import tinystories


@experiments.register("reversal")
def reversal() -> Config:
    """An MDM that learns sentences by heart; give them with --data.path.

    It is as SMDM is fine-tuned for the reversal curse (arXiv 2410.18514): a record is a sentence with EOS padding, and
    all of it is masked and learnt.
    """
    return Config(
        name="reversal",
        model=replace(tinystories().model, n_layers=2, vocab_size=1023, max_length=32, dtype="float32"),
        diffusion=DiffusionConfig(),
        optim=OptimConfig(peak_lr=2e-3, final_lr=2e-4, warmup_steps=100),
        data=DataConfig(sequence_length=32, batch_size=32, packing="examples", pad_group=2),
        run=RunConfig(steps=6000, eval_every=2000, checkpoint_every=2000, log_every=50),
    )


@experiments.register("reversal_arm")
def reversal_arm() -> Config:
    """The autoregressive twin of `reversal`: the same trunk, data, tokens and FLOPs."""
    return autoregressive_twin(reversal())


@experiments.register("reversal_road")
def reversal_road() -> Config:
    """The road to `reversal`: autoregressive for a sixth of its steps, then diffusion with the shift."""
    base = reversal()
    return replace(
        base,
        name="reversal_road",
        diffusion=replace(base.diffusion, alignment="shifted", arm_steps=1000),
        optim=replace(base.optim, arm_peak_lr=base.optim.peak_lr),
    )
