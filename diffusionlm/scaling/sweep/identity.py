"""The stable id of a cell, which later changes of `Config` do not affect.

A run's fingerprint covers every scientific field that `Config` has today, so it changes when a field is added or
removed. The id of a cell must not: it is the name of the directory in which a finished cell lies. The digest therefore
covers the fields that existed when the first sweeps were run, and any other field only where it differs from its
default.
"""

import functools
import hashlib
import json
from typing import Any

from diffusionlm.config import Config
from diffusionlm.fingerprint import scientific_fields

# Every scientific field of that time, with the value that it had if `Config` no longer has it. Never edit an entry.
_FIRST_FIELDS = {
    "objective": "mdm",
    "model.d_model": 256,
    "model.n_layers": 6,
    "model.n_heads": 4,
    "model.n_kv_heads": 4,
    "model.head_dim": 64,
    "model.d_ff": 1024,
    "model.vocab_size": 32000,
    "model.mask_row": True,
    "model.max_length": 2048,
    "model.causal": False,
    "model.norm": "rmsnorm",
    "model.norm_eps": 1e-05,
    "model.positions": "rope",
    "model.rope_theta": 10000.0,
    "model.rope_bf16_tables": False,
    "model.mlp": "swiglu",
    "model.linear_bias": False,
    "model.qkv_bias": False,
    "model.tied_head": False,
    "model.dtype": "float32",
    "diffusion.schedule": "linear",
    "diffusion.polynomial_power": 2.0,
    "diffusion.geometric_min": 0.0001,
    "diffusion.geometric_max": 20.0,
    "diffusion.t_min": 0.001,
    "diffusion.timesteps": 0,
    "diffusion.time_sampling": "antithetic",
    "diffusion.mask_sampling": "bernoulli",
    "diffusion.random_length": 0.0,
    "diffusion.random_length_scope": "example",
    "diffusion.normalization": "tokens",
    "diffusion.mask_id": None,
    "diffusion.suppress_mask": True,
    "optim.peak_lr": 0.0002,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 100,
    "optim.final_lr": 2e-05,
    "optim.drop_step": 0,
    "optim.drop_lr": 0.0,
    "optim.decay_steps": 0,
    "optim.beta1": 0.9,
    "optim.beta2": 0.95,
    "optim.eps": 1e-08,
    "optim.weight_decay": 0.1,
    "optim.decay_mask": "matrices",
    "optim.clip_norm": 1.0,
    "optim.first_moment_dtype": "float32",
    "data.source": "",
    "data.tokenizer": "sentencepiece",
    "data.sequence_length": 2048,
    "data.batch_size": 256,
    "data.packing": "chunk",
    "run.steps": 1000,
    "run.seed": 0,
    "run.eval_records": 512,
    "run.eval_draws": 8,
}


def digest(config: Config) -> str:
    """Return twelve hex digits that identify what a cell measures, whatever its paths, mesh and logging."""
    defaults = _defaults()
    fields = {
        name: value
        for name, value in scientific_fields(config).items()
        if name in _FIRST_FIELDS or value != defaults[name]
    }
    text = json.dumps(_FIRST_FIELDS | fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _defaults() -> dict[str, Any]:
    return scientific_fields(Config())
