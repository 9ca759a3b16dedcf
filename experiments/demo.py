"""The newcomer's run: a few minutes on two CPU cores, no download."""

from dataclasses import replace

from diffusionlm.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, RunConfig
from diffusionlm.presets import arm_twin
from diffusionlm.registry import experiments


@experiments.register("demo")
def demo() -> Config:
    """An MDM on the documentation of Python and the installed packages; minutes on a laptop."""
    return Config(
        name="demo",
        # 1023 pieces and the mask row fill 1024 rows exactly.
        model=ModelConfig(
            d_model=128,
            n_layers=4,
            n_heads=4,
            n_kv_heads=4,
            head_dim=32,
            d_ff=384,
            vocab_size=1023,
            max_length=128,
            head_chunk=256,  # what a processor's caches hold
        ),
        diffusion=DiffusionConfig(),
        # Small batches, many steps: for the first 600 or so, before it attends to a mask's neighbours, it is a unigram
        # model.
        optim=OptimConfig(peak_lr=3e-3, final_lr=3e-4, warmup_steps=100),
        data=DataConfig(source="python_docs", tokenizer="sentencepiece", sequence_length=128, batch_size=8),
        run=RunConfig(steps=2400, checkpoint_every=800, log_every=20, showcase=True),
    )


@experiments.register("demo_arm")
def demo_arm() -> Config:
    """The autoregressive twin of `demo`: the same trunk, data and tokens."""
    base = demo()
    return replace(base, name="demo_arm", objective="arm", model=arm_twin(base.model))
