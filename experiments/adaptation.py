"""Autoregressive models that become diffusion models: DiffuGPT, DiffuLLaMA (arXiv 2410.17891), Dream (2508.15487).

Give the model to start from with --run.init_from, as `diffusionlm import` writes it.
"""

from dataclasses import replace

from diffusionlm import presets
from diffusionlm.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, RunConfig
from diffusionlm.registry import experiments

from . import published_data

DREAM_MASK_ID = 151666  # <|mask|>, among the rows of Qwen2.5 that no piece uses
SHIFTED = DiffusionConfig(alignment="shifted", anneal_steps=10_000, normalization="masked_tokens")


def _adapted(preset: str, remat: str) -> ModelConfig:
    """Return the diffusion model of an autoregressive preset: full attention, and a row for [MASK]."""
    return replace(presets.get(preset), causal=False, mask_row=True, remat=remat)


@experiments.register("diffugpt_medium", data=published_data.DIFFUGPT_MEDIUM)
def diffugpt_medium() -> Config:
    """DiffuGPT-M from GPT-2 medium on FineWeb: 160,000 steps to 3e-4, attention that opens up over 10,000 of them.

    The released configuration has 160 sequences of 1024 tokens on each device, and does not say how many devices; here
    they are 8. GPT-2's dropout of 0.1 is left out.
    """
    optim = OptimConfig(peak_lr=3e-4, final_lr=0.0, warmup_steps=2000, beta2=0.999, weight_decay=0.0)
    return Config(
        model=_adapted("gpt2_medium", remat="attention"),
        diffusion=SHIFTED,
        optim=optim,
        data=DataConfig(sequence_length=1024, batch_size=8 * 160),
        run=RunConfig(steps=160_000, eval_every=10_000, checkpoint_every=2000, eval_records=4096),
    )


@experiments.register("diffugpt_small", data=published_data.DIFFUGPT_SMALL)
def diffugpt_small() -> Config:
    """DiffuGPT-S from GPT-2 small, with the numbers of DiffuGPT-M and its own 512 tokens.

    The configuration that was released for it, 10,000 steps to 5e-6, looks like the continuation of another run.
    """
    base = diffugpt_medium()
    return replace(base, model=_adapted("gpt2", remat="none"), data=replace(base.data, sequence_length=512))


@experiments.register("diffugpt_gsm8k")
def diffugpt_gsm8k() -> Config:
    """DiffuGPT-M on equations for 384,620 problems of GSM8K, 200 epochs to 3e-4; give it with --run.init_from.

    The released configuration (`gpt2_full_ddm-sft.yaml`) has batches of 128 on each device, and does not say how many
    devices; here they are 8. The number of problems is that of SMDM's file, as the released one is not public; 256
    tokens are our choice. All rows are padded to the end. Attention is full from the start.
    """
    base = diffugpt_medium()
    batch_size = 8 * 128
    return replace(
        base,
        diffusion=replace(SHIFTED, anneal_steps=0),
        data=DataConfig(sequence_length=256, batch_size=batch_size, packing="examples", pad_group=-1),
        run=RunConfig(steps=200 * 384_620 // batch_size, eval_every=5000, checkpoint_every=1000, eval_records=1024),
    )


@experiments.register("diffullama_7b", data=published_data.DIFFULLAMA)
def diffullama_7b() -> Config:
    """DiffuLLaMA from LLaMA-2 7B on 63B tokens of SlimPajama and StarCoder, with the annealing that it had to drop.

    Its released code ran 20,000 steps at a constant 2e-5 without warm-up, with full attention from the first step,
    because its kernel took no other mask. It used 65B tokens (the paper, quoted from memory); 1536 sequences give 63B.
    A sequence came from SlimPajama with probability 0.693584; here that is its exact share.
    """
    return Config(
        model=_adapted("llama2_7b", remat="full"),
        diffusion=SHIFTED,
        optim=OptimConfig(peak_lr=2e-5, schedule="constant", warmup_steps=0, weight_decay=0.1),
        data=DataConfig(sequence_length=2048, batch_size=1536),
        run=RunConfig(steps=20_000, eval_every=2000, checkpoint_every=500, eval_records=4096),
    )


@experiments.register("dream_style_7b")
def dream_style_7b() -> Config:
    """A diffusion model from Qwen2.5 7B with Dream's mask id and token weights (CART), otherwise as `diffullama_7b`.

    Dream's own pre-training on 580B tokens is not public; the weights are those of Dream-Coder's fine-tuning.
    """
    base = diffullama_7b()
    return replace(
        base,
        model=replace(presets.get("dream_7b"), remat="full"),
        diffusion=replace(SHIFTED, mask_id=DREAM_MASK_ID, weighting="cart", cart_p=0.1),
        optim=replace(base.optim, warmup_steps=2000),
    )


@experiments.register("adapt_tinystories")
def adapt_tinystories() -> Config:
    """TinyStories-656K, a LLaMA of two layers, becomes a diffusion model in minutes on a CPU; give the stories, too."""
    return Config(
        model=ModelConfig(
            d_model=128,
            n_layers=2,
            n_heads=8,
            n_kv_heads=4,
            head_dim=16,
            d_ff=384,
            vocab_size=2048,
            max_length=512,
            norm_eps=1e-6,
            tied_head=True,
            head_chunk=256,  # what a processor's caches hold
        ),
        diffusion=DiffusionConfig(alignment="shifted", anneal_steps=300),
        optim=OptimConfig(peak_lr=3e-3, final_lr=3e-4, warmup_steps=50),  # see docs/results/adaptation.md
        data=DataConfig(sequence_length=256, batch_size=8),
        run=RunConfig(steps=1000, eval_every=250, checkpoint_every=250, log_every=20),
    )
