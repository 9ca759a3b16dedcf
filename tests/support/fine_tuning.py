"""Sums as dialogues, a model to start from, and a fine-tuning run of a few steps."""

import json

import jax
import jax.numpy as jnp

from diffusionlm import config_io
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.data import pipeline
from diffusionlm.data.prepare import prepare
from support import tiny_run
from support.random_params import make_params
from support.tiny_run import BATCH, tiny

LENGTH = 48


def make_dialogues(folder, *, pack=False):
    """Sums of two digits, some asked for twice in a dialogue; packed, two or three dialogues to a record."""
    sums = [(a, b) for a in range(10) for b in range(10)] * 2
    found = []
    for i, (a, b) in enumerate(sums):
        turns = [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": str(a + b)}]
        found.append({"messages": turns * (1 + i % 2)})
    source = folder / "sums.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in found))
    settings = {"tokenizer": "byte", "format": "sft", "template": "plain", "progress": False}
    length = 3 * LENGTH if pack else LENGTH + 40
    prepare(str(source), folder / "prepared", sequence_length=length, validation_fraction=0.2, pack=pack, **settings)
    return folder / "prepared"


def tuned(dataset, **changes):
    """A fine-tuning run of a few steps; `changes` are section -> {field: value}."""
    metadata = pipeline.open_dataset(dataset).metadata
    length = metadata.sequence_length
    cfg = tiny(
        dataset,
        diffusion={"random_length": 0.0, "normalization": "examples"},
        model={"max_length": length},
        data={"packing": metadata.packing, "sequence_length": length},
        run={"steps": 12, "eval_every": 6, "checkpoint_every": 4, "eval_records": 2 * BATCH},
    )
    return tiny_run.with_changes(cfg, changes)


def save_base(folder, dataset):
    """A model to start from, in bfloat16 and with a context of its own, as released ones are."""
    cfg = tuned(dataset, model={"max_length": 16})
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(cfg.model, sharpness=1))
    path = folder / "model"
    checkpoint.save_params(path, params, sidecar_of(cfg, dataset))
    return path, jax.device_get(params)


def sidecar_of(cfg, dataset, **changes):
    values = {
        "objective": cfg.objective,
        "model": config_io.to_dict(cfg.model),
        "diffusion": config_io.to_dict(cfg.diffusion),
        "mask_id": cfg.mask_id,
        "tokenizer": pipeline.open_dataset(dataset).metadata.tokenizer,
        "source": {"experiment": "base", "step": 7},
    }
    return Sidecar(**values | changes)
