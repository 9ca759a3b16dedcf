"""Random parameters of a model, drawn by NumPy: compiling the initialisation takes a second."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from diffusionlm.config import MeshConfig, ModelConfig
from diffusionlm.model.transformer import abstract_params
from diffusionlm.parallel.mesh import make_mesh


@functools.cache
def make_params(cfg: ModelConfig, sharpness: float = 8):
    """Return parameters as large as initial ones, but with a head so sharp that tokens are clearly apart."""
    std = math.sqrt(2 / (5 * cfg.d_model))

    def draw(rng, name, shape):
        if name == "scale" or name.endswith("bias"):
            return np.full(shape, name == "scale")
        return (sharpness if name == "head" else 1) * std * rng.normal(size=shape)

    return _map_shapes(cfg, draw)


def draw_params(cfg: ModelConfig):
    """Return random values for every parameter, gains and biases too, so that each matters."""
    return _map_shapes(cfg, lambda rng, name, shape: float(name == "scale") + 0.3 * rng.normal(size=shape))


def _map_shapes(cfg: ModelConfig, draw):
    """Return what `draw` gives for a generator, the name and the shape of every parameter, as a tree of parameters."""
    rng = np.random.default_rng(5)
    shapes = abstract_params(cfg, make_mesh(MeshConfig(), jax.devices()[:1]))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(draw(rng, path[-1].key, leaf.shape), leaf.dtype), shapes
    )
