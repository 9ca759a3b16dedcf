"""A random model of bytes as a checkpoint on a disk, for tests of evaluations."""

import dataclasses
import functools

from diffusionlm import config_io
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.config import Config, ModelConfig
from diffusionlm.data.tokenizers import ByteTokenizer
from support.random_params import make_params

MODEL = ModelConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, vocab_size=257, max_length=96)


@functools.cache
def random_params():
    """Return the parameters of the model, of either objective."""
    return make_params(MODEL)


def save(path, objective="mdm", **changes):
    """A checkpoint of a small random model of bytes."""
    cfg = Config(model=dataclasses.replace(MODEL, causal=objective == "arm"), objective=objective)
    params = {**random_params(), **changes}
    sidecar = Sidecar(
        objective=objective,
        model=config_io.to_dict(cfg.model),
        diffusion=config_io.to_dict(cfg.diffusion),
        mask_id=cfg.mask_id,
        eos_id=ByteTokenizer.eos_id,
        suppressed_ids=cfg.suppressed_ids,
        tokenizer=ByteTokenizer().to_dict(),
    )
    checkpoint.save_params(path, params, sidecar)
    return str(path)
