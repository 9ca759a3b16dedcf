"""A million-parameter MDM and its autoregressive twin on TinyStories (Eldan and Li, arXiv 2305.07759); fine-tuning."""

from dataclasses import replace

from diffusionlm.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, RunConfig
from diffusionlm.presets import arm_twin
from diffusionlm.registry import experiments
from diffusionlm.twin import autoregressive_twin


@experiments.register("tinystories")
def tinystories() -> Config:
    """An MDM of a million non-embedding parameters, autoregressive at first; give the stories with --data.path."""
    return Config(
        name="tinystories",
        # 2047 pieces and the mask row fill 2048 rows exactly.
        model=ModelConfig(
            d_model=128,
            n_layers=4,
            n_heads=4,
            n_kv_heads=4,
            head_dim=32,
            d_ff=512,
            vocab_size=2047,
            max_length=256,
            dtype="bfloat16",
            head_chunk=256,  # what a processor's caches hold
        ),
        # Stories are shorter than the canvas, and users sample short ones. An autoregressive model learns from few
        # tokens what an MDM needs many for, so the run begins as one (see `demo`).
        diffusion=DiffusionConfig(
            random_length=0.01, alignment="shifted", arm_steps=3000, weighting="cart", cart_p=0.3
        ),
        optim=OptimConfig(name="muon", arm_peak_lr=5e-3, peak_lr=5e-3, final_lr=3e-4, warmup_steps=100),
        data=DataConfig(sequence_length=256, batch_size=16),
        run=RunConfig(steps=8000, eval_every=1000, checkpoint_every=1000, log_every=20),
    )


@experiments.register("tinystories_arm")
def tinystories_arm() -> Config:
    """The autoregressive twin of `tinystories`: the same trunk, data, tokens and FLOPs."""
    base = tinystories()
    return replace(
        base,
        name="tinystories_arm",
        objective="arm",
        model=arm_twin(base.model),
        diffusion=DiffusionConfig(random_length=base.diffusion.random_length),
        # AdamW, with which the shipped twin was trained.
        optim=OptimConfig(peak_lr=3e-3, final_lr=3e-4, warmup_steps=200),
    )


@experiments.register("tinystories_sft")
def tinystories_sft() -> Config:
    """Fine-tuning of `tinystories` on instructions in minutes on a CPU; give the model with --run.init_from."""
    base = tinystories()
    return replace(
        base,
        name="tinystories_sft",
        diffusion=DiffusionConfig(alignment=base.diffusion.alignment, normalization="examples"),
        optim=OptimConfig(peak_lr=1e-3, final_lr=1e-4, warmup_steps=50),
        data=replace(base.data, packing="examples", pad_group=2),
        run=RunConfig(steps=600, eval_every=200, checkpoint_every=200, log_every=20),
    )


@experiments.register("tinystories_chat")
def tinystories_chat() -> Config:
    """`tinystories` becomes a model that tells stories in a dialogue; give it with --run.init_from.

    The data are those of experiments/benchmarks/story_dialogues.py, prepared with --pack.
    """
    base = tinystories_sft()
    return replace(
        base,
        name="tinystories_chat",
        data=replace(base.data, packing="packed_examples", pad_group=0),
        run=RunConfig(steps=2000, eval_every=1000, checkpoint_every=250, log_every=20),
    )


@experiments.register("tinystories_sft_arm")
def tinystories_sft_arm() -> Config:
    """Fine-tuning of `tinystories_arm` on the same instructions."""
    return autoregressive_twin(tinystories_sft())
