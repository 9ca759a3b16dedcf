"""Sums of two numbers, to compare the order in which a masked diffusion model and its twin write digits."""

from dataclasses import replace

from diffusionlm.config import Config, DataConfig, OptimConfig, RunConfig
from diffusionlm.registry import experiments
from diffusionlm.twin import autoregressive_twin

from .tinystories import tinystories


@experiments.register("arithmetic")
def arithmetic() -> Config:
    """An MDM that learns to add; give the problems of experiments/benchmarks/arithmetic_problems.py with --data.path.

    A token is a byte, so a digit is a token. Only the answer is masked and learnt.
    """
    return Config(
        name="arithmetic",
        model=replace(tinystories().model, n_layers=2, vocab_size=257, max_length=36, dtype="float32"),
        optim=OptimConfig(peak_lr=2e-3, final_lr=2e-4, warmup_steps=100),
        data=DataConfig(sequence_length=36, batch_size=32, packing="examples", pad_group=4),
        run=RunConfig(steps=3000, eval_every=1000, checkpoint_every=1000, log_every=50),
    )


@experiments.register("arithmetic_arm")
def arithmetic_arm() -> Config:
    """The autoregressive twin of `arithmetic`: the same trunk, data, tokens and FLOPs."""
    return autoregressive_twin(arithmetic())
