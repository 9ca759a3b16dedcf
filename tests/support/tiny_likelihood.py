"""A tiny random network and its likelihoods taken apart by hand, in float64."""

import dataclasses
import functools
import itertools
import math

import jax
import numpy as np
from scipy import special

from diffusionlm.config import Config, DiffusionConfig, ModelConfig
from diffusionlm.model.spec import ModelSpec
from diffusionlm.model.transformer import Transformer
from support.random_params import make_params

TINY = ModelConfig(
    d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, vocab_size=50, max_length=128, head_chunk=16
)
MDM = ModelSpec.of(Config(model=TINY))
SHIFTED = ModelSpec.of(Config(model=TINY, diffusion=DiffusionConfig(alignment="shifted")))
ARM = ModelSpec.of(Config(objective="arm", model=dataclasses.replace(TINY, causal=True, mask_row=False)))
MASK = 50
PREFIX, TARGET = [3, 1, 4, 1, 5], [9, 2, 6, 5]


@functools.cache
def params_of(cfg: ModelSpec):
    """Random parameters of a model; the same object every time."""
    return make_params(cfg.model, 4)


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg: ModelSpec, params, tokens_RxT):
    model, params = Transformer(cfg.model), {"params": params}
    return model.apply(params, model.apply(params, tokens_RxT), method=Transformer.head)[..., :50]


def log_probabilities(cfg: ModelSpec, rows, guidance: float = 0.0, prompt: int = 0) -> np.ndarray:
    """Log-probabilities of every token at every position of unpadded rows, (R, T, V), in float64."""
    rows = np.asarray(rows, np.int32)
    conditional = np.asarray(_logits(cfg, params_of(cfg), rows), np.float64)
    if guidance:
        without = rows.copy()
        without[:, :prompt] = MASK
        base = np.asarray(_logits(cfg, params_of(cfg), without), np.float64)
        conditional = base + (1 + guidance) * (conditional - base)
    return special.log_softmax(conditional, -1)


def next_token(tokens) -> np.ndarray:
    """log p of the next token under the autoregressive model, (V,)."""
    row = [*tokens, *[0] * (40 - len(tokens))]  # of one shape; what comes later is not seen
    return log_probabilities(ARM, [row])[0, len(tokens) - 1]


def nll_of_masks(masks, prefix=PREFIX, target=TARGET, guidance=0.0) -> np.ndarray:
    """The cross-entropy of each target token under each mask of the target, (R, n)."""
    n = len(target)
    rows = np.array([prefix + [MASK if m else t for m, t in zip(mask, target, strict=True)] for mask in masks])
    log_p_RxnxV = log_probabilities(MDM, rows, guidance, len(prefix))[:, len(prefix) :]
    return -np.stack([log_p_RxnxV[:, i, target[i]] for i in range(n)], 1)


def bound(**kwargs) -> float:
    """The mean over all orders of predicting a target."""
    n = len(kwargs.get("target", TARGET))
    masks = [m for m in itertools.product([False, True], repeat=n) if any(m)]
    nll = nll_of_masks(masks, **kwargs)
    return sum((nll[r] * mask).sum() / (math.comb(n, sum(mask)) * sum(mask)) for r, mask in enumerate(masks))
