"""One tiny model, its twins and one batch of prompts for all sampling tests, so that they share programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffusionlm.config import Config, ModelConfig
from diffusionlm.model.spec import ModelSpec
from diffusionlm.model.transformer import Transformer
from support.numpy_model import numpy_forward

TINY = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64, vocab_size=50, max_length=128)
MDM = ModelSpec.of(Config(model=TINY))
ARM = ModelSpec.of(Config(objective="arm", model=dataclasses.replace(TINY, causal=True, mask_row=False)))
MASK = MDM.mask_id
INITIAL = nn.unbox(jax.jit(Transformer(TINY).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
PARAMS = {**INITIAL, "head": INITIAL["head"] * 8}  # so sharp that the likeliest tokens are clearly apart
# With nothing but masks, attention over equal values makes all positions equal: confidences tie up to rounding. So no
# prompt is empty.
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [7, 12, 44, 31, 18], [10, 6]]


def numpy_logits(spec: ModelSpec, params, row: list[int]) -> np.ndarray:
    """Float64 logits (T, V) of one unpadded row by itself, forbidden ids at -inf; `shifted` as Dream does it."""
    logits = numpy_forward(spec.model, params, np.array(row), np.ones(len(row), int), np.arange(len(row))).logits
    logits = np.concatenate([logits[:1], logits[:-1]]) if spec.shifted else logits.copy()
    logits[:, spec.model.vocab_size :] = -np.inf
    logits[:, list(spec.suppressed_ids)] = -np.inf
    return logits
