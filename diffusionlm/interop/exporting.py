"""From a checkpoint of ours to the files that other libraries read."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from diffusionlm import config, config_io
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import ModelConfig
from diffusionlm.data.tokenizers import kinds as tokenizers
from diffusionlm.errors import UserError, suggest
from diffusionlm.interop import safetensors
from diffusionlm.interop.families import FAMILIES, KEY, Family, Ours, config_json, ladder_config
from diffusionlm.interop.layouts import pairs
from diffusionlm.interop.places import Place, common_dtype, leaves, places, views
from diffusionlm.model import lora
from diffusionlm.storage import whole_directory

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def export_weights(
    path: str | os.PathLike,
    output: str | os.PathLike,
    format: str,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> list[str]:
    """Writes a checkpoint as a Hugging Face directory: config.json, safetensors, and the tokenizer's own files.

    Files above 5 GB are several with an index. Adapters go into the weights that they are of. Little more is in memory
    than the parameters of one kind. What the format's config.json has no field for is in it under `families.KEY`.

    Args:
      path: a run directory (its newest step), a step directory, or a params-only model.
      output: a new directory.
      format: llama, gpt2, qwen2, llada, or another family that `import_weights` reads.
      dtype: of the tensors; None: as they are stored.

    Returns:
      What a reader of the files should know, a sentence each.

    Raises:
      UserError: no checkpoint, an unknown format or dtype, a model that the format cannot express, values that the
        dtype cannot; `output` exists.
    """
    output = Path(output)
    if output.exists():
        raise UserError(f"output={output} exists; delete it or choose another directory")
    if format not in FAMILIES:
        raise UserError(f"unknown format {format!r}{suggest(str(format), FAMILIES)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}{suggest(str(dtype), DTYPES)}")
    sidecar = checkpoint.load_sidecar(path)
    cfg = config_io.from_dict(ModelConfig, sidecar.model)
    family = FAMILIES[format]
    ids = {name: getattr(sidecar, f"{name}_id") for name in ("bos", "eos", "pad", "mask")}
    if sidecar.start_id is not None:  # what other libraries put before a text
        ids["bos"] = sidecar.start_id
    try:
        _check_alignment(family, sidecar)
        described = config_json(family, cfg, cfg.embedding_rows, ids)
        merged = config_io.from_dict(ModelConfig, {**sidecar.model, "lora_rank": 0})
        wanted = places(family, cfg, {name: leaf.shape for name, leaf in leaves(merged).items()})
        if not described:  # a reader can only tell the network from the shapes
            ladder_config({name: place.shape for name, place in wanted.items()})
    except UserError as error:
        raise UserError(f"{path} cannot be written as format={format}: {error}") from error
    if described:
        described[KEY] = config_io.to_dict(_ours(format, sidecar, cfg))
    saved = checkpoint.saved_params(path)
    held: dict[str, np.ndarray] = {}

    def stored(place: Place) -> np.dtype:
        return DTYPES[dtype] if dtype else common_dtype(saved[name].dtype for name in place.rule.ours)

    def make(name: str) -> np.ndarray:
        place = wanted[name]
        if not set(place.rule.ours) <= set(held):  # tensors of a rule are neighbours, and share the parameters
            held.clear()
            held.update(_loaded(path, saved, place.rule.ours))
        tensor = np.empty(place.shape, stored(place))
        for mine, theirs in pairs(place.rule.layout, views(place, held), tensor, cfg):
            with np.errstate(over="ignore"):
                theirs[...] = mine
            if dtype == "float16" and (np.isinf(theirs) & np.isfinite(mine)).any():
                raise UserError(
                    f"dtype=float16 ends at 65,504, and {name} has a value of {np.abs(mine).max():g}; use bfloat16"
                )
        return tensor

    specs = {name: safetensors.Spec(place.shape, stored(place)) for name, place in wanted.items()}
    with whole_directory(output) as partial:
        if described:
            torch_dtype = next(name for name, one in DTYPES.items() if one == specs[next(iter(specs))].dtype)
            (partial / "config.json").write_text(json.dumps(described | {"torch_dtype": torch_dtype}, indent=2) + "\n")
        safetensors.write(partial, specs, make)
        if sidecar.tokenizer:
            for name, content in _tokenizer_files(sidecar.tokenizer).items():
                (partial / name).write_bytes(content)
    return _notes(format, cfg, sidecar.alignment)


def _ours(format: str, sidecar: checkpoint.Sidecar, cfg: ModelConfig) -> Ours:
    return Ours(
        family=format,
        objective=sidecar.objective,
        alignment=sidecar.alignment,
        diffusion=config_io.from_dict(config.DiffusionConfig, sidecar.diffusion),
        mask_row=cfg.mask_row,
        rope_bf16_tables=cfg.rope_bf16_tables,
        bos_id=sidecar.bos_id,
        start_id=sidecar.start_id,
        max_length=sidecar.canvas.get("max_length", cfg.max_length),
        template=sidecar.template,
    )


def _check_alignment(family: Family, sidecar: checkpoint.Sidecar) -> None:
    """Of the formats of masked diffusion models each has one alignment."""
    shifted = sidecar.alignment == "shifted"
    if family.mdm and sidecar.objective == "mdm" and family.shifted != shifted:
        theirs, ours = ("token i + 1" if one else "token i" for one in (family.shifted, shifted))
        fitting = ", ".join(name for name, one in FAMILIES.items() if one.mdm and one.shifted == shifted)
        raise UserError(f"position i predicts {theirs} in it, and {ours} in this model; formats of those are {fitting}")


def _loaded(
    path: str | os.PathLike, saved: Mapping[str, jax.ShapeDtypeStruct], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """These parameters, with the adapters of each in it."""
    wanted = {
        name + end: saved[name + end] for name in names for end in ("", lora.DOWN, lora.UP) if name + end in saved
    }
    some = checkpoint.load_some(path, wanted)
    if len(some) > len(names):
        merged = jax.jit(lora.merge)(traverse_util.unflatten_dict(some, sep="/"))
        some = {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(merged, sep="/").items()}
    return some


def _tokenizer_files(values: Mapping) -> dict[str, bytes]:
    return tokenizers.from_dict(dict(values)).files()


def _notes(format: str, cfg: ModelConfig, alignment: str) -> list[str]:
    family = FAMILIES[format]
    notes = []
    if cfg.mask_row and family.mask_in_head:
        rows = f"the mask token is row {cfg.vocab_size} of {cfg.embedding_rows}"
        notes.append(f"{rows}: the vocabulary grew by one, and the head can predict it, which readers must not let it")
    if not cfg.causal and not family.mdm:
        predicted = "i + 1" if alignment == "shifted" else "i, not i + 1"
        notes.append(
            f"the model attends in both directions, and what reads the format {format} is causal by default; position "
            f"i predicts token {predicted}"
        )
    if cfg.rope_bf16_tables and family.fields:
        notes.append(
            "the model rounds its rotary tables to bfloat16, which the format cannot say: logits differ a little"
        )
    return notes
