"""The runs of LLaDA (*Large Language Diffusion Models*, arXiv 2502.09992): pre-training, fine-tuning, 4096 tokens."""

from dataclasses import replace

from diffusionlm import flops, presets
from diffusionlm.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, RunConfig
from diffusionlm.registry import experiments

MASK_ID = 126336  # <|mdm_mask|>, an id of the vocabulary


def _base(name: str, model: ModelConfig, optim: OptimConfig, steps: int, remat: str) -> Config:
    return Config(
        name=name,
        model=replace(model, dtype="bfloat16", remat=remat),
        diffusion=DiffusionConfig(random_length=0.01, mask_id=MASK_ID),
        optim=optim,
        data=DataConfig(sequence_length=4096, batch_size=1280),
        run=RunConfig(steps=steps, eval_every=10_000, checkpoint_every=5000, eval_records=10_240),
    )


@experiments.register("llada_8b")
def llada_8b() -> Config:
    """LLaDA 8B on 2.3T tokens: warm-up, hold 4e-4 to 1.2T, hold 1e-4 for 0.8T, decay to 1e-5 over the last 0.3T."""
    optim = OptimConfig(
        peak_lr=4e-4,
        schedule="wsd",
        warmup_steps=2000,
        drop_step=228_882,
        drop_lr=1e-4,
        decay_steps=57_220,
        final_lr=1e-5,
    )
    return _base("llada_8b", presets.get("llada_8b"), optim, steps=438_690, remat="full")


@experiments.register("llada_8b_sft")
def llada_8b_sft() -> Config:
    """LLaDA 8B's fine-tuning on 4.5M instruction pairs, 3 epochs; give the base model with --run.init_from.

    The paper's numbers are quoted from memory: 4.5M pairs, 2.5e-5 after 50 steps, the last 10% down to 2.5e-6, weight
    decay 0.1, batches of 256 in which pairs of rows are padded together, as in its mini-batches.
    """
    steps = 3 * 4_500_000 // 256
    optim = OptimConfig(
        peak_lr=2.5e-5, schedule="wsd", warmup_steps=50, decay_steps=steps // 10, final_lr=2.5e-6, weight_decay=0.1
    )
    base = _base("llada_8b_sft", presets.get("llada_8b"), optim, steps=steps, remat="full")
    return replace(
        base,
        diffusion=replace(base.diffusion, random_length=0.0, normalization="examples"),
        data=replace(base.data, batch_size=256, packing="examples", pad_group=2),
        run=replace(base.run, eval_every=2000, checkpoint_every=1000, eval_records=2048),
    )


@experiments.register("llada_1b")
def llada_1b() -> Config:
    """LLaDA 1B at 1e22 FLOPs, a point of the paper's scaling plot: peak 4e-4 after 2000 steps, then constant."""
    optim = OptimConfig(peak_lr=4e-4, schedule="constant", warmup_steps=2000)
    model = presets.get("llada_1b")
    tokens = 1e22 / (6 * flops.parameters(model).non_embedding)
    return _base("llada_1b", model, optim, steps=int(tokens / (1280 * 4096)), remat="attention")
