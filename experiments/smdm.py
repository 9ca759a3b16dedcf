"""The runs of SMDM (*Scaling up Masked Diffusion Models on Text*, arXiv 2410.18514): MDMs and ARM twins, 2048 tokens.

A budget of C FLOPs is C = 6 N D with N non-embedding parameters and D tokens, as the paper counts it.
"""

from dataclasses import replace

from diffusionlm import flops, presets
from diffusionlm.config import Config, DataConfig, DiffusionConfig, OptimConfig, RunConfig
from diffusionlm.registry import experiments


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


def twin(base: Config) -> Config:
    """Return the autoregressive twin of an MDM run: the same trunk, data, tokens and FLOPs."""
    return replace(base, name=base.name + "_arm", objective="arm", model=presets.arm_twin(base.model))


@experiments.register("smdm_170m")
def smdm_170m() -> Config:
    """SMDM's 170M MDM (219M with embeddings) at 1e20 FLOPs."""
    return pretraining("smdm_170m", "smdm_170m", 1e20)


@experiments.register("smdm_170m_arm")
def smdm_170m_arm() -> Config:
    """SMDM's 170M autoregressive twin at 1e20 FLOPs."""
    return twin(smdm_170m())


@experiments.register("smdm_170m_road")
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


@experiments.register("smdm_1028m")
def smdm_1028m() -> Config:
    """SMDM's 1.1B MDM at 1.6e21 FLOPs, batch 384."""
    return pretraining("smdm_1028m", "smdm_1028m", 1.6e21, batch_size=384)


@experiments.register("smdm_1028m_rsl")
def smdm_1028m_rsl() -> Config:
    """SMDM's 1.1B MDM at 3.3e21 FLOPs, batch 1024, with 1% of random lengths: the paper's headline model."""
    return pretraining("smdm_1028m_rsl", "smdm_1028m", 3.3e21, batch_size=1024, random_length=0.01)
