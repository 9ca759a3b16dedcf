"""Random parameters of a model."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from diffusionlm.config import MeshConfig, ModelConfig
from diffusionlm.model.transformer import Transformer, abstract_params
from diffusionlm.parallel.mesh import make_mesh


def make_params(cfg: ModelConfig, sharpness: float = 8):
    """Return random parameters with a head so sharp that the likeliest tokens and positions are clearly apart."""
    params = nn.unbox(jax.jit(Transformer(cfg).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    return {**params, "head": params["head"] * sharpness}


def draw_params(cfg: ModelConfig):
    """Return random values for every parameter, drawn by NumPy: compiling the initialisation takes a second."""
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(mean + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    shapes = abstract_params(cfg, make_mesh(MeshConfig(), jax.devices()[:1]))
    return jax.tree_util.tree_map_with_path(draw, shapes)
