"""Masked diffusion language models in JAX."""

from diffusionlm.version import __version__
