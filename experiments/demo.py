"""The newcomer's run: a few minutes on two CPU cores, no download."""

from diffusionlm.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, RunConfig
from diffusionlm.registry import experiments
from diffusionlm.twin import autoregressive_twin


@experiments.register("demo")
def demo() -> Config:
    """An MDM, autoregressive at first, on the documentation of Python and installed packages; minutes on a laptop."""
    return Config(
        name="demo",
        # 1023 pieces and the mask row fill 1024 rows exactly. A network twice as large would see half as many tokens in
        # the same time, and a masked diffusion model wants tokens.
        model=ModelConfig(
            d_model=96,
            n_layers=3,
            n_heads=3,
            n_kv_heads=3,
            head_dim=32,
            d_ff=256,
            vocab_size=1023,
            max_length=128,
            head_chunk=256,  # what a processor's caches hold
        ),
        # From scratch a run of this length would be a unigram model nearly to its end. An autoregressive model soon
        # knows what follows what, and that is most of what a mask's neighbours say; a fifth of the steps is the best
        # share of `road_cpu`. The bound's weights of 1/t are noisy for so few sequences; CART's are at most 1, and
        # small where nothing near a mask is known.
        diffusion=DiffusionConfig(alignment="shifted", arm_steps=300, weighting="cart", cart_p=0.3),
        optim=OptimConfig(name="muon", arm_peak_lr=6e-3, peak_lr=7e-3, final_lr=3e-4, warmup_steps=100),
        data=DataConfig(source="python_docs", tokenizer="sentencepiece", sequence_length=128, batch_size=16),
        run=RunConfig(steps=1500, checkpoint_every=750, log_every=20, showcase=True),
    )


@experiments.register("demo_arm")
def demo_arm() -> Config:
    """The autoregressive twin of `demo`: the same trunk, data and tokens, and the first part of `demo` made longer."""
    return autoregressive_twin(demo())
