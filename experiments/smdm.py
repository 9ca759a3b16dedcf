"""The runs of SMDM (*Scaling up Masked Diffusion Models on Text*, arXiv 2410.18514): pre-training and fine-tuning.

A budget of C FLOPs is C = 6 N D with N non-embedding parameters and D tokens, as the paper counts it.
"""

from dataclasses import replace

from diffusionlm import flops, presets
from diffusionlm.config import Config, DataConfig, DiffusionConfig, OptimConfig, RunConfig
from diffusionlm.registry import experiments
from diffusionlm.twin import autoregressive_twin

from . import published_data


def pretraining(name: str, preset: str, budget: float, *, batch_size: int = 256, random_length: float = 0.0) -> Config:
    """Return an MDM pre-training run of `budget` FLOPs with the hyper-parameters of the paper's Appendix B.2."""
    model = replace(presets.get(preset), remat="attention")
    # Cut examples have a mean length of (T + 1) / 2, and the paper's budget counts kept tokens only.
    length = 2048 * (1 - random_length) + (2048 + 1) / 2 * random_length
    steps = int(budget / (6 * flops.parameters(model).non_embedding * batch_size * length))
    return Config(
        name=name,
        model=model,
        # The paper draws t independently for each sequence; antithetic pairs have the same mean and less noise.
        diffusion=DiffusionConfig(random_length=random_length),
        # The paper's peak of 4e-4 (its released code has half of it), decay of every parameter, as in its code.
        optim=OptimConfig(peak_lr=4e-4, final_lr=4e-5, warmup_steps=max(100, steps // 100), decay_mask="all"),
        data=DataConfig(sequence_length=2048, batch_size=batch_size),
        run=RunConfig(steps=steps, eval_every=10_000, checkpoint_every=5000, eval_records=12_800),
    )


@experiments.register("smdm_170m", data=published_data.SMDM)
def smdm_170m() -> Config:
    """SMDM's 170M MDM (219M with embeddings) at 1e20 FLOPs."""
    return pretraining("smdm_170m", "smdm_170m", 1e20)


@experiments.register("smdm_170m_arm", data=published_data.SMDM)
def smdm_170m_arm() -> Config:
    """SMDM's 170M autoregressive twin at 1e20 FLOPs."""
    return autoregressive_twin(smdm_170m())


@experiments.register("smdm_170m_road", data=published_data.SMDM)
def smdm_170m_road() -> Config:
    """SMDM's 170M at 1e20 FLOPs, of which the first fifth trains an autoregressive model.

    A fifth is the best share of `road_cpu` at both budgets that it determines. These are 2e7 and 6e7 times smaller, and
    shares from 0.1 to 0.5 differ by little more there than the fit is off.
    """
    base = smdm_170m()
    arm_steps = round(0.2 * base.run.steps)
    return replace(
        base,
        name="smdm_170m_road",
        diffusion=replace(base.diffusion, alignment="shifted", arm_steps=arm_steps),
    )


@experiments.register("smdm_1028m", data=published_data.SMDM)
def smdm_1028m() -> Config:
    """SMDM's 1.1B MDM at 1.6e21 FLOPs, batch 384."""
    return pretraining("smdm_1028m", "smdm_1028m", 1.6e21, batch_size=384)


@experiments.register("smdm_1028m_rsl", data=published_data.SMDM)
def smdm_1028m_rsl() -> Config:
    """SMDM's 1.1B MDM at 3.3e21 FLOPs, batch 1024, with 1% of random lengths: the paper's headline model."""
    return pretraining("smdm_1028m_rsl", "smdm_1028m", 3.3e21, batch_size=1024, random_length=0.01)


def fine_tuning(name: str, *, examples: int, epochs: int, batch_size: int, length: int, warmup_steps: int) -> Config:
    """Return a fine-tuning of the 1.1B model with the hyper-parameters of the released code.

    The loss is one ratio of sums; the code takes it over each micro-batch, and we over the whole batch. The length of a
    run is a whole number of batches, as in the code. The paper's learning rate is twice that of the code.

    Args:
      name: of the experiment.
      examples: their number, to which the code fixes the length of the run.
      epochs: passes through them.
      batch_size: examples of a step.
      length: tokens that the model sees.
      warmup_steps: steps to the peak learning rate.
    """
    steps = examples * epochs // batch_size
    return Config(
        name=name,
        model=replace(presets.get("smdm_1028m"), remat="attention"),
        optim=OptimConfig(peak_lr=2e-4, final_lr=2e-5, warmup_steps=warmup_steps, decay_mask="all"),
        data=DataConfig(sequence_length=length, batch_size=batch_size, packing="examples"),
        run=RunConfig(steps=steps, eval_every=min(steps, 5000), checkpoint_every=min(steps, 1000), eval_records=1024),
    )


@experiments.register("smdm_gsm8k")
def smdm_gsm8k() -> Config:
    """SMDM's 1.1B on two examples of each of 384,620 problems, 40 epochs; give the model with --run.init_from.

    All rows are padded to 256 tokens. The code's `finetune_mdm_gsm8k.py` has these numbers.
    """
    base = fine_tuning("smdm_gsm8k", examples=2 * 384_620, epochs=40, batch_size=256, length=256, warmup_steps=1201)
    return replace(base, data=replace(base.data, pad_group=-1))


@experiments.register("smdm_sharegpt")
def smdm_sharegpt() -> Config:
    """SMDM's 1.1B on the first turns of ShareGPT, 55,612 pairs, 3 epochs; give the model with --run.init_from.

    The code's `finetune_mdm.py` has these numbers, and pads a model of this size in micro-batches of 4. For guidance it
    also has a version with --diffusion.prompt_dropout 0.1.
    """
    base = fine_tuning("smdm_sharegpt", examples=55_612, epochs=3, batch_size=256, length=2048, warmup_steps=200)
    return replace(base, data=replace(base.data, pad_group=4))


@experiments.register("smdm_reverse")
def smdm_reverse() -> Config:
    """SMDM's 1.1B on the 3600 sentences of the reversal curse, all of them masked; give the model with --run.init_from.

    The code's `finetune_mdm_reverse.py` has these numbers; the paper has batches of 32. Rows are padded in
    micro-batches of 4. The longest sentence has 49 tokens of Mistral's vocabulary, which is as large as LLaMA's.
    """
    base = fine_tuning("smdm_reverse", examples=3600, epochs=10, batch_size=64, length=64, warmup_steps=200)
    return replace(base, data=replace(base.data, pad_group=4, learn="all"))
