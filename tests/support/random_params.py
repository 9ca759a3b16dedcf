"""Random parameters of a model."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from diffusionlm.config import ModelConfig
from diffusionlm.model.transformer import Transformer


def make_params(cfg: ModelConfig, sharpness: float = 8):
    """Return random parameters with a head so sharp that the likeliest tokens and positions are clearly apart."""
    params = nn.unbox(jax.jit(Transformer(cfg).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return {**params, "head": params["head"] * sharpness}
