"""MDMs of 10, 30 and 100 million parameters for data of your own, between `tinystories` and the published sizes.

Add _arm to a name for the autoregressive twin. Give the text with --data.path (8191 pieces) or --data.source.
"""

from dataclasses import replace

from diffusionlm import flops, presets
from diffusionlm.config import Config, DataConfig, DiffusionConfig, OptimConfig, RunConfig
from diffusionlm.registry import experiments


def pretraining(name: str, budget: float, *, sequence_length: int, batch_size: int, peak_lr: float) -> Config:
    """Return a run of `budget` FLOPs, counted as 6 N D, near which SMDM's law for MDMs has this size optimal.

    The learning rates lie between the best ones of `isoflop_cpu` at width 64 and SMDM's 4e-4; they were not tuned.
    """
    model = presets.get(name)
    tokens = budget / (6 * flops.parameters(model).non_embedding)
    steps = round(tokens / (batch_size * sequence_length))
    return Config(
        name=name,
        model=replace(model, max_length=sequence_length),
        diffusion=DiffusionConfig(random_length=0.01),
        optim=OptimConfig(peak_lr=peak_lr, final_lr=peak_lr / 10, warmup_steps=steps // 100),
        data=DataConfig(sequence_length=sequence_length, batch_size=batch_size),
        run=RunConfig(steps=steps, eval_every=5000, checkpoint_every=2500, log_every=20),
    )


@experiments.register("mdm_10m")
def mdm_10m() -> Config:
    """An MDM of 10M parameters at 1e17 FLOPs, for text of your own."""
    return pretraining("mdm_10m", 1e17, sequence_length=512, batch_size=128, peak_lr=1e-3)


@experiments.register("mdm_30m")
def mdm_30m() -> Config:
    """An MDM of 30M parameters at 8e17 FLOPs, for text of your own."""
    return pretraining("mdm_30m", 8e17, sequence_length=512, batch_size=256, peak_lr=7e-4)


@experiments.register("mdm_100m")
def mdm_100m() -> Config:
    """An MDM of 100M parameters at 6e18 FLOPs, for text of your own; the trunk is that of GPT-2 small."""
    return pretraining("mdm_100m", 6e18, sequence_length=1024, batch_size=256, peak_lr=5e-4)
